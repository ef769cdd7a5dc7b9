"""An order of rules from safe to bold, learned on answers that calibration does not see.

A rule exits where the error that its top probability implies there (isotonic regression on these answers) is at most a price
times the share of blocks that stopping saves: what stopping is worth against what it risks, at the margin. The price orders
the rules. Depths at which a check does not pay are left out. A looped model's gate takes the place of the top probability where
the exits' own trigger reads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adi.decoding.teacher_forcing import ForcedReading
from adi.exits.triggers import Threshold
from adi.measure.calibration.losses import NATS
from adi.measure.statistics import isotonic_curve

CHECK_BLOCKS = 0.6  # what checking an exit costs, in blocks (adi triggers: 57% of a block on the default model)
MOST_DEPTHS = 3
PRICES = np.geomspace(0.002, 2.0, 64)
STEP = 1.5  # from one rule's risk to the next one's


@dataclass(frozen=True)
class RiskRule:
    """A trigger and what it did to the answers it was learned on: risk, mean depth, and blocks per token, checks included."""

    trigger: Threshold
    risk: float
    depth: float
    cost: float


def risks_wanted(levels: Sequence[float]) -> list[float]:
    """The risks for which rules are looked for, rising: from a quarter of the lowest level to three quarters of the highest,
    since a rule that is nearer to its level would need more text than there is to be certified."""
    wanted = [min(levels) / 4]
    while wanted[-1] * STEP < 0.75 * max(levels):
        wanted.append(wanted[-1] * STEP)
    return [*wanted, 0.75 * max(levels)]


def risk_path(
    readings: Sequence[ForcedReading],
    depths: Sequence[int],
    layers: int,
    levels: Sequence[float],
    kind: str,
    signal: str = "top_probability",
) -> list[RiskRule]:
    """Rules from safe to bold, the cheapest found for each wanted risk of ``kind`` (levels in [0, 1]), by a signal that is high
    where an exit is sure."""
    rows = _joined(readings, kind, signal)
    curves = [isotonic_curve(sure_N, 1 - loss_N) for sure_N, loss_N in zip(rows.sure_EN, rows.loss_EN, strict=True)]
    unique: dict[tuple[tuple[int, float], ...], None] = {}
    counts = {*range(1, min(MOST_DEPTHS, len(depths)) + 1), *([len(depths)] if signal == "gate" else [])}
    chosen = itertools.chain.from_iterable(itertools.combinations(range(len(depths)), count) for count in sorted(counts))
    for exits, price in itertools.product(chosen, PRICES.tolist()):
        least = {depths[e]: curves[e].least(1 - 1e-9 - price * (layers - depths[e]) / layers) for e in exits}
        if at := {depth: math.floor(known * 1e6) / 1e6 for depth, known in least.items() if known is not None}:
            unique[tuple(at.items())] = None
    tried = [_tried(rows, depths, layers, dict(at)) for at in unique]
    found: list[RiskRule] = []
    for risk in risks_wanted(levels):
        best = min((rule for rule in tried if rule.risk <= risk), key=lambda rule: rule.cost, default=None)
        if best is not None and (not found or best.cost < found[-1].cost):
            found.append(best)
    return found


@dataclass(frozen=True)
class _Rows:
    """All rows of all answers but the first of each, N in all: how sure each exit is by ``signal`` and what its token would
    lose."""

    sure_EN: np.ndarray
    loss_EN: np.ndarray
    answers: int
    signal: str


def _joined(readings: Sequence[ForcedReading], kind: str, signal: str) -> _Rows:
    sure = torch.cat([one.signals[signal][:, 1:] for one in readings], 1).double().numpy()
    if kind == "disagreement":
        loss = torch.cat([one.exit_ET[:, 1:] != one.full_T[1:] for one in readings], 1).double().numpy()
    else:
        loss = torch.cat([one.regret_ET[:, 1:] for one in readings], 1).double().clamp(0, NATS).numpy() / NATS
    return _Rows(sure, loss, len(readings), signal)


def _tried(rows: _Rows, depths: Sequence[int], layers: int, at: dict[int, float]) -> RiskRule:
    """The rule at all rows, and at the first token of each answer, which is full depth's."""
    left = np.ones(rows.sure_EN.shape[1], dtype=bool)
    lost = checks = 0.0
    depth = float(rows.answers * layers)
    for e, here in enumerate(depths):
        if here in at:
            checks += float(left.sum())
            fires = left & (rows.sure_EN[e] >= at[here])
            lost += float(rows.loss_EN[e][fires].sum())
            depth += float(here * fires.sum())
            left &= ~fires
    depth += float(layers * left.sum())
    count = rows.answers + len(left)
    return RiskRule(Threshold(rows.signal, at), lost / count, depth / count, (depth + CHECK_BLOCKS * checks) / count)
