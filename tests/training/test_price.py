"""The free energy of halting, and the published objectives as settings of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adi.training.price import (
    OBJECTIVES,
    Price,
    act,
    costs,
    free_energy,
    least_free_energy,
    log_halting,
    ouro,
    plsd,
    pondernet,
    posterior,
    priced,
    trm,
    watch,
)

TURNS, PLACES = 5, 7
COST_R = costs(TURNS)


@pytest.fixture
def loss_RN() -> Tensor:  # noqa: N802, a shape
    return torch.rand(TURNS, PLACES, generator=torch.Generator().manual_seed(0)) * 2


def gate_of(q_RN: Tensor) -> Tensor:
    """The logits of a gate whose halting distribution is q."""
    left_RN = q_RN.flip(0).cumsum(0).flip(0)
    return (q_RN / left_RN).clamp(1e-6, 1 - 1e-6).logit()


def gradient(objective, halt_RN: Tensor, loss_RN: Tensor, at: Price, cost_R: Tensor = COST_R) -> Tensor:  # type: ignore[no-untyped-def]
    halt_RN = halt_RN.clone().requires_grad_()
    objective(loss_RN, halt_RN, cost_R, at).gate.backward()
    assert halt_RN.grad is not None
    return halt_RN.grad


def test_a_collapsed_gate_is_told_from_one_that_differs_by_place() -> None:
    """Two places, three turns; by hand."""
    never, always = -40.0, 40.0
    differs = watch(torch.tensor([[always, never], [never, never], [never, never]]))
    assert differs == pytest.approx(
        {"turns": 2, "turns_spread": 1, "stop_first": 0.5, "stop_last": 0.5, "entropy_of_mean": math.log(2), "mean_entropy": 0},
        abs=1e-6,
    )
    collapsed = watch(torch.tensor([[always, always], [never, never], [never, never]]))
    assert (collapsed["turns"], collapsed["turns_spread"], collapsed["stop_first"]) == pytest.approx((1, 0, 1))


def test_the_posterior_has_the_least_free_energy(loss_RN: Tensor) -> None:
    q_RN = posterior(loss_RN, COST_R, 0.3, 0.1)
    least_N = least_free_energy(loss_RN, COST_R, 0.3, 0.1)
    assert torch.allclose(free_energy(q_RN, loss_RN, COST_R, 0.3, 0.1), least_N, atol=1e-6)
    other_RN = torch.rand(TURNS, PLACES).softmax(0)
    regret_N = 0.1 * (other_RN * (other_RN / q_RN).log()).sum(0)
    assert torch.allclose(free_energy(other_RN, loss_RN, COST_R, 0.3, 0.1) - least_N, regret_N, atol=1e-5)


def test_a_gates_halting_distribution_is_one(loss_RN: Tensor) -> None:
    q_RN = posterior(loss_RN, COST_R, 0.3, 0.5)
    assert torch.allclose(log_halting(gate_of(q_RN)).exp(), q_RN, atol=1e-4)
    assert torch.allclose(log_halting(torch.randn(TURNS, PLACES)).exp().sum(0), torch.ones(PLACES))


def test_the_price_moves_weight_to_early_turns(loss_RN: Tensor) -> None:
    depth = [float((posterior(loss_RN, COST_R, price, 0.1) * COST_R[:, None]).sum(0).mean()) for price in (0.0, 0.5, 5.0)]
    assert depth[0] > depth[1] > depth[2]
    assert depth[2] == pytest.approx(COST_R[0].item(), abs=0.05)


def test_the_gate_of_this_package_rests_at_the_posterior(loss_RN: Tensor) -> None:
    at = Price(price=0.3, gate_tau=0.5)
    wanted = gate_of(posterior(loss_RN, COST_R, 0.3, 0.5))
    assert float(gradient(priced, wanted, loss_RN, at).abs().max()) < 1e-4
    assert float(gradient(priced, wanted + 0.5, loss_RN, at).abs().max()) > 1e-3


def test_without_a_floor_the_trunk_is_weighed_by_the_posterior(loss_RN: Tensor) -> None:
    given = loss_RN.clone().requires_grad_()
    priced(given, torch.zeros(TURNS, PLACES), COST_R, Price(price=0.3, tau=0.2, floor=0.0)).loss.backward()
    assert torch.allclose(given.grad * PLACES, posterior(loss_RN, COST_R, 0.3, 0.2), atol=1e-6)  # type: ignore[operator]
    even = priced(loss_RN, torch.zeros(TURNS, PLACES), COST_R, Price(floor=1.0))
    assert float(even.loss) == pytest.approx(float(loss_RN.mean()))


def test_plsd_is_the_limit_of_no_temperature_and_no_price(loss_RN: Tensor) -> None:
    """The posterior picks PLSD's turn; PLSD averages the losses up to it, and its gate learns the step there."""
    best_N = loss_RN.argmin(0)
    assert torch.equal(posterior(loss_RN, COST_R, 0.0, 1e-4).argmax(0), best_N)
    found = plsd(loss_RN, torch.zeros(TURNS, PLACES), COST_R, Price())
    wanted = torch.stack([loss_RN[: int(b) + 1, n].mean() for n, b in enumerate(best_N)]).mean()
    assert float(found.loss) == pytest.approx(float(wanted))
    step_RN = torch.arange(TURNS)[:, None] >= best_N
    assert float(plsd(loss_RN, torch.where(step_RN, 20.0, -20.0), COST_R, Price()).gate) < 1e-6


def test_ouro_is_free_energy_without_a_price(loss_RN: Tensor) -> None:
    """Expected loss less beta times entropy: least at the posterior of price 0 and temperature beta."""
    rest = gate_of(posterior(loss_RN, COST_R, 0.0, 0.4))
    assert float(gradient(ouro, rest, loss_RN, Price(prior=0.4)).abs().max()) < 1e-4
    value = ouro(loss_RN, rest, COST_R, Price(prior=0.4)).gate
    assert float(value) == pytest.approx(float(least_free_energy(loss_RN, COST_R, 0.0, 0.4).mean()), abs=1e-4)


def test_pondernet_is_free_energy_with_the_cost_of_a_geometric_prior(loss_RN: Tensor) -> None:
    """KL to a prior p is a cost of -log p, at temperature and price 0.01 alike: -0.01 ln(1 - 0.2) a turn."""
    cost_R = -log_halting(torch.full((TURNS, 1), 0.2).logit())[:, 0]
    assert float((cost_R[1:-1] - cost_R[:-2])[0]) == pytest.approx(-math.log(0.8))
    close_RN = loss_RN * 0.02  # differences of some temperatures, or the posterior is all in one turn
    rest = gate_of(posterior(close_RN, cost_R, 0.01, 0.01))
    assert float(gradient(pondernet, rest, close_RN, Price(prior=0.2)).abs().max()) < 1e-5


def test_act_pays_for_the_remainder(loss_RN: Tensor) -> None:
    """Graves 2016: of turns + remainder only the remainder, one less the shares before, has a gradient."""
    halt_RN = torch.full((TURNS, 1), 0.4).logit()  # 0.4 + 0.4 + 0.2: halts at the third turn
    even = torch.ones(TURNS, 1)  # losses alike, so that only ponder has a gradient
    found = gradient(act, halt_RN, even, Price(price=1.0))
    share = 0.4 * 0.6
    assert found[:, 0].tolist() == pytest.approx([-share / TURNS, -share / TURNS, 0, 0, 0], abs=1e-6)
    weighed = act(torch.arange(TURNS).float()[:, None], halt_RN, COST_R, Price())
    assert float(weighed.loss) == pytest.approx(0.4 * 0 + 0.4 * 1 + 0.2 * 2)


def test_trm_learns_every_turn_and_whether_it_is_right(loss_RN: Tensor) -> None:
    right = torch.where(loss_RN < math.log(2), 20.0, -20.0)
    found = trm(loss_RN, right, COST_R, Price())
    assert float(found.loss) == pytest.approx(float(loss_RN.mean()))
    assert float(found.gate) < 1e-6


def test_a_fixed_depth_learns_its_last_turn_alone(loss_RN: Tensor) -> None:
    given = loss_RN.clone().requires_grad_()
    OBJECTIVES["last"](given, torch.zeros(TURNS, PLACES), COST_R, Price()).loss.backward()
    assert given.grad is not None
    assert not given.grad[:-1].any()
    assert float(given.grad[-1].sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_trunk_never_learns_from_the_gates_part(name: str, loss_RN: Tensor) -> None:
    losses, halt = loss_RN.clone().requires_grad_(), torch.randn(TURNS, PLACES).requires_grad_()
    terms = OBJECTIVES[name](losses, halt, COST_R, Price())
    terms.gate.backward()
    assert losses.grad is None or not losses.grad.any()
