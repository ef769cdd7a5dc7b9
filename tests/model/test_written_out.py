"""Attention that is written out as products, and positions as a range: found while a model runs, and read off its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from adi.model.openvino.export.written_out import AttentionProducts, Positions, measured

HEADS, ROWS, WIDTH = 4, 40, 8
SLOPES = (0.5, 0.25, 0.125, 0.0625)


def drawn(heads: int = HEADS) -> Tensor:
    return torch.randn(1, heads, ROWS, WIDTH)


def masked(scores: Tensor, window: int = ROWS) -> Tensor:
    rows = torch.arange(ROWS)
    apart = rows[:, None] - rows
    return scores.masked_fill((apart < 0) | (apart >= window), torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize("scale", [WIDTH**-0.5, 1.0, 0.37])
@pytest.mark.parametrize(("window", "slopes"), [(0, ()), (7, ()), (0, SLOPES), (7, SLOPES)])
def test_what_was_done_to_scores_is_found(kv_heads: int, scale: float, window: int, slopes: tuple[float, ...]) -> None:
    query, key = drawn(), drawn(kv_heads)
    bias = torch.tensor(slopes or [0.0] * HEADS)[:, None, None] * (torch.arange(ROWS) - ROWS)
    found = measured(query, key, masked(scale * query @ key.transpose(2, 3) + bias, window or ROWS))
    assert found[:2] == (pytest.approx(scale, abs=1e-6), window)
    assert found[2] == pytest.approx(slopes, abs=1e-6)


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (lambda scores: masked(torch.tanh(scores)), "not the scaled products"),
        (lambda scores: masked(scores + torch.randn(HEADS, ROWS, ROWS)), "not the scaled products"),
        (lambda scores: masked(scores * torch.arange(1, HEADS + 1)[:, None, None]), "not the scaled products"),
        (lambda scores: scores, "a mask of its own making"),
        (lambda scores: masked(scores).index_fill(-1, torch.tensor([3]), -1e9), "a mask of its own making"),
    ],
)
def test_what_paged_attention_has_not_is_refused(done: Any, reason: str) -> None:
    query, key = drawn(), drawn()
    with pytest.raises(ValueError, match=reason):
        measured(query, key, done(query @ key.transpose(2, 3)))


@pytest.mark.parametrize("axes", [3, 4])
def test_products_are_followed_from_queries_to_values(axes: int) -> None:
    query, key, value = (drawn() if axes == 4 else drawn()[0] for _ in range(3))
    calls: list[tuple[Tensor, ...]] = []

    def attend(*given: Tensor) -> Tensor:
        calls.append(given)
        return given[2] + 1

    with AttentionProducts(attend, ROWS):
        scores = masked(torch.matmul(query, key.transpose(-1, -2)) / 3)
        chances = torch.nn.functional.dropout(torch.softmax(scores.float(), -1), 0.1, training=False)
        out = torch.matmul(chances.to(value.dtype), value)
    ((q, k, v, seen),) = calls
    assert torch.equal(out, value + 1)
    for found, given in ((q, query), (k, key), (v, value), (seen, scores)):
        assert torch.equal(found.reshape(given.shape), given)


@pytest.mark.parametrize("kind", ["matmul", "baddbmm"])
def test_a_cap_is_seen_though_scores_are_small(kind: str) -> None:
    query, key, value = (0.1 * drawn()[0] for _ in range(3))
    bias = torch.tensor(SLOPES)[:, None, None] * torch.arange(ROWS)

    def scores(cap: float) -> Tensor:
        turned = key.transpose(1, 2)
        made = query @ turned if kind == "matmul" else bias.baddbmm(batch1=query, batch2=turned, beta=1.0, alpha=0.5)
        return masked(cap * torch.tanh(made / cap) if cap else made)

    def look(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        found.append(measured(query, key, scores))
        return value

    found: list[tuple[float, int, tuple[float, ...]]] = []
    with AttentionProducts(look, ROWS, loud=True):
        torch.softmax(scores(0.0), -1) @ value
        with pytest.raises(ValueError, match="not the scaled products"):
            torch.softmax(scores(50.0), -1) @ value
    scale, window, slopes = found[0]
    assert (scale, window) == (pytest.approx(1.0 if kind == "matmul" else 0.5, abs=1e-6), 0)
    assert slopes == pytest.approx(() if kind == "matmul" else SLOPES, abs=1e-5)


def test_positions_take_the_place_of_a_range() -> None:
    with Positions(torch.tensor([[5, 6, 0]])):
        assert torch.arange(3).tolist() == [5, 6, 0]
        assert torch.arange(0, 3).tolist() == [5, 6, 0]
        assert torch.arange(4).tolist() == [0, 1, 2, 3]


def test_a_model_without_the_interface_multiplies_as_it_is_found_to() -> None:
    config = t.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=64, window_size=8, attention_types=[[["global", "local"], 1]]
    )
    model = t.GPTNeoForCausalLM(config).eval()
    found: list[tuple[float, int, tuple[float, ...]]] = []

    def look(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        found.append(measured(query, key, scores))
        return value

    with torch.no_grad(), AttentionProducts(look, ROWS):
        model(torch.arange(ROWS)[None], use_cache=False)
    assert found == [(1.0, 0, ()), (1.0, 8, ())]
