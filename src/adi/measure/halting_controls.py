"""What a halting rule is compared with: other signals of the same network, random halting with the same turns, the oracle.

All is read from one run of all turns, so it compares *choices*: what a place would have answered had it been read at a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adi.model.looped import LoopedForCausalLM

Curve = list[tuple[float, float]]  # mean turns and accuracy, by rising threshold


@torch.no_grad()
def signals(model: LoopedForCausalLM, ids_BT: Tensor, price: float | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """``answers_RBT`` and signals ``[R, B, T]`` that are higher where the answer is surer: the gate's logit, the likeliest
    answer's probability, negative entropy, and how little the distribution (negative total variation) and the state that is
    read (negative root mean square) changed since the turn before."""
    read_RBTD = torch.stack(model.model(input_ids=ids_BT)[0])
    chance_RBTV = model.lm_head(read_RBTD).softmax(-1)
    found = {
        "gate": model.gate(read_RBTD, price),
        "top_probability": chance_RBTV.amax(-1),
        "entropy": torch.xlogy(chance_RBTV, chance_RBTV).sum(-1),
        "stability": -_changes(chance_RBTV, lambda moved: 0.5 * moved.abs().sum(-1)),
        "state_change": -_changes(read_RBTD, lambda moved: moved.square().mean(-1).sqrt()),
    }
    return chance_RBTV.argmax(-1).numpy(), {name: signal.numpy() for name, signal in found.items()}


def _changes(values_R: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    """The size of the change to each turn from the one before; beyond all others at the first."""
    moved = size(values_R[1:] - values_R[:-1])
    return torch.cat([torch.full_like(size(values_R[:1]), float(moved.amax()) + 1 if len(moved) else 1.0), moved])


def first_turns(signal_RN: np.ndarray, threshold: float) -> np.ndarray:
    """The turn, from 0, at which a signal first passes the threshold; the last where it never does."""
    passed = signal_RN > threshold
    passed[-1] = True
    turns: np.ndarray = passed.argmax(0)
    return turns


def at_turns(right_RN: np.ndarray, turns_N: np.ndarray) -> float:
    """The share that is right where each is read at its turn."""
    return float(np.take_along_axis(right_RN, turns_N[None], 0).mean())


def sweep(right_RN: np.ndarray, signal_RN: np.ndarray, points: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Turns and accuracy of each item, ``[L, B]``, as the threshold goes through the signal's own quantiles; means over the
    places of items ``[R, B, T]``."""
    turns, found = [], []
    for level in (-np.inf, *np.unique(np.quantile(signal_RN, np.linspace(0, 1, points)))):
        at_N = first_turns(signal_RN, level)
        turns.append(by_item(at_N) + 1)
        found.append(by_item(np.take_along_axis(right_RN, at_N[None], 0)[0]))
    return np.array(turns), np.array(found)


def by_item(values: np.ndarray) -> np.ndarray:
    """The mean over the places of each item."""
    return np.asarray(values.reshape(len(values), -1).mean(1))


def curve(turns_LB: np.ndarray, right_LB: np.ndarray) -> Curve:
    """Accuracy over mean turns, of what ``sweep`` found."""
    return sorted(zip(turns_LB.mean(1).tolist(), right_LB.mean(1).tolist(), strict=True))


def area(points: Curve, most: int) -> float:
    """The mean height of a curve from 1 to ``most`` turns, held level beyond its ends."""
    turns, height = (np.array(part) for part in zip(*points, strict=True))
    grid = np.linspace(1, most, 200)
    return float(np.interp(grid, turns, np.maximum.accumulate(height)).mean())


def shuffled(right_RN: np.ndarray, turns_N: np.ndarray, seed: int) -> float:
    """Accuracy where the same turns are dealt to other places at random."""
    return at_turns(right_RN, np.random.default_rng(seed).permutation(turns_N))


def oracle(right_RN: np.ndarray) -> tuple[float, float]:
    """Mean turns and accuracy of stopping at the first turn that is right; all turns where none is."""
    ever = right_RN.any(0)
    turns_N = np.where(ever, right_RN.argmax(0), len(right_RN) - 1)
    return float(turns_N.mean()) + 1, float(ever.mean())


def resamples(items: int, seed: int = 0, count: int = 1000) -> np.ndarray:
    """Choices of items with replacement, ``[S, B]``, for a bootstrap over them (Efron 1979)."""
    return np.random.default_rng(seed).integers(0, items, (count, items))


def middle(values_S: np.ndarray) -> list[float]:
    """The 95% interval of what resamples gave."""
    return [float(q) for q in np.quantile(values_S, (0.025, 0.975))]


def interval(values_B: Sequence[float] | np.ndarray, seed: int = 0, count: int = 1000) -> list[float]:
    """The 95% bootstrap interval of a mean over items, places of one item staying together."""
    values_B = np.asarray(values_B, np.float64)
    return middle(values_B[resamples(len(values_B), seed, count)].mean(1))


def areas(right_RN: np.ndarray, signal_RN: np.ndarray, most: int, chosen_SB: np.ndarray) -> tuple[float, np.ndarray]:
    """The area of a signal on all items, and on each choice of items."""
    turns_LB, right_LB = sweep(right_RN, signal_RN)
    every = [area(curve(turns_LB[:, items], right_LB[:, items]), most) for items in chosen_SB]
    return area(curve(turns_LB, right_LB), most), np.array(every)
