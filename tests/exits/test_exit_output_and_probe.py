"""The probe: against arithmetic by hand, on disk, as a trigger, and learning what can be learned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adi
from adi.artifact import _digest
from adi.decoding.teacher_forcing import KnownText
from adi.exits.exit_output import ExitOutput
from adi.exits.probe import HEAD_FEATURES, Net, head_features, joint_features, state_features
from adi.exits.signals import HeadRows, Prediction
from adi.model.backbone import States
from adi.training.train_probe import ProbeOptions, fit_probe, gather
from conftest import probed_exits, random_probe

SAID_ROW = Prediction(torch.tensor([[0.5, 0.2, 0.1]]).log(), torch.tensor([1, 2, 3]), torch.tensor([0.2]).log(), 50)


def test_a_network_by_hand() -> None:
    net = Net(*(torch.tensor(v) for v in ([1.0, -2.0], [[1.0, 1.0], [-1.0, 0.0]], [0.5, -0.5], [2.0, 3.0], [0.25])))
    x = [[0.3, 0.4], [-2.0, 0.1]]
    for row, got in zip(x, net.logit(torch.tensor(x)).tolist(), strict=True):
        inner = [max(0.0, row[0] + row[1] + 0.5), max(0.0, -row[0] - 0.5)]
        assert got == pytest.approx(row[0] - 2 * row[1] + 2 * inner[0] + 3 * inner[1] + 0.25)


def test_what_a_head_says_is_the_same_from_torch_and_from_an_engine() -> None:
    want = [math.log(0.5), math.log(0.2), math.log(0.2), 0.5, 0.2, -sum(p * math.log(p) for p in (0.5, 0.2, 0.1, 0.2))]
    assert head_features(SAID_ROW)[0].tolist() == pytest.approx(want, abs=1e-5)
    inside = -sum(p * math.log(p) for p in (0.5, 0.2, 0.1))
    spread = inside + 0.2 * (math.log(50) - math.log(0.2))
    rows = HeadRows(*(torch.tensor([v]) for v in (0, math.log(0.5), math.log(0.2), math.log(0.2), spread)))
    measured = Prediction(SAID_ROW.log_probs_TS, torch.tensor([1, 2, 3]), rows.tail_T, 50, rows)
    assert head_features(measured)[0].tolist() == pytest.approx(want, abs=1e-5)
    whole = head_features(Prediction(torch.tensor([[0.75, 0.25]]).log()))[0]
    assert whole[3].item() == pytest.approx(0.75)
    assert whole[2].item() < -20, "no tail"


def test_the_state_is_asked_before_any_head_has_run() -> None:
    probe, hidden = random_probe(8, (2,)), torch.randn(1, 8)
    asked: list[int] = []

    def predict() -> Prediction:
        asked.append(1)
        return SAID_ROW

    reading = ExitOutput(2, predict, States(hidden, hidden), probe=probe)
    state = reading.signals["state_probe"]
    assert not asked
    assert state == pytest.approx(float(probe.state[2].logit(state_features(hidden)).sigmoid()))
    assert float(state_features(hidden).square().mean()) == pytest.approx(1, abs=1e-4)
    joint = reading.signals["joint_probe"]
    assert asked == [1]
    assert joint == pytest.approx(float(probe.joint[2].logit(joint_features(hidden, SAID_ROW)).sigmoid()))
    assert "state_probe" in list(reading.signals)
    bare = ExitOutput(2, predict, States(hidden, hidden))
    assert "state_probe" not in list(bare.signals)
    with pytest.raises(ValueError, match="reads a probe, and these exits have none"):
        bare.signals["state_probe"]


def test_a_probe_comes_back_from_disk_and_triggers(llama: adi.Model, tmp_path: Path) -> None:
    parts = (adi.Threshold("state_probe", {2: 0.9, 4: 0.0}), adi.Threshold("joint_probe", {2: 0.08, 4: 0.7}))
    rule = adi.AllOf(parts)
    exits = replace(probed_exits(llama, (2, 4)), trigger=rule)
    exits.save(tmp_path)
    again = adi.load_exits(tmp_path)
    assert again.trigger == rule
    assert again.probe is not None
    assert exits.probe is not None
    for name, tensor in exits.probe.tensors().items():
        assert torch.equal(again.probe.tensors()[name], tensor)
    full = adi.generate(llama, [1, 2, 3], adi.FullDepth(), max_new_tokens=24)
    got = adi.generate(llama, [1, 2, 3], adi.Verified(again, rule), max_new_tokens=24, logprobs=2)
    assert got.token_ids == full.token_ids
    assert got.counters.drafted > 0
    looks = [look for step in got.steps for look in step.looks[:-1]]
    assert all({"state_probe", "joint_probe"} <= set(look.signals) for look in looks)
    assert {look.fired for look in looks} == {True, False}, "some rows are believed, some are not"
    assert adi.generate(llama, [1, 2, 3], adi.Reflex(again, trigger=rule), max_new_tokens=24).token_ids


def test_a_trigger_without_its_probe_is_refused(llama: adi.Model) -> None:
    exits = replace(probed_exits(llama, (2, 4)), probe=None)
    for policy in (adi.Verified, adi.Reflex):
        with pytest.raises(ValueError, match=r"'joint_probe'.*reads a probe.*adi triggers"):
            policy(exits, trigger=adi.AnyOf((adi.Threshold("entropy", 1.0), adi.Threshold("joint_probe", 0.5))))


@pytest.mark.parametrize(
    "change",
    [
        {"probe.state.2.skip_F": torch.zeros(5)},
        {"probe.joint.4.bias": torch.full((1,), math.nan)},
        {"probe.joint.4.out_H": torch.zeros(3, dtype=torch.int32)},
        {"probe.state.3.bias": torch.zeros(1)},
        {"probe.state.2.bias": None},
        {"probe.joint.2.in_HF": torch.zeros(2, 32)},
        {"probe.joint.2.out_H": torch.zeros(2, 2)},
    ],
)
def test_a_foreign_probe_is_refused(change: dict[str, Any], llama: adi.Model, tmp_path: Path) -> None:
    probed_exits(llama, (2, 4)).save(tmp_path)
    tensors = {**load_file(tmp_path / "exits.safetensors"), **change}
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "exits.safetensors")
    note = tmp_path / "exits.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "tensors": _digest(tmp_path / "exits.safetensors")}))
    with pytest.raises(ValueError, match="damaged: the probe"):
        adi.load_exits(tmp_path)


def texts_of(model: adi.Model, count: int) -> list[KnownText]:
    given = adi.generate_batch(model, [[i + 1, 2, 3] for i in range(count)], adi.FullDepth(), max_new_tokens=16)
    return [KnownText.of_answer(one.prompt_ids, one.token_ids) for one in given]


def test_rows_are_those_of_one_full_pass(llama: adi.Model) -> None:
    """Against states that transformers shows, and heads asked row by row."""
    exits, texts = probed_exits(llama, (2, 4)), texts_of(llama, 6)
    found = gather(llama.backbone, exits, texts)
    read, at = exits.reader(llama.backbone), 0
    for i, text in enumerate(texts):
        with torch.no_grad():
            hf = llama.backbone.model(torch.tensor([text.ids]), output_hidden_states=True)  # type: ignore[attr-defined]
        tokens = hf.logits[0].argmax(-1).tolist()
        for place in range(text.first, len(text.ids)):
            for depth, rows in found.items():
                state_TD = hf.hidden_states[depth][0, place : place + 1]
                said = read(depth, state_TD)
                assert said.ids_S is not None
                token = int(said.ids_S[said.log_probs_TS[0].argmax()])
                assert bool(rows.right_N[at]) == (token == tokens[place])
                assert rows.head_NF[at].tolist() == pytest.approx(head_features(said)[0].tolist(), abs=1e-3)
                assert bool(rows.choosing_N[at]) == (i % 5 == 0)
            at += 1
    assert at == len(found[2].right_N)


def test_it_learns_what_the_state_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Being right is made to depend on the state through a product, so that a hidden layer is needed to see all of it."""
    from adi.training import train_probe as module

    generator = torch.Generator().manual_seed(0)
    x, said = torch.randn(6000, 6, generator=generator), torch.randn(6000, HEAD_FEATURES, generator=generator)
    right = torch.rand(6000, generator=generator) < (4 * x[:, 0] * x[:, 1] + said[:, 3]).sigmoid()
    rows = module.Examples(x.half(), said, right, torch.arange(6000) % 5 == 0)
    monkeypatch.setattr(module, "gather", lambda *_: {2: rows})
    options = ProbeOptions(hidden=(0, 24), learning_rate=1e-2, epochs=6)
    fake: Any = SimpleNamespace()
    probe, report = fit_probe(fake, fake, [KnownText((1,))] * 10, options)
    told = {net["kind"]: net for net in report["networks"]}
    assert told["state"]["hidden"] == told["joint"]["hidden"] == 24
    assert told["joint"]["loss"] < told["state"]["loss"] < told["state"]["constant_loss"] - 0.05
    both = torch.cat([x, said], 1)
    chance = probe.joint[2].logit(both).sigmoid()
    assert float((chance - (4 * x[:, 0] * x[:, 1] + said[:, 3]).sigmoid()).abs().mean()) < 0.12, "on features as they come"


def test_it_says_no_more_than_the_head_where_the_state_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from adi.training import train_probe as module

    generator = torch.Generator().manual_seed(1)
    x, said = torch.randn(800, 64, generator=generator), torch.randn(800, HEAD_FEATURES, generator=generator)
    right = torch.rand(800, generator=generator) < (2 * said[:, 0]).sigmoid()
    rows = module.Examples(x.half(), said, right, torch.arange(800) % 5 == 0)
    monkeypatch.setattr(module, "gather", lambda *_: {2: rows})
    fake: Any = SimpleNamespace()
    probe, _ = fit_probe(fake, fake, [KnownText((1,))] * 10)
    chance = probe.joint[2].logit(torch.cat([x, said], 1)).sigmoid()
    assert float((chance - (2 * said[:, 0]).sigmoid()).abs().mean()) < 0.1


def test_too_few_texts_are_refused(llama: adi.Model) -> None:
    with pytest.raises(ValueError, match="9 texts are too few"):
        fit_probe(llama.backbone, probed_exits(llama, (2, 4)), texts_of(llama, 9))
