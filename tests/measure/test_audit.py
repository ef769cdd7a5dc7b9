"""The audit on a tiny model: it passes, and it fails where the engine, the rule or the rollback is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import adi
from adi.cli.app import app
from adi.decoding.drafting.cost_model import CostModel
from adi.decoding.frontier import Frontier
from adi.decoding.sampler import Sampler
from adi.measure.audit.faults import Scripted, drive
from adi.measure.audit.match import divergence
from adi.measure.audit.replay import StateDrift, replay
from adi.measure.audit.run import audit_page
from adi.measure.audit.sampling import Law
from adi.model.backbone import States
from adi.model.hf import HfBackbone
from adi.model.hf.kv_cache import GrowingLayer
from conftest import random_exits
from families import VOCABULARY

PROMPTS = [[1, 2, 3], [(7 * i) % VOCABULARY for i in range(20)]]


@pytest.fixture(autouse=True)
def _known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adi.decoding.policies.cost_model_of", lambda *_: CostModel({1: 26.0, 4: 28.0, 16: 40.0}, 0.5))


def small(model: adi.Model, **options: Any) -> dict[str, Any]:
    exits = adi.bare_exits(model, (2, 4))
    return adi.audit(model, exits, **{"prompts": PROMPTS[:1], "max_new_tokens": 10, "draws": 16, **options})


def test_it_passes_and_says_what_it_tried(llama: adi.Model) -> None:
    report = small(llama, prompts=PROMPTS)
    assert report["passed"], report["violations"]
    (engine,) = report["engines"]
    assert {d["of"] for found in engine["replay"] for d in found["drifts"]} == {"states", "memory", "logits"}
    assert {d["depth"] for d in engine["replay"][0]["drifts"]} == {2, 4, 6}
    assert {int(n) for found in engine["replay"] for n in found["rollbacks"]} >= {0, 1, 2, 3}
    assert all(t["divergences"] == [] for t in (*engine["greedy"], *engine["faults"]))
    assert [t["name"] for t in engine["faults"]] == ["random rejections", "rollbacks to every length", "interruptions"]
    for tally in engine["faults"][:2]:
        assert 0 < tally["accepted"] < tally["drafted"]
    assert [d["drafts"] for d in engine["sampling"]] == ["full depth", "as the exits are", "always at depth 4", "script"]
    assert all(d["foreseen"] + d["near"] == d["draws"] == 16 for d in engine["sampling"])
    assert 0 < engine["sampling"][-1]["accepted"] < engine["sampling"][-1]["drafted"]
    assert json.loads(json.dumps(report)) == report


def test_trained_exits_and_every_way_to_name_them(llama: adi.Model, tmp_path: Path) -> None:
    exits = random_exits(llama, (2, 4), adi.Threshold("entropy", 9.0))
    exits.save(tmp_path / "exits")
    for given in (str(tmp_path / "exits"), lambda _: exits, None):
        assert adi.audit(llama, given, prompts=PROMPTS[:1], max_new_tokens=6, draws=4)["passed"]


def _tail(rollback: Callable[..., None]) -> Callable[..., None]:
    return lambda self, length: rollback(self, min(length + 1, self.length))


def _gullible(call: Callable[..., int]) -> Callable[..., int]:
    def stands(self: Any, text: Sequence[int], reading: Any, draft: Any = None) -> int:
        token = call(self, text, reading, draft)
        return token if draft is None else draft.token  # type: ignore[no-any-return]

    return stands


def _beside(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An engine whose rows depend on their company."""
    return _changed(forward, lambda rows, hidden_TD: hidden_TD + (0.05 if len(rows.ids) > 1 and rows.start > 8 else 0.0))


def _noisy(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An engine that never gives the same, drafts or none."""
    dice = torch.Generator().manual_seed(0)
    return _changed(
        forward, lambda rows, x_TD: x_TD + 0.5 * torch.randn(x_TD.shape, generator=dice) * (1.0 if rows.start else 0.0)
    )


def _no_number(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An engine that gives NaN for several rows in mid-text."""
    return _changed(forward, lambda rows, x_TD: x_TD * (float("nan") if len(rows.ids) > 2 and rows.start > 8 else 1.0))


def _changed(forward: Callable[..., Any], change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def wrong(self: Any, rows: Any, lo: int, hi: int, **options: Any) -> Any:
        states = forward(self, rows, lo, hi, **options)
        return [States(change(r, s.hidden_TD), s.before_TD, s.mlp_TF) for s, r in zip(states, rows, strict=True)]

    return wrong


def _stale(update: Callable[..., Any]) -> Callable[..., Any]:
    """KV memory that keeps the key of the first position that was rolled back."""

    def wrong(self: Any, *new: Any, **options: Any) -> Any:
        at, most = self.length, getattr(self, "most", 0)
        old = self.keys[..., at : at + 1, :].clone() if at < most else None
        found = update(self, *new, **options)
        if old is not None:
            self.keys[..., at : at + 1, :] = old
        self.most = max(most, self.length)
        return found

    return wrong


OFF = r"replay of prompt 0: {} at depth \d are off by \S+, "
PARTS, ODD = "{}: prompt 0 diverges from full depth", "not those of their seeds"
SABOTAGE: dict[str, tuple[Any, str, Callable[[Any], Any], tuple[str, ...]]] = {
    "rollback is off by one": (
        *(Frontier, "rollback", _tail),
        (OFF.format("states"), PARTS.format("always at depth 4"), PARTS.format("rollbacks to every length"), ODD),
    ),
    "every sampled draft stands": (Sampler, "__call__", _gullible, (ODD,)),
    "rows beside others are wrong": (HfBackbone, "forward", _beside, (OFF.format("states"),)),
    "what was rolled back stays in memory": (GrowingLayer, "update", _stale, (OFF.format("memory"), OFF.format("logits"))),
    "the engine is never the same": (HfBackbone, "forward", _noisy, ("of their size without any drafts",)),
    "several rows give no number": (HfBackbone, "forward", _no_number, ("hold no distribution: the largest is nan",)),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_sabotage_is_a_violation(what: str, llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name, wrong, words = SABOTAGE[what]
    monkeypatch.setattr(home, name, wrong(getattr(home, name)))
    report = small(llama)
    assert not report["passed"]
    for each in words:
        assert any(re.search(each, text) for text in report["violations"]), (each, report["violations"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert audit_page(report)


def test_the_compiled_engine_passes_in_few_bits(tiny_folder: Path) -> None:
    pytest.importorskip("openvino")
    report = adi.audit(str(tiny_folder), None, backend="openvino", precisions=("int8",), limit=1, max_new_tokens=8, draws=8)
    assert report["passed"], report["violations"]
    (engine,) = report["engines"]
    assert (engine["backend"], engine["precision"], engine["row_invariant"]) == ("openvino", "int8", True)
    assert {d["of"] for found in engine["replay"] for d in found["drifts"]} >= {"states", "logits"}
    assert max(d["drafted"] for found in engine["replay"] for d in found["drifts"]) == 0


def test_greedy_drafts_that_always_stand_are_a_violation(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "adi.decoding.session.likeliest", lambda text, reading, draft=None: draft.token if draft else reading.token
    )
    violations = small(llama)["violations"]
    for check in ("always at depth 4", "random rejections", "rollbacks to every length"):
        assert any(f"{check}: prompt 0 diverges from full depth" in text for text in violations)


def test_a_biased_stop_rule_is_a_violation(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the token that is about to stand, and has another one drawn where it dislikes it."""
    call = Sampler.__call__

    def peeking(self: Any, text: Sequence[int], reading: Any, draft: Any = None) -> int:
        token = call(self, text, reading, draft)
        return call(self, text, reading) if draft is not None and token == draft.token else token

    monkeypatch.setattr(Sampler, "__call__", peeking)
    assert any("not those of their seeds" in text for text in small(llama)["violations"])


def test_the_law_is_that_of_transformers(llama: adi.Model) -> None:
    law, network = Law(llama, [1, 2, 3]), llama.backbone.model  # type: ignore[attr-defined]
    joint = law.joint(2)
    assert sum(joint.values()) == pytest.approx(1)
    for (a, b), chance in list(joint.items())[:5]:
        with torch.no_grad():
            one, two = (network(torch.tensor([[1, 2, 3, *given]])).logits[0, -1] for given in ((), (a,)))
        p, q = (torch.where(x >= x.topk(4).values[-1], x, -torch.inf).div(1.3).softmax(-1) for x in (one, two))
        assert chance == pytest.approx(float(p[a] * q[b]), rel=1e-4)


def test_scripted_drafts_are_right_as_often_as_the_script_says(llama: adi.Model) -> None:
    text = adi.generate(llama, [1, 2, 3], adi.FullDepth(), max_new_tokens=13, stop_at_eos=False).token_ids
    known = (1, 2, 3, *text)
    for right in range(4):
        exits = adi.bare_exits(llama, (2, 4))
        script = Scripted(lambda text: known[len(text)], lambda most, n=right: min(n, most), exits, 3, right)
        steps = drive(adi.Session(llama, [1, 2, 3], script, max_new_tokens=13, stop_at_eos=False))
        assert tuple(s.token for s in steps) == text
        first = [s for s in steps if s.round == 2]
        assert [s.drafted for s in first] == [True] * right + [False]
        assert len(first[-1].rejected) == 3 - right


def test_a_tie_explains_only_what_it_can(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    full = adi.generate(llama, [1, 2], adi.FullDepth(), max_new_tokens=6, stop_at_eos=False).token_ids
    assert divergence(llama, 0, [1, 2], full, full, 0.0) is None
    other = (*full[:3], (full[3] + 1) % VOCABULARY, *full[4:])
    found = divergence(llama, 0, [1, 2], full, other, 1e-6)
    assert found is not None
    assert (found.at, found.full, found.got, found.explained) == (3, full[3], other[3], False)
    assert found.gap >= found.margin > 0
    wide = divergence(llama, 0, [1, 2], full, other, found.gap)
    assert wide is not None
    assert wide.explained
    monkeypatch.setattr(llama.backbone, "spec", replace(llama.backbone.spec, row_invariant=True))
    sure = divergence(llama, 0, [1, 2], full, other, found.gap)
    assert sure is not None
    assert not sure.explained, "an engine whose rows do not depend on each other has no excuse"
    short = divergence(llama, 0, [1, 2], full, full[:4], 99.0)
    assert short is not None
    assert (short.at, short.explained) == (4, False)


def test_differences_that_are_no_numbers_are_not_within() -> None:
    assert StateDrift("states", 2, 3.9e-3, 1e-3, 1.0).within
    assert not StateDrift("states", 2, 4.1e-3, 1e-3, 1.0).within
    assert not StateDrift("states", 2, float("nan"), 1e-3, 1.0).within


def test_states_that_are_no_numbers_are_seen(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = HfBackbone.logits
    monkeypatch.setattr(HfBackbone, "forward", _no_number(HfBackbone.forward))
    monkeypatch.setattr(HfBackbone, "logits", lambda self, x_TD: logits(self, x_TD.nan_to_num()))
    found = replay(llama.backbone, list(range(1, 30)), 5, (2, 4), 0)
    assert any(not d.within and d.drafted != d.drafted for d in found.drifts if d.of == "states")


def test_memory_is_read(llama: adi.Model) -> None:
    found = replay(llama.backbone, list(range(1, 30)), 5, (2, 4), 0)
    assert [d.of for d in found.drifts].count("memory") == 3
    assert all(d.size > 0 for d in found.drifts)


@pytest.mark.parametrize("bad", [{"limit": 0}, {"draws": 0}, {"max_new_tokens": 0}, {"precisions": ()}, {"prompts": []}])
def test_what_cannot_be_meant_is_refused(bad: dict[str, Any], llama: adi.Model) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        small(llama, **bad)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)


def test_the_command_writes_both_reports_and_says_1_on_a_violation(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, size = [str(tiny_folder), "--backend", "hf", "--exits", "bare:2,4"], ["--limit", "1", "-n", "8", "--draws", "10"]
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    done = CliRunner().invoke(app, ["audit", *where, *size, *files])
    assert done.exit_code == 0, done.output
    assert "passed: verified is full depth" in done.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["passed"]
    assert "passed" in (tmp_path / "a.html").read_text()
    monkeypatch.setattr(Frontier, "rollback", _tail(Frontier.rollback))
    bad = CliRunner().invoke(app, ["audit", *where, *size, "--json", "-"])
    assert bad.exit_code == 1, bad.output
    assert json.loads(bad.stdout)["violations"]
    assert CliRunner().invoke(app, ["audit", *where, "--draws", "0"]).exit_code == 2
    report["model"], report["violations"] = "<script>alert(1)</script>", ["<img src=x>"]
    found = Tags()
    found.feed(audit_page(report))
    assert not found.tags & {"script", "img"}
