"""Tokens per second of drafting at exits, computed from exit tables and measured passes instead of being run.

The rounds are those of ``decoding.speculate`` on the frontier: a draft climbs from stop to stop until its rule fires, rows
that lag are brought along, and full depth runs what is missing. Behind a wrong draft the rows are those of another text;
the rule is taken to do there what it did at the right text's rows, and all of it is thrown away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adi.measure.trigger_study.pass_seconds import PassSeconds

Flags = Sequence[Sequence[bool]]


@dataclass(frozen=True)
class RecordedText:
    """One text's rows at some stops: whether the exit was right, whether the rule fires, and the seconds that checking it
    takes, each by row and stop. The first row is the prompt's last, which full depth decides."""

    right: Flags
    fires: Flags
    check_seconds: Sequence[Sequence[float]]


@dataclass(frozen=True)
class SimulatedRounds:
    """What drafting came to: tokens after the first, seconds, verifying passes, tokens drafted and accepted."""

    tokens: int
    seconds: float
    rounds: int
    drafted: int
    accepted: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def simulate(texts: Sequence[RecordedText], stops: Sequence[int], draft_tokens: int, passes: PassSeconds) -> SimulatedRounds:
    """All texts, one after the other, with at most ``draft_tokens`` drafts a round."""
    through = functools.cache(passes.through)
    spans = tuple(zip((0, *stops), (*stops, passes.layers), strict=True))
    tokens = rounds = drafted = accepted = 0
    spent = 0.0
    for text in texts:
        at, end = 1, len(text.right)
        tokens += max(0, end - 1)
        while at < end:
            drafts, kept, right = 0, 0, True
            filled = [0] * len(spans)  # rows of this round that have passed each span between stops
            fired = True
            while fired and drafts < min(draft_tokens, end - at - 1):
                row, fired = at + drafts, False
                for place in range(len(stops)):
                    spent += _climb(filled, place, drafts + 1, spans, through) + text.check_seconds[row][place]
                    if text.fires[row][place]:
                        fired = True
                        right = right and text.right[row][place]
                        drafts, kept = drafts + 1, kept + right
                        break
            rows = drafts + 1
            spent += _climb(filled, len(stops), rows, spans, through) + passes.head(rows)
            rounds, drafted, accepted = rounds + 1, drafted + drafts, accepted + kept
            at += kept + 1
    return SimulatedRounds(tokens, spent, rounds, drafted, accepted)


def _climb(
    filled: list[int], place: int, rows: int, spans: Sequence[tuple[int, int]], through: Callable[[int, int], float]
) -> float:
    """Bring all rows of the round through the spans up to ``place``: those at one depth together, the lowest first."""
    spent, span = 0.0, 0
    while span <= place:
        last = span
        while last < place and filled[last + 1] == filled[span]:
            last += 1
        if (lag := rows - filled[span]) > 0:
            spent += through(spans[last][1] - spans[span][0], lag)
        filled[span : last + 1] = [rows] * (last + 1 - span)
        span = last + 1
    return spent
