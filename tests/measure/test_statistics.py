"""Statistics of scores against slow twins: pooled neighbours, pairs counted one by one, bins by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adi.measure.statistics import auroc, expected_calibration_error, isotonic_curve

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
