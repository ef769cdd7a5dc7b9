"""From prompts to certificates on a tiny model: levels that hold, levels that cannot, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from msgspec import structs

import adi
from adi.decoding.teacher_forcing import forced_readings
from adi.exits.heads import Heads, fresh_adapter
from adi.exits.triggers import Never, Threshold
from adi.measure.calibration.calibrate import RiskTest, calibrate
from adi.measure.calibration.losses import own_text_losses, replayed_loss
from adi.measure.calibration.risk_path import risk_path, risks_wanted
from support import adi_

PROMPTS = [f"the fox number {i} jumps over dog {i * 7 % 13}" for i in range(40)]


@pytest.fixture(scope="module")
def exits(tiny_model: adi.Model) -> adi.Exits:
    """Heads that are the model's own, so that depth 5 of 6 is often right."""
    spec, readout = tiny_model.backbone.spec, tiny_model.backbone.readout()
    adapters = {depth: fresh_adapter(readout, 4, torch.Generator().manual_seed(0)) for depth in (3, 5)}
    base = (spec.fingerprint, spec.name, spec.layers, spec.width, spec.vocabulary)
    return adi.Exits(*base, (3, 5), adi.Threshold("entropy", 1.0), Heads(torch.arange(spec.vocabulary), adapters))


def test_a_level_is_certified_and_its_thresholds_do_what_it_says(tiny_model: adi.Model, exits: adi.Exits) -> None:
    """Bold levels, so that so few prompts suffice; the observed risk is that of the calibration prompts."""
    result = calibrate(tiny_model, exits, PROMPTS, [0.6, 0.2], max_new_tokens=4)
    assert [c.level for c in result.certificates] == [0.2, 0.6]
    for c in result.certificates:
        assert (c.sequences, c.precision, c.fingerprint) == (32, "fp32", tiny_model.backbone.spec.fingerprint)
        assert c.observed <= c.level
    bold = result.certificates[1]
    assert isinstance(bold.trigger, Threshold)
    assert bold.mean_depth < 6
    assert bold.observed == pytest.approx(mean(s.disagreement for s in _samples(result, bold)))


def _samples(result: adi.Calibration, c: adi.Certificate) -> Any:
    return next(t.own_text for t in result.tested if t.trigger == c.trigger)


def test_what_cannot_be_certified_says_how_many_prompts_it_takes(tiny_model: adi.Model, exits: adi.Exits) -> None:
    result = calibrate(tiny_model, exits, PROMPTS[:15], [0.001], max_new_tokens=4)
    (c,) = result.certificates
    assert isinstance(c.trigger, Never)
    assert (c.observed, c.mean_depth) == (0.0, 6.0)
    assert "with 12 calibration prompts no rule could pass" in result.notes[0]
    assert "at least 2995 are needed" in result.notes[0]
    never = adi.generate(tiny_model, "hello", adi.Reflex(_with(exits, c), risk=0.001), max_new_tokens=6)
    assert never.token_ids == adi.generate(tiny_model, "hello", adi.FullDepth(), max_new_tokens=6).token_ids


def _with(exits: adi.Exits, c: adi.Certificate) -> adi.Exits:
    return replace(exits, certificates=(c,))


@pytest.mark.parametrize(("kind", "method"), [("log_loss", "ltt"), ("disagreement", "crc"), ("log_loss", "crc")])
def test_every_kind_and_method_gives_a_certificate(tiny_model: adi.Model, exits: adi.Exits, kind: str, method: str) -> None:
    result = calibrate(tiny_model, exits, PROMPTS[:15], [0.5], kind=kind, method=method, max_new_tokens=3)
    (c,) = result.certificates
    assert (c.kind, c.method, c.delta) == (kind, method, None if method == "crc" else 0.05)
    assert c.observed <= 0.5


def test_what_cannot_be_meant_is_refused(tiny_model: adi.Model, exits: adi.Exits) -> None:
    for options, words in (
        ({"levels": [0.0]}, "between 0 and 1"),
        ({"levels": []}, "at least one"),
        ({"levels": [3.5], "kind": "log_loss"}, "nats per token"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"kind": "harm"}, "choose kind among disagreement"),
        ({"method": "hope"}, "ltt, crc"),
    ):
        given: dict[str, Any] = {"levels": [0.1], **options}
        with pytest.raises(ValueError, match=words):
            calibrate(tiny_model, exits, PROMPTS, **given)
    with pytest.raises(ValueError, match="3 different prompts are too few"):
        calibrate(tiny_model, exits, PROMPTS[:3], [0.1])


def test_the_path_goes_from_safe_to_bold_and_counts_as_replays_do(tiny_model: adi.Model, exits: adi.Exits) -> None:
    texts = [adi.generate(tiny_model, p, adi.FullDepth(), max_new_tokens=8) for p in PROMPTS[:12]]
    readings = forced_readings(tiny_model.backbone, exits, [(g.prompt_ids, g.token_ids) for g in texts])
    rules = risk_path(readings, exits.depths, 6, [0.05, 0.8], "disagreement")
    assert rules
    assert [r.cost for r in rules] == sorted((r.cost for r in rules), reverse=True)
    for rule in rules:
        samples = [replayed_loss(r, exits.depths, 6, rule.trigger) for r in readings]
        tokens = sum(s.tokens for s in samples)
        assert rule.risk == pytest.approx(sum(s.disagreement * s.tokens for s in samples) / tokens)
        assert rule.depth == pytest.approx(sum(s.depth * s.tokens for s in samples) / tokens)
    assert own_text_losses(tiny_model, exits, readings, rules[-1].trigger, 8)


def test_risks_wanted_reach_from_a_quarter_of_the_lowest_to_near_the_highest() -> None:
    wanted = risks_wanted([0.02, 0.1])
    assert (wanted[0], wanted[-1]) == pytest.approx((0.005, 0.075))
    assert wanted == sorted(wanted)


def test_testing_stops_where_the_boldest_level_fails(tiny_model: adi.Model, exits: adi.Exits) -> None:
    result = calibrate(tiny_model, exits, PROMPTS, [0.3], max_new_tokens=4)
    test = RiskTest("disagreement", "ltt", 0.05)
    place = test.boldest(result.tested, 0.3)
    assert place is None or place >= len(result.tested) - 2
    assert test.losses(result.tested).shape == (len(result.tested), 32)


def test_a_prompt_that_is_given_again_counts_once(tiny_model: adi.Model, exits: adi.Exits) -> None:
    once = calibrate(tiny_model, exits, PROMPTS[:20], [0.6], max_new_tokens=3)
    twice = calibrate(tiny_model, exits, [*PROMPTS[:20], *PROMPTS[:20]], [0.6], max_new_tokens=3)
    assert twice.certificates == once.certificates
    assert "20 prompts were given more than once, and count once." in twice.notes
    with pytest.raises(ValueError, match="5 different prompts are too few"):
        calibrate(tiny_model, exits, PROMPTS[:5] * 4, [0.6])


def test_a_folder_keeps_what_it_has_and_refuses_another_precision(tiny_folder: Path, exits: adi.Exits, tmp_path: Path) -> None:
    exits.save(tmp_path / "exits")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS[:20]))
    args = ["--exits", tmp_path / "exits", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", "-n", 2]
    for risk in (0.6, 0.5):
        done = adi_("calibrate", tiny_folder, *args, "--risk", risk)
        assert done.exit_code == 0, done.output
    there = adi.load_exits(tmp_path / "out")
    assert [c.level for c in there.certificates] == [0.5, 0.6]
    replace(there, certificates=tuple(structs.replace(c, precision="int4") for c in there.certificates)).save(tmp_path / "out")
    done = adi_("calibrate", tiny_folder, *args, "--risk", 0.6)
    assert done.exit_code == 2
    assert "holds certificates for int4" in " ".join(done.output.split())
    assert {c.precision for c in adi.load_exits(tmp_path / "out").certificates} == {"int4"}


def test_the_command_saves_certificates_that_run(tiny_folder: Path, exits: adi.Exits, tmp_path: Path) -> None:
    exits.save(tmp_path / "exits")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS[:20]))
    args = ["--exits", tmp_path / "exits", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", "-n", 3]
    done = adi_("calibrate", tiny_folder, *args, "--risk", 0.6, "--risk", 0.001, "--json", tmp_path / "c.json")
    assert done.exit_code == 0, done.output
    assert "no exit could be certified" in " ".join(done.output.split())
    assert [c["level"] for c in json.loads((tmp_path / "c.json").read_text())["certificates"]] == [0.001, 0.6]
    assert [c.level for c in adi.load_exits(tmp_path / "out").certificates] == [0.001, 0.6]
    run = ["run", "hello fox", "--model", tiny_folder, "--exits", tmp_path / "out", "--mode", "reflex", "-n", 6]
    done = adi_(*run, "--risk", 0.6, "--spot-check", 0.5)
    assert done.exit_code == 0, done.output
    assert "certified: tokens that differ" in done.stdout
    assert "spot checks:" in done.stdout
    document = json.loads(adi_(*run, "--risk", 0.6, "--spot-check", 0.5, "--json").stdout)
    assert document["calibrated"]
    assert document["drift"]["level"] == 0.6
    for wrong, words in (
        (["--risk", 0.5], "never certified"),
        (["--threshold", 1, "--spot-check", 0.1], "watches over a certificate"),
    ):
        done = adi_(*run, *wrong)
        assert done.exit_code == 2
        assert words in " ".join(done.output.split())
