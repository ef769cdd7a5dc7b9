"""The bounds hold where they say so, on losses made to hurt, and know a small variance from a large one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adi.risk.bounds import betting, conformal, learn_then_test, sequences_needed

LEVEL, DELTA = 0.1, 0.1


@pytest.mark.parametrize("shape", ["all or nothing", "many small", "one in ten is half wrong"])
def test_a_false_rule_is_accepted_no_more_often_than_delta(shape: str) -> None:
    """Losses of mean exactly the level: the p-value is below delta in at most delta of 2,000 draws, up to 3 sigma."""
    dice = np.random.default_rng(7)
    draws, size = 2000, 80
    drawn = {
        "all or nothing": (dice.random((draws, size)) < LEVEL).astype(float),
        "many small": dice.beta(1, 9, (draws, size)),
        "one in ten is half wrong": 0.5 * (dice.random((draws, size)) < 2 * LEVEL),
    }[shape]
    accepted = float(np.mean([betting(row, LEVEL) <= DELTA for row in drawn]))
    assert accepted <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / draws), accepted


def test_without_the_logarithm_of_losses_it_would_be_caught() -> None:
    """The same simulation does notice a bound that is none: the mean itself."""
    dice = np.random.default_rng(7)
    drawn = (dice.random((2000, 80)) < LEVEL).astype(float)
    assert np.mean([row.mean() <= LEVEL for row in drawn]) > 0.4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.9))
def test_betting_is_the_slow_gambler(losses: list[float], level: float) -> None:
    wealth, most, total, spread = 1.0, 1.0, 0.5, 0.25
    variance = 0.25
    for i, loss in enumerate(losses, 1):
        stake = min(1.0, math.sqrt(2 * math.log(1 / 0.05) / (len(losses) * variance)))
        wealth *= 1 + stake * (level - loss)
        most = max(most, wealth)
        total += loss
        spread += (loss - total / (1 + i)) ** 2
        variance = spread / (1 + i)
    assert betting(np.array(losses), level) == pytest.approx(1 / most, rel=1e-9)


def test_betting_sees_a_small_variance() -> None:
    """Hoeffding's bound, which does not, is exp(-2 * 400 * 0.02 ** 2), about 0.73."""
    assert betting(np.full(400, 0.03), 0.05) < 0.01


@pytest.mark.parametrize("level", [0.005, 0.02, 0.1])
def test_fewer_than_needed_never_suffice(level: float) -> None:
    needed = sequences_needed(level, 0.05)
    assert betting(np.zeros(needed - 1), level) > 0.05
    assert betting(np.zeros(2 * needed), level) < 0.05


def test_fixed_sequence_testing_stops_at_the_first_failure() -> None:
    good, bad = np.zeros(200), np.full(200, 0.5)
    assert learn_then_test(np.stack([good, good, bad, good]), 0.1, 0.05) == 1
    assert learn_then_test(np.stack([bad, good]), 0.1, 0.05) is None


def test_the_family_of_rules_errs_no_more_often_than_delta() -> None:
    """Ten rules whose risk grows past the level: the chosen one is above it in at most delta of 1,000 calibrations."""
    dice = np.random.default_rng(3)
    means = np.linspace(0.02, 0.2, 10)
    wrong = 0
    for _ in range(1000):
        losses = (dice.random((10, 150)) < means[:, None]).astype(float)
        place = learn_then_test(losses, LEVEL, DELTA)
        wrong += place is not None and means[place] > LEVEL
    assert wrong / 1000 <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 1000)


def test_conformal_risk_is_the_level_on_average() -> None:
    """The next sequence's loss at the rule chosen, over 3,000 calibrations: on average at most the level."""
    dice = np.random.default_rng(5)
    grid = np.linspace(0.01, 0.4, 30)[:, None]
    found = []
    for _ in range(3000):
        hard = dice.random(61)
        losses = np.clip(grid * 2 * hard, 0, 1)
        place = conformal(losses[:, :60], LEVEL)
        found.append(0.0 if place is None else losses[place, 60])
    assert np.mean(found) <= LEVEL + 3 * np.std(found) / math.sqrt(3000)
    assert np.mean(found) > LEVEL - 0.03


def test_conformal_lets_losses_only_rise() -> None:
    losses = np.array([[0.2] * 50, [0.0] * 50])
    assert conformal(losses, 0.1) is None, "the bolder rule may not undo what the safer one lost"
