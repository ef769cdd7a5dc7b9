"""Training under a price on depth: what each turn's loss weighs, and what the halting gate learns. Pure functions.

Shapes: R turns, N places. ``loss_RN`` is the surprise in nats of the answer after each turn, ``halt_RN`` the gate's logits,
``cost_R`` the share of a full pass that a turn has cost by its end (``cost_R[-1] == 1``).

The free energy of a halting distribution q is F = sum q (loss + price * cost) - tau H(q). Its least value is reached by
``posterior``: q* proportional to exp(-(loss + price * cost) / tau), and F(q) - F* = tau KL(q || q*), the halting regret. So
q* is known exactly while training: it weighs the losses of the turns and teaches the gate. Published objectives are other
choices of these two: PLSD and PonderNet (Banino et al. 2021), Ouro's stage I (Zhu et al. 2025), ACT (Graves 2016), TRM
(Jolicoeur-Martineau 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The two parts of a training loss, means over places: of the trunk (``loss``) and of the gate (``gate``)."""

    loss: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Price:
    """Settings of an objective at one step: ``price`` in nats for a full pass, ``tau`` the temperature of the losses'
    weights, ``gate_tau`` that of what the gate learns (below a turn's price, or it learns to stop late), ``floor`` the share
    of weight spread evenly, ``prior`` the parameter of PonderNet's geometric prior or the weight of Ouro's entropy."""

    price: float = 0.05
    tau: float = 0.05
    gate_tau: float = 0.005
    floor: float = 0.2
    prior: float = 0.2


def costs(turns: int) -> Tensor:
    """``cost_R`` of turns that cost alike."""
    return (torch.arange(turns) + 1.0) / turns


def posterior(loss_RN: Tensor, cost_R: Tensor, price: float, tau: float) -> Tensor:
    """q*: the halting distribution of least free energy, ``[R, N]``."""
    return torch.softmax(-(loss_RN + price * cost_R[:, None]) / tau, 0)


def free_energy(q_RN: Tensor, loss_RN: Tensor, cost_R: Tensor, price: float, tau: float) -> Tensor:
    """F of a halting distribution, ``[N]``, in nats."""
    entropy_N = -torch.xlogy(q_RN, q_RN).sum(0)
    return (q_RN * (loss_RN + price * cost_R[:, None])).sum(0) - tau * entropy_N


def least_free_energy(loss_RN: Tensor, cost_R: Tensor, price: float, tau: float) -> Tensor:
    """F* = -tau log sum exp(-(loss + price * cost) / tau), ``[N]``."""
    return -tau * torch.logsumexp(-(loss_RN + price * cost_R[:, None]) / tau, 0)


def log_halting(halt_RN: Tensor) -> Tensor:
    """log q of a gate: it stops after turn t if it did not before; the last turn takes what is left. ``[R, N]``."""
    go_on_RN = F.logsigmoid(-halt_RN)
    before_RN = torch.cat([torch.zeros_like(go_on_RN[:1]), go_on_RN[:-1].cumsum(0)])
    stop_RN = torch.cat([F.logsigmoid(halt_RN[:-1]), torch.zeros_like(halt_RN[:1])])
    return before_RN + stop_RN


def watch(halt_RN: Tensor) -> dict[str, float]:
    """What tells that a gate collapses: mean and spread over places of the expected turn, the shares that stop at the first and
    at the last turn, the entropy of the mean distribution and the mean entropy (alike where no place differs from another)."""
    q_RN = log_halting(halt_RN.detach()).exp()
    turn_N = (q_RN * (torch.arange(len(q_RN), device=q_RN.device)[:, None] + 1)).sum(0)
    mean_R = q_RN.mean(1)
    found = {
        "turns": turn_N.mean(),
        "turns_spread": turn_N.std(correction=0),
        "stop_first": mean_R[0],
        "stop_last": mean_R[-1],
        "entropy_of_mean": -torch.xlogy(mean_R, mean_R).sum(),
        "mean_entropy": -torch.xlogy(q_RN, q_RN).sum(0).mean(),
    }
    return {name: float(value) for name, value in found.items()}


def priced(loss_RN: Tensor, halt_RN: Tensor, cost_R: Tensor, at: Price) -> Terms:
    """The objective of this package: losses weighed by q* over an even floor; KL(q* || gate), which cannot collapse unless q*
    does."""
    surprise_RN = loss_RN.detach()
    weight_RN = (1 - at.floor) * posterior(surprise_RN, cost_R, at.price, at.tau) + at.floor / len(loss_RN)
    wanted_RN = posterior(surprise_RN, cost_R, at.price, at.gate_tau)
    kl_N = (torch.xlogy(wanted_RN, wanted_RN) - wanted_RN * log_halting(halt_RN)).sum(0)
    return Terms((weight_RN * loss_RN).sum(0).mean(), kl_N.mean())


def plsd(loss_RN: Tensor, halt_RN: Tensor, cost_R: Tensor, at: Price) -> Terms:
    """The turn of least loss t*: mean loss of the turns up to it; the gate learns the step function at it."""
    best_N = loss_RN.detach().argmin(0)
    turn_R = torch.arange(len(loss_RN), device=loss_RN.device)[:, None]
    upto_RN = (turn_R <= best_N).to(loss_RN.dtype)
    gate = F.binary_cross_entropy_with_logits(halt_RN, (turn_R >= best_N).to(halt_RN.dtype))
    return Terms(((upto_RN * loss_RN).sum(0) / upto_RN.sum(0)).mean(), gate)


def ouro(loss_RN: Tensor, halt_RN: Tensor, cost_R: Tensor, at: Price) -> Terms:
    """Stage I: the gate's expected loss less ``prior`` times its entropy; both parts learn from it."""
    logs_RN = log_halting(halt_RN)
    q_RN = logs_RN.exp()
    return Terms(
        (q_RN.detach() * loss_RN).sum(0).mean(), ((q_RN * loss_RN.detach()).sum(0) + at.prior * (q_RN * logs_RN).sum(0)).mean()
    )


def pondernet(loss_RN: Tensor, halt_RN: Tensor, cost_R: Tensor, at: Price) -> Terms:
    """Expected loss, and 0.01 KL(gate || geometric prior with parameter ``prior``)."""
    logs_RN = log_halting(halt_RN)
    q_RN = logs_RN.exp()
    geometric = torch.full_like(halt_RN, at.prior).logit()
    kl_N = (q_RN * (logs_RN - log_halting(geometric))).sum(0)
    return Terms((q_RN.detach() * loss_RN).sum(0).mean(), ((q_RN * loss_RN.detach()).sum(0) + 0.01 * kl_N).mean())


def act(loss_RN: Tensor, halt_RN: Tensor, cost_R: Tensor, at: Price) -> Terms:
    """Halting where the sum of the gate's shares passes 0.99; ``price`` times (turns + remainder), of which only the
    remainder has a gradient, as in the paper. The answer's loss stands for that of the mean state."""
    share_RN = torch.sigmoid(halt_RN)
    before_RN = torch.cat([torch.zeros_like(share_RN[:1]), share_RN[:-1].cumsum(0)])
    last_RN = (before_RN + share_RN >= 0.99).detach()
    last_RN[-1] = True
    last_N = last_RN.float().argmax(0)
    turn_R = torch.arange(len(loss_RN), device=loss_RN.device)[:, None]
    remainder_RN = (1 - before_RN) * (turn_R == last_N)
    weight_RN = share_RN * (turn_R < last_N) + remainder_RN
    ponder = (remainder_RN.sum(0) + (last_N + 1)).mean() / len(loss_RN)
    return Terms((weight_RN.detach() * loss_RN).sum(0).mean(), (weight_RN * loss_RN.detach()).sum(0).mean() + at.price * ponder)


def trm(loss_RN: Tensor, halt_RN: Tensor, cost_R: Tensor, at: Price) -> Terms:
    """Loss after every turn alike; the gate learns whether the answer is right (here: has more than half of the
    probability)."""
    right_RN = (loss_RN.detach() < 0.6931).to(halt_RN.dtype)
    return Terms(loss_RN.mean(), 0.5 * F.binary_cross_entropy_with_logits(halt_RN, right_RN))


def last(loss_RN: Tensor, halt_RN: Tensor, cost_R: Tensor, at: Price) -> Terms:
    """Loss of the last turn alone, and no gate: a network of a fixed depth, which others are compared with."""
    return Terms(loss_RN[-1].mean(), 0.0 * halt_RN.sum())


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor, Price], Terms]] = {
    "price": priced,
    "plsd": plsd,
    "ouro": ouro,
    "pondernet": pondernet,
    "act": act,
    "trm": trm,
    "last": last,
}
