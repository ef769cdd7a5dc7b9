"""A looped model's halting gate is a trigger like others: read between turns, combined, saved, calibrated, verified."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.errors import AdiError, ModelError, UsageError
from adi.exits.probe import gate_probe
from adi.model.backbone import Rows
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from support import adi_

IDS = (1, 2, 3, 4, 5, 6, 1, 2)


def network(**form: Any) -> LoopedForCausalLM:
    """A tiny language model whose gate halts at every turn about as often."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 4}
    model = LoopedForCausalLM(LoopedConfig(**{**sizes, **form})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
        model.gate.stop.bias.zero_()
    return model


@cache
def loaded() -> adi.Model:
    return adi.load(network())


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "priced": {"gate_price": True},
    "two blocks a turn": {"core_layers": 2, "injection": "none"},
    "a prelude that is injected": {"prelude_layers": 1},
    "two states": {"states": 2, "inner_turns": 2, "injection": "add", "turn_norm": False},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_gate_between_turns_is_the_models_own(form: dict[str, Any]) -> None:
    model, price = network(**form), 0.05 if "gate_price" in form else None
    every = model(torch.tensor([IDS]), output_turns=True, price=price)
    backbone = adi.load(model).backbone
    exits = adi.bare_exits(adi.load(model), price=price)
    first = model.config.prelude_layers
    assert exits.depths == (first + 1, first + 2, first + 3)
    assert exits.trigger == adi.Threshold("gate", 0.5)
    assert exits.probe is not None
    for turn, depth in enumerate(exits.depths):
        with backbone.new_cache() as cache:
            (states,) = backbone.forward([Rows(cache, 0, IDS, None)], 0, depth)
        chance_T = exits.probe.chance("gate", depth, torch.as_tensor(states.hidden_TD))
        assert torch.allclose(chance_T, every.halt_logits[turn, 0].sigmoid(), atol=1e-5)
        assert torch.allclose(
            exits.reader(backbone)(depth, states).log_probs_TS, every.turn_logits[turn, 0].log_softmax(-1), atol=1e-4
        )


def test_where_no_gate_can_be_read_there_is_none() -> None:
    assert gate_probe(network(gate_price=True), (1,), None) is None
    exits = adi.bare_exits(adi.load(network(gate_price=True)))
    assert (exits.probe, exits.trigger) == (None, adi.Threshold("top_probability", 0.5))
    with pytest.raises(UsageError, match="no gate of this model knows a price"):
        adi.bare_exits(loaded(), price=0.1)
    with pytest.raises(UsageError, match=r"'gate' reads a gate, and these exits have none; adi\.bare_exits of a looped model"):
        adi.Reflex(exits, trigger=adi.Threshold("gate", 0.5))


def test_reflex_stops_each_token_at_the_first_turn_whose_gate_passes() -> None:
    """The slow twin: one pass of all turns over the finished text, read at every turn."""
    found = adi.generate(loaded(), IDS, adi.Reflex(adi.bare_exits(loaded()), thresholds=0.5), max_new_tokens=24)
    every = network()(torch.tensor([(*IDS, *found.token_ids)]), output_turns=True)
    for i, step in enumerate(found.steps):
        row = len(IDS) - 1 + i
        chances = every.halt_logits[:, 0, row].sigmoid().tolist()
        turn = next((t for t, chance in enumerate(chances[:-1], 1) if chance >= 0.5), 4) if i else 4  # a prompt runs in full
        assert step.depth == turn
        assert step.token == int(every.turn_logits[turn - 1, 0, row].argmax())
    assert len({step.depth for step in found.steps}) > 2


@pytest.mark.parametrize(
    "trigger",
    [
        adi.Threshold("gate", 0.5),
        adi.AllOf((adi.Threshold("gate", 0.4), adi.Threshold("entropy", 3.0))),
        adi.AnyOf((adi.Threshold("gate", 0.9), adi.Threshold("top_probability", 0.2))),
        adi.Weighted({"gate": 2.0, "margin": 1.0}, -1.0, 0.5),
        adi.Always((2,)),
    ],
)
def test_drafts_from_the_turn_that_halts_are_verified_at_all_turns(trigger: adi.Trigger) -> None:
    exits = adi.bare_exits(loaded())
    full = adi.generate(loaded(), IDS, adi.FullDepth(), max_new_tokens=24)
    found = adi.generate(loaded(), IDS, adi.Verified(exits, trigger=trigger, draft_tokens=3), max_new_tokens=24)
    assert found.token_ids == full.token_ids
    assert found.counters.drafted > 0
    prompts = [IDS[i:] + IDS[:i] for i in range(4)]
    together = adi.generate_batch(loaded(), prompts, adi.Verified(exits, trigger=trigger, draft_tokens=3), max_new_tokens=6)
    for prompt, one in zip(prompts, together, strict=True):
        assert one.token_ids == adi.generate(loaded(), prompt, adi.FullDepth(), max_new_tokens=6).token_ids


def test_a_gate_is_saved_with_the_exits(tmp_path: Path) -> None:
    exits = adi.bare_exits(loaded())
    exits.save(tmp_path)
    again = adi.load_exits(tmp_path)
    assert (again.heads, again.trigger, again.depths) == (None, exits.trigger, exits.depths)
    before, after = (
        adi.generate(loaded(), IDS, adi.Reflex(each, thresholds=0.5), max_new_tokens=16) for each in (exits, again)
    )
    assert [(s.token, s.depth) for s in before.steps] == [(s.token, s.depth) for s in after.steps]
    with pytest.raises(AdiError, match="their layers is 4, the model's 5"):
        again.check(adi.load(network(turns=5)).backbone)


def test_a_trace_shows_the_gate_beside_the_other_signals() -> None:
    found = adi.generate(loaded(), IDS, adi.Reflex(adi.bare_exits(loaded()), thresholds=0.5), max_new_tokens=3, logprobs=1)
    looks = [look for step in found.steps for look in step.looks if look.depth < 4]
    assert {"gate", "entropy"} <= set(looks[0].signals)


def test_halting_is_certified_by_calibration(tmp_path: Path) -> None:
    """Of a text that its own reflex writes; a gate that is high where the answer no longer changes."""
    model = adi.load(network(injection="none", turns=3))
    exits = adi.bare_exits(model)
    prompts = [tuple((i * k + 3 * k + i) % 32 for i in range(6)) for k in range(24)]
    found = adi.calibrate(model, exits, prompts, [0.6], max_new_tokens=8)
    (certificate,) = found.certificates
    assert certificate.trigger.needs == ("gate",)
    assert certificate.observed <= 0.6
    assert certificate.mean_depth < 3
    replace(exits, certificates=found.certificates).save(tmp_path)
    text = adi.generate(model, IDS, adi.Reflex(adi.load_exits(tmp_path), risk=0.6), max_new_tokens=8)
    assert text.certified is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network(injection="none", turns=3).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_the_shell_halts_verifies_and_certifies_a_folder(folder: Path, tmp_path: Path) -> None:
    run = ("run", "--model", folder, "--backend", "hf", "--ids", "1,2,3", "-n", 12, "--json")
    full, verified, reflex = (
        json.loads(adi_(*run, *more).output)
        for more in (("--mode", "full"), ("--draft-tokens", 3), ("--mode", "reflex", "--threshold", 0.5))
    )
    assert verified["token_ids"] == full["token_ids"]
    assert verified["drafted"] > 0
    assert reflex["mean_depth"] < 3
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text("".join(json.dumps({"ids": [k % 32, (3 * k + 1) % 32, 5]}) + "\n" for k in range(30)))
    calibrate = ("calibrate", folder, "--backend", "hf", "--prompts", prompts, "--risk", 0.7, "-n", 6)
    done = adi_(*calibrate, "--out", tmp_path / "halting")
    assert done.exit_code == 0, done.output + done.stderr
    sure = json.loads(adi_(*run, "--exits", tmp_path / "halting", "--mode", "reflex", "--risk", 0.7).output)
    assert "certified" in sure
    missing = adi_("run", "--model", folder, "--backend", "hf", "hello")
    assert missing.exit_code == 2
    assert "has no tokenizer" in missing.output + missing.stderr


def test_ids_are_no_text_to_other_commands(folder: Path, tmp_path: Path) -> None:
    from adi.prompts import read_prompts

    (tmp_path / "ids.jsonl").write_text('{"ids": [1, 2]}\n')
    (item,) = read_prompts(tmp_path / "ids.jsonl")
    assert item.text_or_ids == (1, 2)
    with pytest.raises(AdiError, match=r"token ids \[1, 2\], and a text is needed"):
        _ = item.prompt
    (tmp_path / "both.jsonl").write_text('{"ids": [1, 2], "prompt": "hi"}\n')
    with pytest.raises(AdiError, match="one of them"):
        read_prompts(tmp_path / "both.jsonl")


def test_the_audit_of_a_looped_model_passes(folder: Path) -> None:
    done = adi_("audit", folder, "--backend", "hf", "--limit", 1, "-n", 6, "--draws", 10, "--json", "-")
    report = json.loads(done.stdout)
    assert report["passed"], report["violations"]
    assert {d["depth"] for found in report["engines"][0]["replay"] for d in found["drifts"]} == {1, 2, 3}


def test_the_shipped_model_runs_by_its_name() -> None:
    model = adi.load("products", backend="hf")
    found = adi.generate(model, (1, 4, 6, 2), adi.Reflex(adi.bare_exits(model), thresholds=0.5), max_new_tokens=4)
    assert len(found.token_ids) == 4


def test_a_network_for_puzzles_is_no_language_model() -> None:
    with pytest.raises(ModelError, match="causal=False lets all places see each other"):
        adi.load(network(causal=False, positions="learned", max_position_embeddings=8))
