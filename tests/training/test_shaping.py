"""Rules of sparse layers: against slow twins, and that they push as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adi.model.sparse import SplLinear
from adi.training.looped.shaping import RULES, Shaper, benefit, goodness
from adi.training.train_looped import TrainSettings, train_looped


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_goodness_is_importance_times_match_less_surprise() -> None:
    route_NF, delta_NF, x_ND = drawn(6, 5), drawn(6, 5, seed=1), drawn(6, 3, seed=2)
    found_NF = goodness(route_NF, delta_NF)
    for n in range(6):
        importance = delta_NF[n].abs()
        surprise = importance * x_ND[n].norm()
        parts = [part / part.abs().max() for part in (importance, route_NF[n], surprise)]
        assert torch.allclose(found_NF[n], parts[0] * (parts[1] - parts[2]))


def test_the_entropy_is_that_of_routes_with_goodness_in_them_and_learns_routes_only() -> None:
    route_NF, delta_NF = drawn(6, 5).requires_grad_(), drawn(6, 5, seed=1)
    for name, sign in (("entropy+", 1), ("entropy-", -1)):
        p_NF = (route_NF.detach() + sign * goodness(route_NF, delta_NF).detach()).softmax(-1)
        loss = RULES[name](route_NF, delta_NF, SplLinear(3, 5).router)
        assert loss.item() == pytest.approx(float(-(p_NF * p_NF.log()).sum(-1).mean()))
        (slope,) = torch.autograd.grad(loss, route_NF)
        assert torch.allclose(slope.sum(-1), torch.zeros(6), atol=1e-6), "a shift of all routes changes nothing"


@pytest.mark.parametrize("rule", list(RULES))
def test_one_backward_pass_gives_the_rules_gradients_too(rule: str) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(SplLinear(4, 6), SplLinear(6, 3))
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(torch.randn(p.shape))
    x_NI = drawn(20, 4)
    given = [x_NI, layers[0](x_NI)]
    spoken = [layers[0](x_NI), None]
    spoken[1] = layers[1](spoken[0])
    loss = spoken[1].square().sum()  # type: ignore[union-attr]
    slow = []
    for layer, x, y in zip(layers, given, spoken, strict=True):
        (delta,) = torch.autograd.grad(loss, y, retain_graph=True)  # type: ignore[arg-type]
        assert isinstance(layer, SplLinear)
        slow.append(torch.autograd.grad(RULES[rule](layer.router(x), delta, layer.router), list(layer.router.parameters())))
    main = torch.autograd.grad(loss, layers[0].weight)[0]
    shaper = Shaper(layers, rule, 0.3)
    layers(x_NI).square().sum().backward()
    for layer, expected in zip(layers, slow, strict=True):
        for p, slope in zip(layer.router.parameters(), expected, strict=True):  # type: ignore[union-attr]
            assert torch.allclose(p.grad, slope, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(layers[0].weight.grad, main)  # type: ignore[arg-type]
    bars = [float(layer.router.bar) for layer in layers]  # type: ignore[union-attr, arg-type]
    shaper.finish()
    kept = layers[0].weight.grad.any(1)  # type: ignore[union-attr, operator]
    assert bool(kept.all()) != rule.startswith("entropy"), "units that do no good keep their weights"
    assert ([float(layer.router.bar) for layer in layers] == bars) != (rule == "price")  # type: ignore[union-attr, arg-type]


def speaking(rule: str, active: float) -> tuple[float, Tensor, Tensor]:
    """A router after some steps of a rule alone, where the benefit is that of some units at some inputs: the share that speaks,
    the routing logits and the benefits."""
    torch.manual_seed(0)
    layer, x_NI = SplLinear(8, 40), drawn(400, 8, seed=1)
    delta_NF = (0.5 * x_NI @ drawn(8, 40, seed=2)).exp()
    shaper = Shaper(layer, rule, active)
    optimizer = torch.optim.Adam(layer.router.parameters(), 0.05)
    for _ in range(300):
        layer(x_NI.requires_grad_()).backward(delta_NF)
        optimizer.step()
        optimizer.zero_grad()
        shaper.finish()
    route_NF = layer.router(x_NI).detach()
    return float((route_NF > 0).float().mean()), route_NF, benefit(delta_NF)


@pytest.mark.parametrize("active", [0.1, 0.4])
def test_a_price_lets_the_wanted_share_speak_and_those_of_most_benefit(active: float) -> None:
    share, route_NF, benefit_NF = speaking("price", active)
    assert share == pytest.approx(active, abs=0.03)
    assert benefit_NF[route_NF > 0].mean() > 2 * benefit_NF[route_NF <= 0].mean()


def test_utility_silences_units_below_the_mean_benefit() -> None:
    share, route_NF, benefit_NF = speaking("utility", 0.5)
    assert share < 0.4
    assert benefit_NF[route_NF > 0].mean() > 2 * benefit_NF[route_NF <= 0].mean()


def test_a_looped_model_trains_under_a_rule_and_frozen_prototypes_stay(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 2, "sparse": "mlp"}
    found = {}
    for rule in ("none", "price"):
        settings = TrainSettings(task="products-S3", model=sizes, steps=3, batch=4, shaping=rule, ema=0.0, warmup=1)
        found[rule] = train_looped(settings, tmp_path / rule).model.turn.layers[0].mlp.up_proj.router
    assert not torch.equal(found["price"].prototypes, found["none"].prototypes)
    assert not found["none"].gates.any()
    assert found["price"].gates.any()


def test_a_rule_without_prototypes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shaping is 'price'.*model.sparse is 'none'"):
        train_looped(TrainSettings(task="products-S3", shaping="price"), tmp_path)
