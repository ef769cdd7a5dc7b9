"""Signals against slow, obvious twins, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adi.exits.signals import (
    SIGNALS,
    Prediction,
    entropy,
    hoyer,
    margin,
    require_signal,
    stability,
    top_energy,
    top_probability,
)

LOGITS = st.lists(st.floats(-30, 30), min_size=2, max_size=12)


def full(logits: list[float]) -> Prediction:
    return Prediction(torch.tensor([logits], dtype=torch.float64).log_softmax(-1))


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


@given(LOGITS)
def test_head_signals_match_their_definitions(logits: list[float]) -> None:
    p = sorted(probabilities(logits), reverse=True)
    said = full(logits)
    assert float(entropy(said)) == pytest.approx(-sum(x * math.log(x) for x in p if x > 0), abs=1e-9)
    assert float(top_probability(said)) == pytest.approx(p[0])
    assert float(margin(said)) == pytest.approx(p[0] - p[1], abs=1e-12)


@given(LOGITS, st.integers(1, 5))
def test_entropy_of_a_shortlist_bounds_the_true_one_from_above(logits: list[float], outside: int) -> None:
    outside = min(outside, len(logits) - 1)
    p = torch.tensor(probabilities(logits), dtype=torch.float64)
    inside, tail = p[:-outside], p[-outside:].sum()
    said = Prediction(inside.log()[None], torch.arange(len(inside)), tail.log()[None], outside)
    assert float(entropy(said)) >= float(entropy(full(logits))) - 1e-9
    if outside == 1:
        assert float(entropy(said)) == pytest.approx(float(entropy(full(logits))), abs=1e-9)


def test_a_heavy_tail_is_a_rival_and_never_makes_an_exit_look_sure() -> None:
    said = Prediction(torch.tensor([[0.02, 0.01]]).log(), torch.tensor([4, 5]), torch.tensor([0.97]).log(), 100)
    assert float(margin(said)) == pytest.approx(0.02 - 0.97)
    light = Prediction(torch.tensor([[0.7, 0.2]]).log(), torch.tensor([4, 5]), torch.tensor([0.1]).log(), 100)
    assert float(margin(light)) == pytest.approx(0.5)


def test_entropy_of_certainty_and_of_nothing() -> None:
    assert float(entropy(full([0.0, -math.inf, -math.inf]))) == 0
    assert float(entropy(full([1.0] * 8))) == pytest.approx(math.log(8))
    assert float(margin(Prediction(torch.zeros(1, 1)))) == 1, "a vocabulary of one"


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40))
def test_sparsity_matches_its_definitions(values: list[float]) -> None:
    x = torch.tensor([values])
    norm = math.sqrt(sum(v * v for v in x[0].tolist()))
    n = len(values)
    if norm > 1e-3:
        ratio = sum(abs(v) for v in x[0].tolist()) / norm
        assert float(hoyer(x)) == pytest.approx((math.sqrt(n) - ratio) / (math.sqrt(n) - 1), abs=1e-4)
        top = sorted((v * v for v in x[0].tolist()), reverse=True)[: max(1, round(0.02 * n))]
        assert float(top_energy(x)) == pytest.approx(sum(top) / norm**2, abs=1e-4)


def test_sparsity_of_one_unit_and_of_silence() -> None:
    one = torch.zeros(1, 50)
    assert (float(hoyer(one)), float(top_energy(one))) == (0, 0)
    one[0, 7] = -3
    assert (float(hoyer(one)), float(top_energy(one))) == (1, 1)
    assert float(hoyer(torch.ones(1, 50))) == pytest.approx(0, abs=1e-6)


def test_stability_is_a_cosine() -> None:
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    assert stability(a, b).tolist() == pytest.approx([0, 1])
    assert float(stability(torch.zeros(1, 4), torch.ones(1, 4))) == 0


@pytest.mark.parametrize("name", list(SIGNALS))
def test_nan_is_never_sure(name: str) -> None:
    assert not SIGNALS[name].sure(math.nan, 0.5)


def test_an_unknown_signal_is_named() -> None:
    with pytest.raises(ValueError, match=r"'entropie'.*entropy, margin"):
        require_signal("entropie")
