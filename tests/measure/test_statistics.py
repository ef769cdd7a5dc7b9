"""Statistics of scores against slow twins, and intervals that cover what they should as often as they state."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adi.measure.statistics import auroc, clustered_median, expected_calibration_error, isotonic_curve

ROWS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


def pooled(rows: list[tuple[int, bool]]) -> dict[int, float]:
    """Pool adjacent violators, the slow way: merge neighbours until the shares rise."""
    groups = [[[v], [r for s, r in rows if s == v]] for v in sorted({s for s, _ in rows})]
    share = lambda group: sum(group[1]) / len(group[1])  # noqa: E731
    while wrong := [i for i in range(len(groups) - 1) if share(groups[i]) > share(groups[i + 1])]:
        i = wrong[0]
        groups[i : i + 2] = [[groups[i][0] + groups[i + 1][0], groups[i][1] + groups[i + 1][1]]]
    return {value: share(group) for group in groups for value in group[0]}


@given(ROWS)
def test_isotonic_regression_pools_neighbours(rows: list[tuple[int, bool]]) -> None:
    wanted = pooled(rows)
    found = isotonic_curve(torch.tensor([float(s) for s, _ in rows]), torch.tensor([r for _, r in rows]))
    got = found.chance(torch.tensor([float(v) for v in wanted]))
    assert got.tolist() == pytest.approx(list(wanted.values()))
    for chance in (0.0, 0.3, 0.5, 1.0):
        enough = [value for value, share in wanted.items() if share >= chance - 1e-12]
        least = found.least(chance - 1e-12)
        assert least == (min(enough) if enough else None)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[int, bool]]) -> None:
    good, bad = [s for s, right in rows if right], [s for s, right in rows if not right]
    got = auroc(torch.tensor([float(s) for s, _ in rows]), torch.tensor([right for _, right in rows]))
    if not good or not bad:
        assert got is None
    else:
        pairs = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
        assert got == pytest.approx(pairs / (len(good) * len(bad)))


def test_calibration_error_of_known_cases() -> None:
    right = torch.tensor([True, False, True, False])
    assert expected_calibration_error(torch.full((4,), 0.5), right) == 0
    assert expected_calibration_error(torch.full((4,), 0.9), right) == pytest.approx(0.4)
    assert expected_calibration_error(torch.tensor([1.0, 0.0, 1.0, 0.0]), right) == 0


def test_calibration_error_of_a_liar_and_of_an_honest_one() -> None:
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(20_000, generator=generator)
    honest = torch.rand(20_000, generator=generator) < chance
    assert expected_calibration_error(chance, honest) < 0.02
    assert expected_calibration_error(torch.full((100,), 0.9), torch.zeros(100, dtype=torch.bool)) == pytest.approx(0.9)


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    dice, covered = random.Random(0), 0
    for trial in range(200):
        found = clustered_median([[dice.gauss(3, 1) for _ in range(40)]], seed=trial, resamples=400)
        assert found.low <= found.median <= found.high
        covered += found.low <= 3 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_repeats_and_needs_values() -> None:
    assert clustered_median([[1.0, 2.0, 5.0]]) == clustered_median([[1.0, 2.0, 5.0]])
    assert clustered_median([[2.0]]).low == 2.0
    with pytest.raises(ValueError, match="at least one"):
        clustered_median([])


def test_the_interval_counts_the_luck_of_a_process() -> None:
    """Groups that share an error: resampling values alone says far too little, resampling groups nearly enough."""
    dice = random.Random(0)
    covered = {"values": 0, "groups": 0}
    for trial in range(200):
        groups = []
        for _ in range(10):
            luck = dice.gauss(3, 1)
            groups.append([dice.gauss(luck, 0.2) for _ in range(8)])
        plain = clustered_median([[v for group in groups for v in group]], seed=trial, resamples=200)
        found = clustered_median(groups, seed=trial, resamples=200)
        assert found.low <= found.median == plain.median <= found.high
        covered["values"] += plain.low <= 3 <= plain.high
        covered["groups"] += found.low <= 3 <= found.high
    assert covered["values"] / 200 < 0.75
    assert covered["groups"] / 200 > 0.85
