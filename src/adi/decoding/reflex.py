"""Reflex decoding under watch: some tokens are checked at full depth, and when too many were wrong the rest is verified."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adi.decoding.policies import Policy, Reflex
from adi.decoding.records import Drift
from adi.decoding.speculate import (
    DepthOutput,
    DraftToken,
    Emitted,
    ExitCheck,
    Forward,
    Request,
    SequenceLogic,
    Yields,
    early_exit,
)
from adi.risk.drift import DriftMonitor

Loss = Callable[[DepthOutput, int], float]


@dataclass(frozen=True)
class Fallback:
    """Drift was found, the running risk being above ``lower``, and so above ``level``; what follows is verified."""

    level: float
    lower: float


@dataclass
class SpotCheck:
    """The share of tokens to check, the dice that choose them, and what a token costs given full depth's reading there.

    ``checked`` and ``differed`` count this generation's; the monitor outlives it.
    """

    monitor: DriftMonitor
    share: float
    dice: random.Random
    loss: Loss
    checked: int = 0
    differed: int = 0

    def due(self) -> bool:
        """Whether the next token is checked; thrown before anything is known of it."""
        return self.dice.random() < self.share

    def saw(self, reading: DepthOutput, token: int) -> None:
        """Full depth's word on a token."""
        self.checked += 1
        self.differed += reading.token != token
        self.monitor.saw(self.loss(reading, token))


def disagrees(reading: DepthOutput, token: int) -> float:
    """1 where full depth would have said another token."""
    return float(reading.token != token)


def watched(
    plan: Request, spot: SpotCheck, verify: Callable[[Request], SequenceLogic]
) -> Generator[Yields | Fallback, Sequence[DepthOutput], None]:
    """``decode_unverified``, with spot checks. A checked token that differs is corrected, since full depth's is known by then.

    Tokens that full depth decides are checked for nothing, and count as right. ``verify`` goes on where drift is found, by this
    sequence's checks or by another's with the same monitor.
    """
    (reading,) = yield Forward(0, plan.prompt, plan.layers)
    yield Emitted(reading.token, plan.layers, (ExitCheck(reading, False),), 1)
    text, rounds = [*plan.prompt, reading.token], 1
    for left in range(plan.budget - 1, 0, -1):
        if plan.ends(text[-1]):
            return
        if spot.monitor.alarmed:
            yield Fallback(spot.monitor.level, spot.monitor.lower)
            rest = replace(plan, prompt=tuple(text), budget=left)
            yield from _resumed(verify(rest), Forward(len(text) - 1, (text[-1],), plan.layers), rounds)
            return
        due = spot.due()
        glances = yield from early_exit(plan, len(text) - 1, (text[-1],))
        believed = glances[-1].reading if glances and glances[-1].fired else None
        draft = DraftToken(believed.token, believed.depth, glances) if believed is not None else None
        if draft is None or due:
            entered = bool(glances)
            (reading,) = yield Forward(len(text) - 1 + entered, () if entered else (text[-1],), plan.layers)
            glances, rounds = (*glances, ExitCheck(reading, False)), rounds + 1
            if due:
                spot.saw(reading, reading.token if draft is None else draft.token)
        if draft is not None and due and draft.token != reading.token:
            yield draft
            decided = Emitted(reading.token, plan.layers, glances, rounds, None, (draft,))
        elif draft is not None:
            decided = Emitted(draft.token, draft.depth, glances, rounds, draft)
        else:
            decided = Emitted(reading.token, plan.layers, glances, rounds)
        text.append(decided.token)
        yield decided


def _resumed(sequence: SequenceLogic, first: Forward, rounds: int) -> SequenceLogic:
    """A sequence whose text is in the network already, all but its last token: its first request becomes ``first``."""
    asked = next(sequence)
    assert isinstance(asked, Forward)
    assert asked.keep == 0
    reply = yield first
    while True:
        try:
            item = next(sequence) if reply is None else sequence.send(reply)
        except StopIteration:
            return
        reply = yield replace(item, round=item.round + rounds - 1) if isinstance(item, Emitted) else item


def told_of(policy: Policy, spot: SpotCheck | None, fell_at: int | None) -> dict[str, Any]:
    """What a generation says of its risk: ``certified``, the certificate in words, and ``drift``, what spot checks found."""
    if not isinstance(policy, Reflex) or policy.certificate is None:
        return {}
    words, monitor = policy.certificate.sentence(), policy.monitor
    if monitor is None:
        return {"certified": words}
    checked, differed = (spot.checked, spot.differed) if spot is not None else (0, 0)
    drift = Drift(monitor.level, checked, differed, monitor.checked, monitor.lower, monitor.upper, fell_at)
    return {"certified": words, "drift": drift}
