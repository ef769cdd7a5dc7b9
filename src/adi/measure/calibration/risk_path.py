"""An order of rules from safe to bold, learned on answers that calibration does not see.

A rule believes an exit where the error that its top probability implies there (isotonic regression on these answers) is at
most a price times the share of blocks that stopping saves: what stopping is worth against what it risks, at the margin. The
price orders the rules. Depths at which looking does not pay are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from adi.exits.triggers import Threshold
from adi.measure.calibration.losses import NATS
from adi.measure.forced_read import ForcedRead
from adi.risk.bounds import isotonic

LOOK_BLOCKS = 0.6  # what a look costs, in blocks (adi triggers: 57% of a block on the default model)
MOST_DEPTHS = 3
PRICES = np.geomspace(0.002, 2.0, 64)
STEP = 1.5  # from one rule's risk to the next one's


@dataclass(frozen=True)
class RiskRule:
    """A trigger and what it did to the answers it was learned on: risk, mean depth, and blocks per token, looks included."""

    trigger: Threshold
    risk: float
    depth: float
    cost: float


def risks_wanted(levels: Sequence[float]) -> list[float]:
    """The risks for which rules are looked for, rising: from a quarter of the lowest level to three quarters of the highest,
    since a rule that is nearer to its level would need more text than there is to be believed."""
    wanted = [min(levels) / 4]
    while wanted[-1] * STEP < 0.75 * max(levels):
        wanted.append(wanted[-1] * STEP)
    return [*wanted, 0.75 * max(levels)]


def path(told: Sequence[ForcedRead], depths: Sequence[int], layers: int, levels: Sequence[float], kind: str) -> list[RiskRule]:
    """Rules from safe to bold, the cheapest found for each wanted risk of ``kind`` (levels in [0, 1])."""
    rows = _joined(told, kind)
    errors = [_errors(rows, e) for e in range(len(depths))]
    unique: dict[tuple[tuple[int, float], ...], None] = {}
    for count in range(1, min(MOST_DEPTHS, len(depths)) + 1):
        for chosen in combinations(range(len(depths)), count):
            for price in PRICES:
                if at := _thresholds(errors, chosen, depths, layers, float(price)):
                    unique[tuple(sorted(at.items()))] = None
    tried = [_tried(rows, depths, layers, dict(at)) for at in unique]
    found: list[RiskRule] = []
    for risk in risks_wanted(levels):
        fitting = [rule for rule in tried if rule.risk <= risk]
        best = min(fitting, key=lambda rule: rule.cost, default=None)
        if best is not None and (not found or best.cost < found[-1].cost):
            found.append(best)
    return found


@dataclass(frozen=True)
class _Rows:
    """All rows of all answers, the first of each apart, N in all: how sure each exit is and what believing it would lose."""

    sure_EN: np.ndarray
    loss_EN: np.ndarray
    answers: int


def _joined(told: Sequence[ForcedRead], kind: str) -> _Rows:
    sure = torch.cat([t.signals["top_probability"][:, 1:] for t in told], 1).double().numpy()
    if kind == "disagreement":
        loss = torch.cat([t.token_ET[:, 1:] != t.full_T[1:] for t in told], 1).double().numpy()
    else:
        loss = torch.cat([t.regret_ET[:, 1:] for t in told], 1).double().clamp(0, NATS).numpy() / NATS
    return _Rows(sure, loss, len(told))


def _errors(rows: _Rows, e: int) -> tuple[np.ndarray, np.ndarray]:
    """Top probabilities of one exit, rising, and the loss of believing it that each implies, never rising."""
    order = np.argsort(rows.sure_EN[e], kind="stable")
    return rows.sure_EN[e][order], np.array(isotonic(rows.loss_EN[e][order].tolist(), [1.0] * len(order)))


def _thresholds(
    errors: Sequence[tuple[np.ndarray, np.ndarray]], chosen: Sequence[int], depths: Sequence[int], layers: int, price: float
) -> dict[int, float]:
    """The lowest probability at each chosen depth whose implied loss is worth what stopping saves."""
    at = {}
    for e in chosen:
        sure, loss = errors[e]
        worth = np.searchsorted(-loss, -price * (layers - depths[e]) / layers)
        if worth < len(sure):
            at[depths[e]] = math.floor(sure[worth] * 1e6) / 1e6
    return at


def _tried(rows: _Rows, depths: Sequence[int], layers: int, at: dict[int, float]) -> RiskRule:
    """The rule at all rows, and at the first token of each answer, which is full depth's."""
    left = np.ones(rows.sure_EN.shape[1], dtype=bool)
    lost = looks = 0.0
    depth = float(rows.answers * layers)
    for e, here in enumerate(depths):
        if here in at:
            looks += left.sum()
            fires = left & (rows.sure_EN[e] >= at[here])
            lost += float(rows.loss_EN[e][fires].sum())
            depth += float(here * fires.sum())
            left &= ~fires
    depth += float(layers * left.sum())
    count = rows.answers + len(left)
    return RiskRule(Threshold("top_probability", at), lost / count, depth / count, (depth + LOOK_BLOCKS * looks) / count)
