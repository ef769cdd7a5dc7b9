"""Prompt lookup: drafts are what followed the last tokens when they stood in the text before.

After Saxena 2023 (prompt lookup decoding). No block runs for a draft; full depth verifies all of them in one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from adi.decoding.sequence import Advance, Plan, Proposed, Proposing, SequenceLogic, in_rounds
from adi.exits.memory import Ngrams


def lookup(plan: Plan, draft_tokens: int, ngram: int) -> SequenceLogic:
    """Draft what the text itself says comes next, verify it in one pass."""
    return in_rounds(plan, draft_tokens, functools.partial(_propose, plan, Ngrams(ngram)))


def _propose(plan: Plan, ngrams: Ngrams, text: Sequence[int], most: int) -> Proposing:
    """Drafts from memory, up to one that ends the text: nothing follows it, so it need not enter the network."""
    drafts: list[Proposed] = []
    recall = ngrams.find(text, most)
    for token in recall.tokens if recall else ():
        drafts.append(Proposed(token, 0, (), "memory"))
        yield drafts[-1]
        if plan.ends(token):
            break
    rows = (text[-1], *(d.token for d in drafts if not plan.ends(d.token)))
    readings = yield Advance(len(text) - 1, rows, plan.layers, len(rows))
    return drafts, (), readings
