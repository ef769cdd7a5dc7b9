"""The OpenVINO engine against the transformers engine on tiny random models, and what it promises beside: bits and blocks."""

from __future__ import annotations

import copy
import dataclasses
import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

pytest.importorskip("openvino")

import openvino as ov

import adi
from adi.model.backbone import Rows
from adi.model.hf import HfBackbone
from adi.model.hf.weights import fingerprint
from adi.model.openvino import OpenVinoBackbone, export_and_open, manifest, open_exported
from adi.model.openvino.export import pipeline as export_module
from adi.model.openvino.export.trace import MOST_SEEN
from adi.model.openvino.row_invariance import rows_are_invariant
from engines import IDS, PRECISIONS, PROMPT, Cached, engine, folder_of, model_of, prefilled
from families import FAMILIES, KV, LAYERS, C, tiny

EXPORTED = ("llama", "gemma3", "phi3", "gpt2", "qwen3_moe", "gpt_oss")
MORE = ("qwen2", "qwen3", "olmo2", "gpt_neox", "gptj", "bloom")


@pytest.mark.parametrize("family", [*EXPORTED, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)])
def test_states_and_logits_are_those_of_transformers(made: Cached, family: str) -> None:
    backbone, hf = engine(made, family), HfBackbone(model_of(family))
    mine, theirs = backbone.new_cache(), hf.new_cache()
    ids, layers = IDS[: PROMPT + 9], backbone.spec.layers
    own: dict[str, Any] = {name: getattr(hf.spec, name) for name in ("backend", "name", "row_invariant", "threads", "chunk")}
    assert dataclasses.replace(backbone.spec, **own, context=hf.spec.context) == hf.spec
    assert backbone.spec.context == hf.spec.context or (family, backbone.spec.context) == ("bloom", MOST_SEEN)

    def both(start: int, end: int, hidden_TD: Any, lo: int, hi: int) -> Any:
        rows = [Rows(cache, start, ids[start:end], hidden_TD) for cache in (mine, theirs)]
        mlp = hf.has_mlp_tap
        (got,), (wanted,) = (b.forward([r], lo, hi, mlp=mlp) for b, r in zip((backbone, hf), rows, strict=True))
        for name in ("hidden_TD", "before_TD", *(["mlp_TF"] if mlp else [])):
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), atol=1e-4, rtol=1e-5)
        return got.hidden_TD

    both(0, PROMPT + 6, None, 0, layers)  # to be rolled back
    for split in (1, 3, 5):
        end = len(ids)
        shallow = [both(i, i + 1, None, 0, split) for i in range(PROMPT, end - 2)]
        shallow.append(both(end - 2, end, None, 0, split))
        deep_TD = both(PROMPT, end, torch.cat(shallow), split, layers)
        with torch.no_grad():
            wanted_TV = hf.model(torch.tensor([ids])).logits[0, PROMPT:]
        torch.testing.assert_close(backbone.logits(deep_TD), wanted_TV, atol=1e-4, rtol=1e-5)
        assert backbone.greedy(deep_TD) == wanted_TV.argmax(-1).tolist()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_verified_decoding_is_plain_decoding(made: Cached, precision: str) -> None:
    model = adi.Model(backbone=engine(made, "llama", precision), tokenizer=None, eos_ids=frozenset())
    plain = adi.generate(model, list(IDS[:PROMPT]), adi.FullDepth(), max_new_tokens=40)
    exits = adi.bare_exits(model, (2, 4))
    ragged = adi.AnyOf((adi.Threshold("stability", 0.93), adi.Threshold("top_probability", 0.03)))
    for trigger in (adi.Threshold("top_probability", 0.0), ragged):
        policy = adi.Verified(exits, trigger, draft_tokens=5)
        assert adi.generate(model, list(IDS[:PROMPT]), policy, max_new_tokens=40).token_ids == plain.token_ids
    if precision == "fp32":
        reference = adi.generate(adi.load(tiny("llama")), list(IDS[:PROMPT]), adi.FullDepth(), max_new_tokens=40)
        assert reference.token_ids == plain.token_ids


def test_experts_have_no_copies_for_fixed_numbers_of_rows(made: Cached) -> None:
    """With fixed shapes the plugin would run all experts and not the chosen ones alone."""
    backbone = engine(made, "qwen3_moe")
    backbone.prepare((), drafts=True, wait=True)
    assert backbone.copies.rows == ()
    assert rows_are_invariant(backbone)


def test_sinks_take_their_share(made: Cached) -> None:
    """Without them the same weights give other logits, so that they are seen at all."""
    page = manifest.read_manifest(folder_of("gpt_oss")) if engine(made, "gpt_oss") else None
    assert page is not None
    assert all(len(a.sinks) == a.heads for a in page.attentions)
    plain = replace(page, attentions=tuple(dataclasses.replace(a, sinks=()) for a in page.attentions))
    blocks, head = manifest.read_graphs(folder_of("gpt_oss"), ov.Core())
    other = OpenVinoBackbone(plain, blocks, head)
    found = [b.forward([Rows(b.new_cache(), 0, IDS, None)], 0, LAYERS)[0].hidden_TD for b in (engine(made, "gpt_oss"), other)]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_an_export_opens_without_the_original(made: Cached) -> None:
    hf = HfBackbone(tiny("llama"))
    engine(made, "llama")
    opened = OpenVinoBackbone.open(folder_of("llama"))
    assert opened.spec.fingerprint == hf.spec.fingerprint
    got, wanted = opened.readout().tensors(), hf.readout()
    for field in dataclasses.fields(got):
        mine, theirs = getattr(got, field.name), getattr(wanted, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_a_model_folder_leads_to_its_export_until_it_changes(made: Cached, tmp_path: Path) -> None:
    engine(made, "llama")
    (tmp_path / "config.json").write_text("{}")
    assert open_exported(tmp_path, precision="fp32") is None
    export_and_open(tiny("llama"), name="llama", precision="fp32", source=tmp_path)
    again = open_exported(tmp_path, precision="fp32")
    assert again is not None
    assert again.spec == engine(made, "llama").spec
    (tmp_path / "config.json").write_text('{"more": 1}')
    assert open_exported(tmp_path, precision="fp32") is None


def test_a_model_has_the_name_it_is_loaded_by(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tiny_folder)
    for place in (str(tiny_folder), str(tmp_path / "other")):
        assert adi.load(place, backend="openvino", precision="fp32").backbone.spec.name == place


def test_the_same_weights_in_another_configuration_are_another_export() -> None:
    assert fingerprint(tiny("llama")) == fingerprint(tiny("mistral"))
    assert folder_of("llama") != folder_of("mistral")


def test_an_export_in_few_bits_is_checked_in_float32_kv_memory_and_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With keys and values in 16 bits this model's logits differ by more, and those of a real Gemma 3 by more than the check
    allows."""
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    monkeypatch.setattr(export_module, "TOLERANCE", 2e-5)
    assert export_and_open(model_of("gemma3"), name="gemma3", precision="int8").spec.precision == "int8"


def test_a_damaged_export_is_named(made: Cached, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the exported model .*model\.json"):
        OpenVinoBackbone.open(tmp_path)
    (tmp_path / "model.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="delete it and load the model again"):
        OpenVinoBackbone.open(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "other numbers"])
def test_a_damaged_readout_is_named(made: Cached, tmp_path: Path, damage: str) -> None:
    engine(made, "llama")
    folder = tmp_path / "copy"
    shutil.copytree(folder_of("llama"), folder)
    file = folder / "readout.safetensors"
    if damage == "other numbers":
        save_file({name: array.astype(np.float16) for name, array in load_file(file).items()}, file)
    else:
        file.write_bytes(file.read_bytes()[: -9 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=r"the exported model in .* is damaged .*; delete it"):
        OpenVinoBackbone.open(folder).readout()


def test_only_blocks_that_exist_can_be_run(made: Cached) -> None:
    backbone = engine(made, "llama")
    assert backbone.spec.stops == tuple(range(1, LAYERS + 1))
    for lo, hi in ((0, 7), (2, 2), (-1, 3)):
        with pytest.raises(ValueError, match=rf"the model has blocks \[0, {LAYERS}\)"):
            backbone.forward([Rows(backbone.new_cache(), 0, (1,), None)], lo, hi)
    with pytest.raises(ValueError, match=r"stops \[7\] do not exist"):
        backbone.prepare((7,))


def test_the_whole_model_for_any_number_of_rows_is_two_segments_and_a_bucket_one(made: Cached) -> None:
    engine(made, "llama")
    opened = OpenVinoBackbone.open(folder_of("llama"))
    opened.prepare((), drafts=True, wait=True)
    spans: dict[int, set[tuple[int, int]]] = {}
    for lo, hi, bucket in opened._segments._segments:
        spans.setdefault(bucket, set()).add((lo, hi))
    half = LAYERS // 2
    assert spans.pop(0) == {(0, half), (half, LAYERS)}
    assert len(spans) >= 2
    assert all(pieces == {(0, LAYERS)} for pieces in spans.values())


def test_blocks_come_back_when_a_sequence_ends(made: Cached) -> None:
    backbone = engine(made, "llama")
    gc.collect()
    before = backbone.pool.free
    closed, forgotten = prefilled(backbone, IDS[:40]), prefilled(backbone, IDS[:33])
    assert before - backbone.pool.free == 4
    closed.close()
    closed.close()
    assert before - backbone.pool.free == 2
    del forgotten
    gc.collect()
    assert backbone.pool.free == before


def test_full_memory_is_said_before_any_work_and_growth_keeps_what_is_there(made: Cached) -> None:
    engine(made, "llama")
    folder, layers = folder_of("llama"), LAYERS
    small = OpenVinoBackbone.open(folder, kv_bytes=40 * engine(made, "llama").pool.block_bytes)
    first = prefilled(small, IDS[:PROMPT])
    others = [prefilled(small, IDS[:PROMPT]) for _ in range(18)]  # 38 blocks: the pool has grown twice
    with pytest.raises(ValueError, match="3 more blocks of 32 positions are needed and 2 of 40 are free"):
        small.forward([Rows(small.new_cache(), 0, IDS[:33] + IDS[:32], None)], 0, layers)
    assert len(others) == 18
    (states,) = small.forward([Rows(first, PROMPT, IDS[PROMPT:50], None)], 0, layers)
    with torch.no_grad():
        wanted_TV = tiny("llama")(torch.tensor([IDS[:50]])).logits[0, PROMPT:]
    torch.testing.assert_close(small.logits(states.hidden_TD), wanted_TV, atol=1e-4, rtol=0)


REFUSED = {
    "gemma2": "its attention uses softcap",
    "lfm2": "it has blocks of type conv",
}


@pytest.mark.parametrize("family", list(REFUSED))
def test_what_cannot_be_exported_is_refused_in_a_sentence(family: str) -> None:
    kind = FAMILIES[family][0]
    with pytest.raises(ValueError, match=rf"^{kind}ForCausalLM cannot be exported to OpenVINO: {REFUSED[family]}[^\n]*\.$"):
        export_and_open(tiny(family), name=family, precision="fp32")


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_weights_in_16_bits_are_exported_as_they_are(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Calculated with in 32 bits, and never there in as many all together; in 8 bits too, and the model stays as it was."""
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    monkeypatch.setattr("adi.model.openvino.export.constants.SMALL", 100)
    for name, found in (("settle_rows", True), ("merged_rows", 1), ("prompt_chunk", 1)):  # of which nothing is asked here
        monkeypatch.setattr(f"adi.model.openvino.build.{name}", lambda *_, found=found: found)
    half = copy.deepcopy(tiny(family)).bfloat16()
    wide, before = copy.deepcopy(half).float(), half.state_dict()
    found = {}
    for precision in ("int8",) if family == "gpt_oss" else ("fp32", "int8"):
        for model in (half, wide):
            with torch.no_grad():
                engine = export_and_open(model, name=family, precision=precision, weights=f"00{model is wide:d}")
            found[precision, model is wide] = engine.forward([Rows(engine.new_cache(), 0, IDS, None)], 0, LAYERS)[0].hidden_TD
        torch.testing.assert_close(found[precision, False], found[precision, True], atol=1e-5, rtol=1e-5)
    sizes = {folder.name[:3]: (folder / "blocks.bin").stat().st_size for folder in (tmp_path / "openvino").glob("*-fp32-*")}
    assert family == "gpt_oss" or sizes["000"] < 0.6 * sizes["001"]
    assert half.state_dict().keys() == before.keys()
    assert all(
        torch.equal(value, before[name]) and value.dtype == before[name].dtype for name, value in half.state_dict().items()
    )
    assert not half._forward_pre_hooks


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="precision 'int3' is not one of"):
        export_and_open(tiny("llama"), name="llama", precision="int3")
    half = t.LlamaForCausalLM(tiny("llama").config).eval().double()
    with pytest.raises(ValueError, match=r"it is in torch\.float64 on cpu, and export starts from float32"):
        export_and_open(half, name="half")
    odd = t.LlamaForCausalLM(t.LlamaConfig(**{**C, **KV, "intermediate_size": 48})).eval()
    with pytest.raises(ValueError, match="a matrix with 48 inputs does not divide into groups of 32 for int4; choose int8"):
        export_and_open(odd, name="odd", precision="int4")


def test_the_users_model_is_left_as_it_was_found(made: Cached) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = t.Qwen2ForCausalLM(t.Qwen2Config(**{**C, **KV, "num_hidden_layers": 2})).eval()

    def snapshot() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()]
        return [hooks, model.config._attn_implementation, model.config.to_dict(), sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())]

    before = snapshot()
    export_and_open(model, name="mine", precision="fp32")
    assert snapshot() == before


def test_a_lone_tokens_embedding_is_remembered(made: Cached) -> None:
    backbone = engine(made, "llama")
    first = backbone.embed([5])
    assert backbone.embed([5]).raw_TD is first.raw_TD
    assert torch.equal(backbone.embed([5, 6]).hidden_TD[:1], first.hidden_TD)


def test_an_edit_of_the_exporter_makes_a_new_export(monkeypatch: pytest.MonkeyPatch) -> None:
    from adi.model.openvino import manifest

    before = manifest.export_dir("ab-cd", "int8")
    assert manifest.export_dir("ab-cd", "int8") == before
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "gptq.py"))
    manifest.exporter_digest.cache_clear()
    assert manifest.export_dir("ab-cd", "int8") != before
    monkeypatch.undo()
    manifest.exporter_digest.cache_clear()
    assert manifest.export_dir("ab-cd", "int8") == before
