"""Tokens per second of drafting at exits, worked out from recorded readings and measured costs instead of being run.

The rounds are those of ``decoding.sequence.verified`` on the frontier: a draft climbs from stop to stop until its rule fires,
rows that lag are brought along, and full depth runs what is missing. Behind a wrong draft the rows are those of another text;
what the rule would say there is taken to be what it said of the right text's rows, and all of it is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from adi.measure.trigger_study.cost import Cost

Flags = Sequence[Sequence[bool]]


@dataclass(frozen=True)
class PassSeconds:
    """A pass over so many blocks and rows: ``entry`` for going in, ``block`` for each; and the model's own head.

    The last two by number of rows, on straight lines between measured ones and beyond them.
    """

    rows: tuple[int, ...]
    entry: float
    block: tuple[float, ...]
    head: tuple[float, ...]

    @classmethod
    def of(cls, cost: Cost, layers: int) -> PassSeconds:
        """From the times of all blocks and of the first half of them.

        More rows never cost less, whatever the clock of a busy machine says: or choices would be made by its noise.
        """
        half = max(1, layers // 2)
        deep = layers - half
        pairs = zip(cost.blocks_seconds, cost.block_seconds, strict=True)
        entry = max(0.0, median((layers * half * one - half * whole) / deep for whole, one in pairs)) if deep else 0.0
        return cls(cost.rows, entry, _rising([(t - entry) / layers for t in cost.blocks_seconds]), _rising(cost.head_seconds))

    def through(self, blocks: int, rows: int) -> float:
        return self.entry + blocks * _at(self.rows, self.block, rows)

    def full(self, blocks: int, rows: int) -> float:
        """The same with the model's head."""
        return self.through(blocks, rows) + _at(self.rows, self.head, rows)


@dataclass(frozen=True)
class Recorded:
    """One text's rows at some stops: whether the exit was right, whether the rule fired, and the seconds that asking it took,
    each by row and stop. The first row is the prompt's last, which full depth decides."""

    right: Flags
    fires: Flags
    asking: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Rounds:
    """What drafting came to: tokens after the first, seconds, passes that reached full depth, drafts made and kept."""

    tokens: int
    seconds: float
    rounds: int
    drafted: int
    accepted: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def drafting(texts: Sequence[Recorded], stops: Sequence[int], layers: int, draft_tokens: int, passes: PassSeconds) -> Rounds:
    """All texts, one after the other, at most ``draft_tokens`` drafts a round."""
    costs: dict[tuple[int, int], float] = {}

    def through(lo: int, hi: int, rows: int) -> float:
        key = (hi - lo, rows)
        if key not in costs:
            costs[key] = passes.through(*key)
        return costs[key]

    tokens = rounds = drafted = accepted = 0
    spent = 0.0
    for text in texts:
        at, end = 1, len(text.right)
        tokens += max(0, end - 1)
        while at < end:
            drafts, kept, right = 0, 0, True
            filled = [0] * (len(stops) + 1)  # rows of this round that have passed each piece between stops
            spans = tuple(zip((0, *stops), (*stops, layers), strict=True))
            believed = True
            while believed and drafts < min(draft_tokens, end - at - 1):
                row, believed = at + drafts, False
                for place in range(len(stops)):
                    spent += _climb(filled, place, drafts + 1, spans, through) + text.asking[row][place]
                    if text.fires[row][place]:
                        believed = True
                        right = right and text.right[row][place]
                        drafts, kept = drafts + 1, kept + right
                        break
            rows = drafts + 1
            spent += _climb(filled, len(stops), rows, spans, through) + _at(passes.rows, passes.head, rows)
            rounds, drafted, accepted = rounds + 1, drafted + drafts, accepted + kept
            at += kept + 1
    return Rounds(tokens, spent, rounds, drafted, accepted)


def _climb(
    filled: list[int], place: int, rows: int, spans: Sequence[tuple[int, int]], through: Callable[[int, int, int], float]
) -> float:
    """Bring all rows of the round through the pieces up to ``place``: those that stand level together, the lowest first."""
    spent, piece = 0.0, 0
    while piece <= place:
        last = piece
        while last < place and filled[last + 1] == filled[piece]:
            last += 1
        if (lag := rows - filled[piece]) > 0:
            spent += through(spans[piece][0], spans[last][1], lag)
        filled[piece : last + 1] = [rows] * (last + 1 - piece)
        piece = last + 1
    return spent


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest values that never fall, neighbours that do being pooled (isotonic regression)."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return tuple(mean(group) for group in groups for _ in group)


def _at(rows: Sequence[int], values: Sequence[float], count: int) -> float:
    """On the line between measured neighbours, and past the last along the last slope."""
    for a, b in zip(range(len(rows)), range(1, len(rows)), strict=False):
        if count <= rows[b] or b == len(rows) - 1:
            slope = (values[b] - values[a]) / (rows[b] - rows[a])
            return max(0.0, values[a] + slope * (count - rows[a]))
    return values[0]
