"""Weights that are kept in other ways than as plain tensors in memory: offloaded, quantised, an adapter beside its base."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch.testing._internal.two_tensor import TwoTensor

import adi
from adi.model.hf.weights import fingerprint
from families import tiny

IDS = [5, 17, 9, 5, 17]
TOKENS = 12
OPENVINO = pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="needs openvino")


def own(model: Any) -> tuple[int, ...]:
    asked: Any = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    return tuple(model.generate(input_ids=torch.tensor([IDS]), **asked)[0, len(IDS) :].tolist())


def says(model: adi.Model) -> tuple[int, ...]:
    verified = adi.Verified(adi.bare_exits(model, (2,)), adi.Always((2,)), 3)
    return adi.generate(model, IDS, verified, max_new_tokens=TOKENS, stop_at_eos=False).token_ids


def on_disk(model: Any, folder: Path) -> Any:
    """Read with every other block on the disk."""
    model.save_pretrained(folder)
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(model.config.num_hidden_layers)}
    return t.AutoModelForCausalLM.from_pretrained(folder, device_map=parts, offload_folder=folder / "kept").eval()


def offloaded(name: str) -> Callable[[Any, Path], Any]:
    accelerate = pytest.importorskip("accelerate")
    if name == "cpu":
        return lambda model, _: accelerate.cpu_offload(model, execution_device="cpu")
    return lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu")


# A11
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
def test_offloaded_weights_run_and_have_their_fingerprint(family: str, where: str, tmp_path: Path) -> None:
    if where == "device_map" and family != "llama":
        pytest.skip("one family is enough, its parts are named")
    hf = tiny(family)
    wanted, name = own(hf), fingerprint(hf)
    moved = (on_disk if where == "device_map" else offloaded(where))(copy.deepcopy(hf), tmp_path)
    assert any(p.is_meta for p in moved.parameters())
    model = adi.load(moved)
    assert says(model) == wanted
    assert own(moved) == wanted
    assert says(model) == wanted, "others have used it meanwhile"
    assert model.backbone.spec.fingerprint == name
    assert model.backbone.spec.device == "cpu"
    assert model.backbone.last_mlp() is None or where == "device_map"


# A12
def test_activations_that_are_rounded_by_pass_are_refused_for_that() -> None:
    """Their scale is that of all tokens of a pass, so no text is the same in another cut."""
    with pytest.warns(Warning, match="deprecated"):
        rounded = torch.ao.quantization.quantize_dynamic(copy.deepcopy(tiny("llama")), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"change with the tokens that follow in the same pass: .* as quantize_dynamic does"):
        adi.load(rounded)
    assert fingerprint(rounded) != fingerprint(tiny("llama"))


# A12
def test_torchao_models_run() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for config in (quantization.Int8WeightOnlyConfig(), quantization.Int8DynamicActivationInt8WeightConfig()):
        hf = copy.deepcopy(tiny("llama"))
        quantization.quantize_(hf, config)
        assert says(adi.load(hf)) == own(hf)


# A12
def test_a_fingerprint_looks_into_tensors_that_are_made_of_others() -> None:
    """As torchao's are, for which torch's own example stands in."""
    model = torch.nn.Linear(4, 4)
    names = set()
    for second in (0.0, 1.0):
        model.weight = torch.nn.Parameter(TwoTensor(torch.ones(4, 4), torch.full((4, 4), second)), requires_grad=False)
        names.add(fingerprint(model))
    assert len(names) == 2


# A13, B10
def test_a_saved_bitsandbytes_folder_runs(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny("llama").save_pretrained(tmp_path / "plain")
    config = t.BitsAndBytesConfig(load_in_8bit=True)
    hf = t.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    hf.save_pretrained(tmp_path / "model")
    notices: list[str] = []
    for backend in ("hf", "auto"):
        assert says(adi.load(tmp_path / "model", backend=backend, notice=notices.append)) == own(hf)
    assert any("quantised by bitsandbytes, and an export starts from plain ones" in notice for notice in notices)
    with pytest.raises(ValueError, match="precision 'bf16' was asked for, but the model's weights are saved quantised"):
        adi.load(tmp_path / "model", backend="hf", precision="bf16")


PACKAGES = {
    "bitsandbytes": ("bitsandbytes", {"load_in_4bit": True}),
    "gptq": ("optimum", {"bits": 4}),
    "awq": ("gptqmodel", {"bits": 4}),
    "compressed-tensors": ("compressed-tensors", {"format": "pack-quantized", "config_groups": {}}),
}


# A13, B10
@OPENVINO
@pytest.mark.parametrize("method", list(PACKAGES))
def test_quantised_folders_name_the_package_that_reads_them(method: str, tmp_path: Path) -> None:
    package, fields = PACKAGES[method]
    for name in {package, package.replace("-", "_"), "gptqmodel"}:
        if importlib.util.find_spec(name):
            pytest.skip(f"{name} is installed")
    folder = with_config(tmp_path, quantization_config={"quant_method": method, **fields})
    notices: list[str] = []
    with pytest.raises(ValueError, match=f"^cannot load .*: .*{package}[^.]*") as found:
        adi.load(folder, notice=notices.append)
    assert "Known:" not in str(found.value)
    assert any(f"quantised by {method}" in notice for notice in notices)
    with pytest.raises(ValueError, match=f"quantised by {method}, and an export starts from plain ones"):
        adi.load(folder, backend="openvino")


def with_config(folder: Path, **fields: Any) -> Path:
    tiny("llama").save_pretrained(folder / "model")
    page = folder / "model" / "config.json"
    page.write_text(json.dumps({**json.loads(page.read_text()), **fields}))
    return folder / "model"


# A22
@pytest.mark.parametrize("backend", ["auto", "hf"])
def test_code_that_comes_with_a_model_is_not_run_and_that_is_said(backend: str, tmp_path: Path) -> None:
    code = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
    folder = with_config(tmp_path, model_type="of_its_own", auto_map=code)
    with pytest.raises(ValueError, match=r"it needs code of its own.*trust_remote_code=True.*give adi\.load the model"):
        adi.load(folder, backend=backend, notice=lambda _: None)


def adapter(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": "org/base"}))
    return folder


# A22, B10
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
@pytest.mark.parametrize("backend", ["auto", "hf"])
def test_adapters_that_put_virtual_tokens_before_a_text_are_refused(kind: str, backend: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"adapter of the kind {kind}, which puts virtual tokens before the text"):
        adi.load(adapter(tmp_path, kind), backend=backend)


# A22, B10
def test_an_adapter_without_peft_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr("adi.model.stored.importlib.util.find_spec", lambda name: None if name == "peft" else there(name))
    with pytest.raises(ValueError, match=r"is a LORA adapter for org/base, and reading it needs peft: pip install peft, or"):
        adi.load(adapter(tmp_path, "LORA"))


# A22, B10
def test_an_adapter_folder_runs_on_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny("llama").save_pretrained(tmp_path / "base")
    base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    hf = peft.get_peft_model(base, config).eval()
    hf.save_pretrained(tmp_path / "adapter")
    notices: list[str] = []
    for backend in ("hf", "auto"):
        assert says(adi.load(tmp_path / "adapter", backend=backend, notice=notices.append)) == own(hf)
    assert any("an adapter beside its base, and an export starts from one model" in notice for notice in notices)


# A22
def test_adapters_in_memory_run_and_may_be_switched() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.1)
    plain = copy.deepcopy(tiny("llama"))
    model = adi.load(plain)
    before = says(model)
    plain.add_adapter(config)
    with pytest.raises(ValueError, match=r"training mode \(.*lora_dropout.*\); call model\.eval"):
        says(model)
    plain.eval()
    assert says(model) == own(plain) != before
    hf = peft.get_peft_model(copy.deepcopy(tiny("llama")), config).eval()
    model = adi.load(hf)
    assert says(model) == own(hf)
    with hf.disable_adapter():
        assert says(model) == own(hf) == before
    hf.merge_adapter()
    assert says(model) == own(hf)
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="its adapter puts virtual tokens before the text"):
        adi.load(peft.get_peft_model(copy.deepcopy(tiny("llama")), tuning).eval())
