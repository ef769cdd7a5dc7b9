"""Prompt lookup: drafts are what followed the last tokens when they stood in the text before.

After Saxena 2023 (prompt lookup decoding). No block runs for a draft; full depth verifies all of them in one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from adi.decoding.sequence import Advance, Plan, Proposed, Proposing, SequenceLogic, in_rounds


class Ngrams:
    """Where every run of up to ``longest`` tokens last stood in a text that only grows."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 1

    def continuation(self, text: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that followed the most recent earlier run of the last tokens, the longest run first.

        What it copies may overlap what it makes: after "a b a b" it goes on as long as it is asked to. ``text`` is the
        text of the call before, or a longer one that begins with it.
        """
        self._learn(text)
        for size in range(min(self._longest, len(text)), 0, -1):
            if (start := self._after.get(tuple(text[-size:]))) is not None:
                copied: list[int] = []
                for at in range(start, start + most):
                    copied.append(text[at] if at < len(text) else copied[at - len(text)])
                return copied
        return []

    def _learn(self, text: Sequence[int]) -> None:
        """Note the runs that end before tokens not seen yet; the run that ends the text has no continuation so far."""
        for end in range(self._known, len(text)):
            for size in range(1, min(self._longest, end) + 1):
                self._after[tuple(text[end - size : end])] = end
        self._known = len(text)


def lookup(plan: Plan, draft_tokens: int, ngram: int) -> SequenceLogic:
    """Draft what the text itself says comes next, verify it in one pass."""
    return in_rounds(plan, draft_tokens, functools.partial(_propose, plan, Ngrams(ngram)))


def _propose(plan: Plan, ngrams: Ngrams, text: Sequence[int], most: int) -> Proposing:
    """Drafts from memory, up to one that ends the text: nothing follows it, so it need not enter the network."""
    drafts: list[Proposed] = []
    for token in ngrams.continuation(text, most):
        drafts.append(Proposed(token, 0, ()))
        yield drafts[-1]
        if plan.ends(token):
            break
    rows = (text[-1], *(d.token for d in drafts if not plan.ends(d.token)))
    readings = yield Advance(len(text) - 1, rows, plan.layers, len(rows))
    return drafts, (), readings
