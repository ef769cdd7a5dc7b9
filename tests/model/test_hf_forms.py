"""States of other axes than [1, T, D], and keys and values that blocks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as t

import adi
from adi.model.backbone import Rows
from adi.model.hf import HfBackbone
from families import IDS, KV, VOCABULARY, C, own_logits, tiny


def test_four_streams_are_stored_and_heads_read_their_mixture() -> None:
    backbone, wanted = HfBackbone(tiny("gemma3n")), own_logits(tiny("gemma3n"), IDS)
    (states,) = backbone.forward([Rows(backbone.new_cache(), 0, IDS, None)], 0, backbone.spec.layers)
    assert states.raw_TD.shape == (len(IDS), 4 * backbone.spec.width)
    assert states.hidden_TD.shape == states.before_TD.shape == (len(IDS), backbone.spec.width)
    for given in (states, states.hidden_TD, states[:]):
        torch.testing.assert_close(backbone.logits(given), wanted, atol=1e-4, rtol=0)


def test_an_exit_head_and_a_bare_exit_read_the_same_mixture() -> None:
    model = adi.load(tiny("gemma3n"))
    backbone = model.backbone
    (states,) = backbone.forward([Rows(backbone.new_cache(), 0, IDS, None)], 0, 3)
    read = backbone.compile("as it is", lambda: lambda rows_TD: (rows_TD,), [backbone.spec.width])
    torch.testing.assert_close(read(states.raw_TD)[0], states.hidden_TD)
    torch.testing.assert_close(read(states.hidden_TD)[0], states.hidden_TD)
    assert read(backbone.embed(IDS).raw_TD)[0].shape == states.hidden_TD.shape


def test_what_a_skipped_block_wrote_is_shown_to_the_blocks_that_read_it() -> None:
    backbone, wanted = HfBackbone(tiny("gemma3n")), own_logits(tiny("gemma3n"), IDS)
    assert backbone._split._steps.shares == {2: "sliding_attention", 3: "full_attention"}
    cache = backbone.new_cache()
    (shallow,) = backbone.forward([Rows(cache, 0, (*IDS[:20], 5, 6), None)], 0, 5)  # ahead of what reads them
    backbone.forward([Rows(cache, 0, IDS[:20], shallow[:20])], 5, 6)
    (shallow,) = backbone.forward([Rows(cache, 20, IDS[20:], None)], 0, 4)
    (deep,) = backbone.forward([Rows(cache, 20, IDS[20:], shallow)], 4, 6)
    torch.testing.assert_close(backbone.logits(deep), wanted[20:], atol=1e-4, rtol=0)


def test_a_model_that_transformers_has_among_readers_of_images_alone_is_found_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    seeing: dict[str, Any] = dict(model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    text = dict(model_type="mistral", **C, **KV, head_dim=8)
    config = t.Mistral3Config(text_config=text, vision_config={**seeing, "num_attention_heads": 2, "head_dim": 8})
    hf = t.Mistral3ForConditionalGeneration(config).eval()
    for parameter in hf.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    hf.generation_config.eos_token_id = None
    hf.save_pretrained(tmp_path)
    wanted = hf.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False)[0, len(IDS) :].tolist()
    model = adi.load(tmp_path, backend="hf")
    assert model.backbone.spec.vocabulary == VOCABULARY
    assert list(adi.generate(model, IDS, adi.Verified(adi.bare_exits(model, (2,))), max_new_tokens=8).token_ids) == wanted


def test_a_token_that_leaves_above_all_keys_and_values_owes_nothing() -> None:
    """Blocks 4 and 5 read what others keep: of a token that left there they never run, and the text is the same."""
    model = adi.load(tiny("gemma3n"))
    backbone = model.backbone
    assert backbone.spec.keeps_below == 4
    assert adi.load(tiny("llama")).backbone.spec.keeps_below is None

    def said(depth: int, keeps: int | None) -> Any:
        backbone.spec = replace(backbone.spec, keeps_below=keeps)
        trigger = adi.Threshold("top_probability", 0.02)
        policy = adi.Reflex(adi.bare_exits(model, (depth,)), trigger=trigger)
        return adi.generate(model, list(IDS[:6]), policy, max_new_tokens=30, stop_at_eos=False)

    for depth in (3, 4, 5):
        owing, settled = said(depth, None), said(depth, 4)
        assert settled.token_ids == owing.token_ids
        assert [step.depth for step in settled.steps] == [step.depth for step in owing.steps]
        assert {step.depth for step in owing.steps} == {depth, 6}, "some leave early, others run to the end after them"
        saved = owing.counters.row_blocks - settled.counters.row_blocks
        assert (saved > 5 * 2) == (depth >= 4), "five rows of the prompt skip two blocks in any case"


def test_blocks_that_keep_nothing_run_for_a_prompts_last_row_alone() -> None:
    """In all modes alike; the text is that of transformers."""
    model, ids = adi.load(tiny("gemma3n")), [3 + i % 90 for i in range(150)]
    wanted = tiny("gemma3n").generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 150:].tolist()
    for policy in (adi.FullDepth(), adi.Verified(adi.bare_exits(model, (3,)))):
        said = adi.generate(model, ids, policy, max_new_tokens=8, stop_at_eos=False)
        assert list(said.token_ids) == wanted
        assert policy.mode != "full" or said.counters.row_blocks == 150 * 4 + 2 + 7 * 6
