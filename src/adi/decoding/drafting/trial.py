"""Whether drafting pays while sequences share passes: tried, since what looking for drafts costs beside the passes shows in no
sum. Rounds with drafts and rounds without take turns, and most are of the kind that gives more tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

TRIED, KEPT = 12, 240  # rounds of one kind in a row: to see what it gives, and of the better kind
ROWS, LEAST = 16, 2
FADING = 0.97  # of what was seen of a kind, with each round
PAUSE = 3.0  # a round that took so many times longer than others of its kind counts as one that did


@dataclass(slots=True)
class _Kind:
    """Rounds of one kind, the latest count most."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if self.tokens:
            seconds = min(seconds, PAUSE * tokens * self.seconds / self.tokens)
        self.tokens, self.seconds = FADING * self.tokens + tokens, FADING * self.seconds + seconds

    @property
    def rate(self) -> float:
        """Tokens a second; more than any where none was seen."""
        return self.tokens / self.seconds if self.seconds else float("inf")


@dataclass
class Trial:
    """Of about so many sequences: whether they draft by now."""

    drafts: bool = True
    _keeps: bool = False  # to the better kind, both having been tried
    _left: int = TRIED
    _kinds: Mapping[bool, _Kind] = field(default_factory=lambda: {True: _Kind(), False: _Kind()})

    def seen(self, drafted: bool, tokens: int, seconds: float) -> None:
        """A round, with or without drafts, gave all its sequences together so many tokens in so many seconds."""
        self._kinds[drafted].add(tokens, seconds)
        self._left -= drafted is self.drafts
        if self._left <= 0:
            best = max((True, False), key=lambda kind: self._kinds[kind].rate)
            self.drafts = not self.drafts if self._keeps else best
            self._keeps = not self._keeps and all(kind.seconds for kind in self._kinds.values())
            self._left = KEPT if self._keeps else TRIED


@dataclass
class Trials:
    """For all sequences of a model with the same drafter. ``drafts``: so many each should look for at most; looking takes time
    for each sequence, and passes of more than ``ROWS`` rows in all are not for drafting."""

    drafts: int = ROWS
    _by_number: dict[int, Trial] = field(default_factory=dict)

    def of(self, sequences: int) -> Trial:
        """For about so many."""
        return self._by_number.setdefault(sequences.bit_length(), Trial())


@dataclass(frozen=True)
class _Round:
    """One that is under way: of whom, and where in their texts; ``drafted``: they looked for drafts."""

    trial: Trial
    positions: Mapping[Any, int]
    drafted: bool
    began: float


class RoundClock:
    """One driver's rounds, from pass to pass: times those that the same sequences went through with nobody beside."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._round: _Round | None = None

    def begin(self, trials: Trials | None, positions: Mapping[Any, int], beside: int) -> None:
        """A pass begins of sequences at these ``positions`` in their texts, by whatever tells them apart, beside so many
        others. What they look for behind it is settled; not without ``trials``, where nobody drafts by costs."""
        before, self._round = self._round, None
        if trials is None:
            return
        now, drafted = self._clock(), trials.drafts > 0
        steady = before is not None and beside == 0 and positions.keys() == before.positions.keys()
        if before is not None and steady and before.drafted is drafted:  # looking comes behind a pass, for the next one
            before.trial.seen(drafted, sum(positions.values()) - sum(before.positions.values()), now - before.began)
        sequences, trials.drafts = len(positions) or beside, ROWS
        if sequences > 1:
            trial = trials.of(sequences)
            trials.drafts = max(LEAST, ROWS // sequences) if trial.drafts else 0
            self._round = _Round(trial, positions, drafted, now) if beside == 0 else None
