"""Certificates go to JSON and back, are found by their exact level, and refuse another model or precision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

import adi
from adi.risk.certificate import Certificate, find, merged
from conftest import random_exits
from support import certificate


def test_it_comes_back_from_json() -> None:
    for one in (certificate(), certificate(method="crc", delta=None), certificate(kind="log_loss", nats=3.0, level=0.06)):
        assert Certificate.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert certificate(kind="log_loss", nats=3.0, level=0.06).unit_level == pytest.approx(0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "hope"},
        {"kind": "risk"},
        {"level": "0.02"},
        {"level": float("nan")},
        {"delta": None},
        {"sequences": 0},
        {"nats": 3.0},
        {"fingerprint": None},
        {"skipped": "guess"},
        {"trigger": {"kind": "hope"}},
        {"more": 1},
    ],
)
def test_damage_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"certificate|trigger"):
        Certificate.from_json({**certificate().to_json(), **changes})


def test_only_a_certified_level_is_found() -> None:
    there = [certificate(), certificate(level=0.05)]
    assert find(there, "disagreement", 0.05).level == 0.05
    with pytest.raises(ValueError, match=r"0.03 was never certified.*0.02, disagreement 0.05.*adi calibrate"):
        find(there, "disagreement", 0.03)
    with pytest.raises(ValueError, match=r"log_loss 0.02 was never certified.* --kind log_loss --risk 0.02 .*--out DIR"):
        find(there, "log_loss", 0.02)
    with pytest.raises(ValueError, match="choose one of disagreement, log_loss"):
        find(there, "harm", 0.02)
    with pytest.raises(ValueError, match="certified for exact keys and values, not for skipped='propagate'"):
        find(there, "disagreement", 0.02, "propagate")


def test_a_new_certificate_takes_the_place_of_the_old() -> None:
    both = merged([certificate(), certificate(level=0.1)], [certificate(observed=0.001)])
    assert [(c.level, c.observed) for c in both] == [(0.02, 0.001), (0.1, 0.012)]
    with pytest.raises(ValueError, match=r"these would be for fp32, int8"):
        merged([certificate(precision="int8")], [certificate(precision="fp32")])


@pytest.fixture
def certified(llama: adi.Model) -> adi.Exits:
    mine = certificate(fingerprint=llama.backbone.spec.fingerprint)
    return replace(random_exits(llama, (2, 4), adi.Never()), certificates=(mine,))


def test_it_is_saved_with_the_exits_and_old_files_still_load(certified: adi.Exits, tmp_path: Path) -> None:
    certified.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "exits.json").read_text())["format"] == 3
    assert adi.load_exits(tmp_path / "new").certificates == certified.certificates
    replace(certified, certificates=()).save(tmp_path / "old")
    assert json.loads((tmp_path / "old" / "exits.json").read_text())["format"] == 2
    assert adi.load_exits(tmp_path / "old").certificates == ()


def test_reflex_takes_its_thresholds_and_says_so(llama: adi.Model, certified: adi.Exits) -> None:
    policy = adi.Reflex(certified, risk=0.02)
    said = adi.generate(llama, [1, 2, 3], policy, max_new_tokens=8)
    assert (
        said.token_ids
        == adi.generate(llama, [1, 2, 3], adi.Reflex(certified, trigger=certificate().trigger), max_new_tokens=8).token_ids
    )
    assert said.summary().calibrated
    assert said.certified is not None
    assert "at most 2.0%, confidence 95%, 400 calibration prompts" in said.certified
    with pytest.raises(ValueError, match="never certified"):
        adi.Reflex(certified, risk=0.01)
    with pytest.raises(ValueError, match="one of risk"):
        adi.Reflex(certified, risk=0.02, thresholds=0.5)


@pytest.mark.parametrize(("field", "words"), [("fingerprint", "holds for the weights x"), ("precision", "the precision x")])
def test_another_model_or_precision_is_refused(llama: adi.Model, certified: adi.Exits, field: str, words: str) -> None:
    (mine,) = certified.certificates
    other = replace(certified, certificates=(structs.replace(mine, **{field: "x"}),))
    with pytest.raises(ValueError, match=words):
        adi.generate(llama, [1, 2, 3], adi.Reflex(other, risk=0.02), max_new_tokens=8)
