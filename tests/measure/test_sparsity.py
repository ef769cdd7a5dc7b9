"""The study of sparsity finds a signal that was planted, none in noise, and resumes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adi.errors import FileError
from adi.exits.signals import active_share, route_jump, route_margin
from adi.measure.statistics import auroc, logistic_weights, weighted_auroc
from adi.measure.trigger_study import sparsity
from adi.measure.trigger_study.sparsity import SparsitySettings, alone, fitted, gain, study_sparsity
from support import adi_

FITS_B = np.arange(200) % 2 == 0


def planted(strength: float) -> dict[str, np.ndarray]:
    """Two turns of rows; the chance of being right falls with entropy, and with a signal by its strength; turn 2 is righter."""
    dice = np.random.default_rng(0)
    entropy, signal = dice.normal(size=(2, 2, 200, 16))
    chance = 1 / (1 + np.exp(1.5 * entropy + strength * signal - np.array([-1.0, 1.0])[:, None, None]))
    return {"entropy": entropy, "signal": signal, "right": dice.random(chance.shape) < chance}


def test_a_planted_signal_adds_to_entropy_and_noise_does_not() -> None:
    found = gain(partial(fitted, planted(1.0), FITS_B), ("entropy",), ("signal",))
    assert found["more"] > 0.03
    assert np.quantile(found["drawn"], 0.025) > 0.02
    assert found["likelihood_ratio"] > 100
    noise = gain(partial(fitted, planted(0.0), FITS_B), ("entropy",), ("signal",))
    assert abs(noise["more"]) < 0.005
    assert noise["likelihood_ratio"] < 25
    assert noise["degrees"] == 6


def test_the_sign_of_a_signal_is_chosen_where_it_is_fitted() -> None:
    rows = planted(1.0)
    low = alone(rows, "signal", FITS_B)
    high = alone({**rows, "signal": -rows["signal"]}, "signal", FITS_B)
    assert (low["high"], high["high"]) == (False, True)
    assert low["auroc"] == pytest.approx(high["auroc"])
    assert low["auroc"] > 0.6


def test_depth_itself_tells_nothing() -> None:
    rows = planted(0.0)
    turn = np.broadcast_to(np.arange(2.0)[:, None, None], rows["right"].shape)
    assert auroc(turn.ravel(), rows["right"].ravel()) > 0.6
    assert alone({**rows, "signal": turn}, "signal", FITS_B)["auroc"] == 0.5


def test_auroc_under_weights_is_that_of_repeated_rows() -> None:
    dice = np.random.default_rng(1)
    score, right, weight = dice.integers(0, 6, 60) / 2, dice.random(60) < 0.4, dice.integers(0, 4, (3, 60))
    won, pairs = weighted_auroc(score, right, weight)
    for n in range(3):
        assert won[n] / pairs[n] == pytest.approx(auroc(np.repeat(score, weight[n]), np.repeat(right, weight[n])))


def test_logistic_regression_finds_the_weights_that_made_its_rows() -> None:
    dice = np.random.default_rng(2)
    x_NF = np.stack([np.ones(20000), *dice.normal(size=(2, 20000))], 1)
    right_N = dice.random(20000) < 1 / (1 + np.exp(-x_NF @ [0.5, 1.0, -2.0]))
    assert logistic_weights(x_NF, right_N) == pytest.approx(np.array([0.5, 1.0, -2.0]), abs=0.1)


def test_signals_of_routes() -> None:
    route_TF = torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert active_share(route_TF).tolist() == [0.5, 0.0]
    assert route_margin(route_TF).tolist() == [1.5, 0.0]
    assert route_jump(route_TF, route_TF).tolist() == [0.0, 0.0]
    p, q = (route_TF[0].softmax(0).tolist(), [0.25] * 4)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    slow = sum(a * np.log(a / m) + b * np.log(b / m) for a, b, m in zip(p, q, middle, strict=True)) / 2
    assert float(route_jump(route_TF, torch.zeros(2, 4))[0]) == pytest.approx(slow, rel=1e-5)


def test_a_study_is_resumed_and_not_mixed_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--steps", 2, "--batch", 2, "--items", 8, "--seeds", "0"]
    made = adi_("study", "sparsity", "--out", tmp_path, "--rules", "price,relu", *sizes, "--json", tmp_path / "r.json")
    assert made.exit_code == 0, made.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert [rule["rule"] for rule in result["rules"]] == ["price", "relu"]
    assert set(result["rules"][0]["gains"]) == set(sparsity.BASES)
    assert 0 < result["rules"][0]["active"] < 1

    def trained(*_: Any) -> None:
        pytest.fail("a finished part was trained again")

    monkeypatch.setattr(sparsity, "train_looped", trained)
    settings = SparsitySettings(rules=("price", "relu"), seeds=(0,), steps=2, batch=2, items=8)
    assert study_sparsity(settings, tmp_path)["rules"] == result["rules"]
    refused = adi_("study", "sparsity", "--out", tmp_path, "--rules", "price", *sizes)
    assert refused.exit_code == 2
    assert "was begun with rules" in refused.output
    (tmp_path / "relu-0.json").write_text("{}")
    with pytest.raises(FileError, match=r"relu-0\.json is damaged: .*rule"):
        study_sparsity(settings, tmp_path)
    assert adi_("study", "sparsity", "--out", tmp_path, "--rules", "best").exit_code == 2
