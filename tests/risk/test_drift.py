"""The monitor raises no false alarm more often than it says, finds drift, and its sums are the gambler's."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import adi
from adi.risk.drift import STAKES, DriftMonitor
from support import certificate


def alarms(risk: list[float], runs: int, level: float = 0.1, delta: float = 0.1, seed: int = 0) -> float:
    """Share of runs in which tokens of these risks, one after the other, ever raise the alarm."""
    dice = random.Random(seed)
    found = 0
    for _ in range(runs):
        monitor = DriftMonitor(level, delta)
        found += any(monitor.saw(float(dice.random() < chance)) for chance in risk)
    return found / runs


@pytest.mark.parametrize("risk", [[0.1] * 300, [0.0, 0.2] * 150, [0.0] * 150 + [0.2] * 150])
def test_a_running_risk_at_the_level_raises_no_alarm_too_often(risk: list[float]) -> None:
    """Looked at after every token, 300 times; also where single tokens' risks are twice the level and the average is not."""
    assert alarms(risk, 400) <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 400)


def test_an_error_rate_looked_at_again_and_again_would_be_caught() -> None:
    """The same simulation does notice a bound that is not anytime-valid: the normal one for one look, at every look."""
    dice, found = random.Random(0), 0
    for _ in range(400):
        wrong = 0
        for n in range(1, 301):
            wrong += dice.random() < 0.1
            if n >= 20 and wrong / n - 1.28 * math.sqrt(0.09 / n) > 0.1:
                found += 1
                break
    assert found / 400 > 0.15


def test_drift_is_found() -> None:
    assert alarms([0.4] * 60, 200) > 0.95
    assert alarms([0.25] * 300, 100) > 0.95


def test_how_soon_large_drift_is_found() -> None:
    """As docs/reflex.md says: a rate of one in five at a level of 2%."""
    soon = sorted(_until_found(0.2, 0.02, seed) for seed in range(200))
    assert 11 <= soon[100] <= 15
    assert soon[180] <= 42


def _until_found(rate: float, level: float, seed: int) -> int:
    monitor, dice = DriftMonitor(level), random.Random(seed)
    while not monitor.saw(float(dice.random() < rate)):
        pass
    return monitor.checked


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), max_size=40), st.floats(0.02, 0.9))
def test_evidence_is_the_slow_gamblers(losses: list[float], level: float) -> None:
    monitor = DriftMonitor(level, 1e-12)
    for loss in losses:
        monitor.saw(loss)
    slow = 0.0
    for share in STAKES:
        wealth = 1.0
        for loss in losses:
            wealth *= 1 + share / level * (1 - 1e-6) * (loss - level)
        slow += wealth / len(STAKES)
    assert monitor.evidence(level) == pytest.approx(slow, rel=1e-6)


def test_the_bounds_hold_the_truth_between_them() -> None:
    dice, missed = random.Random(1), 0
    for _ in range(200):
        monitor = DriftMonitor(0.5, 0.1)
        for _ in range(120):
            monitor.saw(float(dice.random() < 0.2))
        assert monitor.lower <= monitor.mean <= monitor.upper
        missed += not monitor.lower <= 0.2 <= monitor.upper
    assert missed / 200 <= 2 * 0.1 + 3 * math.sqrt(0.2 * 0.8 / 200)


def test_memory_is_bounded_and_losses_round_down() -> None:
    monitor = DriftMonitor(0.05)
    for i in range(5000):
        monitor.saw((i % 997) / 997)
    assert len(monitor.counts) <= 101
    assert monitor.mean < sum((i % 997) / 997 for i in range(5000)) / 5000


def test_an_alarm_stays_and_rings_once() -> None:
    monitor = DriftMonitor(0.02, 0.05)
    rung = [monitor.saw(1.0) for _ in range(20)]
    assert rung.count(True) == 1
    for _ in range(10_000):
        assert not monitor.saw(0.0)
    assert monitor.alarmed


def test_dice_are_its_own_and_differ_by_generation() -> None:
    a, b = DriftMonitor(0.1, seed=4), DriftMonitor(0.1, seed=4)
    first = [a.dice().random() for _ in range(3)]
    assert first == [b.dice().random() for _ in range(3)]
    assert len(set(first)) == 3


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        DriftMonitor(0.0)
    with pytest.raises(ValueError, match=r"level of 0.1.*0.02"):
        DriftMonitor(0.1).check(replace(certificate(), level=0.02))
    assert adi.DriftMonitor.of(certificate()).level == certificate().unit_level
    loss = certificate(kind="log_loss", nats=3.0, level=0.06)
    adi.DriftMonitor.of(loss).check(loss)
    with pytest.raises(ValueError, match=r"over disagreement at a level of 0.02, the certificate is of log_loss at 0.02"):
        adi.DriftMonitor.of(certificate()).check(loss)
