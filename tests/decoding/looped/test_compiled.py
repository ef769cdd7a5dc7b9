"""Halting on compiled graphs gives what halting on torch gives: the same turns, and the same logits up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("openvino")

from adi.decoding.looped.compiled import compiled
from adi.decoding.looped.halting import Rule, run_halting
from adi.decoding.looped.solve import solve
from adi.errors import AdiError, UsageError
from adi.model.looped import LoopedForCausalLM
from looped import gated, ids

FORMS: dict[str, dict[str, Any]] = {
    "places, and a gate that takes the price": {"gate_price": True},
    "places, no injection, learned": {"injection": "none", "positions": "learned", "max_position_embeddings": 8},
    "items, two states behind a prelude": {
        "causal": False, "states": 2, "inner_turns": 2, "injection": "add", "prelude_layers": 1,
    },
}  # fmt: skip


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest) -> LoopedForCausalLM:
    form = dict(FORMS[request.param])
    return gated(form.pop("causal", True), 2, **form)


def both(model: LoopedForCausalLM, ids_BT: torch.Tensor, **rule: Any) -> torch.Tensor:
    price = 0.1 if model.config.gate_price else None
    given = Rule(price=price, **rule)
    slow, fast = run_halting(model, ids_BT, given), compiled(model).run(ids_BT, given, torch.ones_like(ids_BT), None)
    assert torch.equal(fast.turns_BT, slow.turns_BT)
    torch.testing.assert_close(fast.logits_BTV, slow.logits_BTV, atol=1e-4, rtol=1e-4)
    return fast.turns_BT


def test_compiled_turns_are_torchs(model: LoopedForCausalLM) -> None:
    both(model, ids(6, 7), threshold=None, most=2)
    assert len(both(model, ids(6, 7), threshold=0.5, most=6).unique()) > 1
    both(model, ids(6, 7), threshold=0.4, most=6, verified=True)
    if not model.config.causal:
        both(model, ids(6, 7), threshold=0.5, most=6, starts=3)


def test_an_item_beside_others_is_itself_alone_bit_for_bit(model: LoopedForCausalLM) -> None:
    given = Rule(threshold=0.5, most=6, price=0.1 if model.config.gate_price else None)
    several = ids(6, 7)
    together = compiled(model).run(several, given, torch.ones_like(several), None)
    for i, item in enumerate(several.split(1)):
        alone = compiled(model).run(item, given, torch.ones_like(item), None)
        assert torch.equal(alone.logits_BTV[0], together.logits_BTV[i])
        assert torch.equal(alone.turns_BT[0], together.turns_BT[i])


def test_changed_weights_are_compiled_again() -> None:
    model = gated(True)
    both(model, ids(1, 5), threshold=0.5, most=3)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    both(model, ids(1, 5), threshold=0.5, most=3)


def test_solve_takes_either_backend() -> None:
    items = [[0, 1, 2], [3], [4, 5, 6]]
    products = gated(True, task="products-S3")
    found, wanted = (solve(products, items, threshold=0.5, backend=name) for name in ("openvino", "hf"))
    assert [each.answers for each in found] == [each.answers for each in wanted]
    assert [each.turns for each in found] == [each.turns for each in wanted]
    with pytest.raises(UsageError, match="backend is 'torch'; choose one of hf, openvino"):
        solve(products, items, backend="torch")
    with pytest.raises(AdiError, match="halt=False"):
        solve(gated(True, task="products-S3", core_layers=2), items, backend="openvino")
