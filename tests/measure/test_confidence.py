"""Calibration against slow twins: pooled neighbours, softmax by hand, bins by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adi.exits.signals import Prediction
from adi.measure.trigger_study.confidence import TEMPERATURES, auroc, expected_calibration_error, heated, isotonic

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
    found = isotonic(torch.tensor([float(s) for s, _ in rows]), torch.tensor([r for _, r in rows]))
    got = found.of(torch.tensor([float(v) for v in wanted]))
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


@pytest.mark.parametrize("tail", [True, False])
def test_temperature_against_a_softmax_by_hand(tail: bool) -> None:
    ids = torch.tensor([3, 5, 9]) if tail else None
    logs = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.1, 0.1], [0.3, 0.3, 0.2]] if tail else [[0.5, 0.3, 0.2]] * 3)
    logs = torch.log(logs / logs.sum(1, keepdim=True) * (0.8 if tail else 1.0))
    said = Prediction(logs, ids, torch.full((3,), math.log(0.2)) if tail else None, 90)
    tokens, places = (torch.tensor([5, 4, 9]), (1, 3, 2)) if tail else (torch.tensor([1, 0, 2]), (1, 0, 2))
    found = heated(said, tokens)
    for g, heat in enumerate(TEMPERATURES):
        for n, place in enumerate(places):
            logits = [*logs[n].tolist(), *([math.log(0.2)] if tail else [])]
            weights = [math.exp(x / heat) for x in logits]
            assert float(found.surprise_GN[g, n]) == pytest.approx(-math.log(weights[place] / sum(weights)), abs=1e-5)
            assert float(found.top_GN[g, n]) == pytest.approx(max(weights[:3]) / sum(weights), abs=1e-5)
    assert 1.0 in TEMPERATURES


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
