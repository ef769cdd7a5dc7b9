"""Decoding without verification, and spot checks of it: some tokens are compared with full depth, and when too many differ
the rest of the text is verified."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adi.decoding.requests import DepthOutput, Fallback, Replies
from adi.decoding.speculate import Proposal, Verification
from adi.risk.drift import DriftMonitor

Loss = Callable[[DepthOutput, int], float]


class Unverified(Verification):
    """No draft is verified: the token of an exit that fires is final."""

    always = False

    def should_verify(self) -> bool:
        """Never."""
        return False


@dataclass
class SpotCheck(Verification):
    """A ``share`` of the tokens, drawn at random, is verified; all of them once ``monitor`` has found drift, in this sequence
    or in another one.

    ``loss`` is what a token costs given full depth's output there. ``checked`` and ``differed`` count this generation's
    checks; the monitor outlives it. Restarted, a sequence draws the same numbers and falls back where it did, and the
    monitor sees no check twice.
    """

    monitor: DriftMonitor
    share: float
    loss: Loss
    always: bool = False
    checked: int = 0
    differed: int = 0
    _counted: int = 0  # checks that the monitor has seen
    _rounds: int = 0
    _known: int = 0  # rounds that ran before a restart
    _fell: int | None = None  # the round in which verification began
    _rng: random.Random | None = None
    _start: tuple[Any, ...] | None = None

    def restarted(self) -> SpotCheck:
        """From its beginning."""
        self._known, self._rounds = max(self._known, self._rounds), 0
        self.always, self.checked, self.differed = False, 0, 0
        if self._rng is not None and self._start is not None:
            self._rng.setstate(self._start)
        return self

    def drift(self) -> Fallback | None:
        """Once the monitor is alarmed."""
        self._rounds += 1
        found = self.monitor.alarmed if self._rounds > self._known else self._rounds == self._fell
        if self.always or not found:
            return None
        self.always, self._fell = True, self._rounds
        return Fallback(self.monitor.level, self.monitor.lower)

    def should_verify(self) -> bool:
        """By a random number, whatever the text is."""
        if self._rng is None:
            self._rng = self.monitor.dice()
            self._start = self._rng.getstate()
        return self.always or self._rng.random() < self.share

    def on_verified(self, proposal: Proposal, outputs: Replies) -> None:
        """Full depth's output for a checked token. Where no exit fired, full depth decided, which counts as right."""
        if self.always:
            return
        token = proposal.drafts[0].token if proposal.drafts else outputs[0].token
        self.checked += 1
        self.differed += outputs[0].token != token
        if self.checked > self._counted:
            self._counted = self.checked
            self.monitor.saw(self.loss(outputs[0], token))


def disagrees(output: DepthOutput, token: int) -> float:
    """1 where full depth gives another token."""
    return float(output.token != token)
