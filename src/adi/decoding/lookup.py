"""Prompt lookup: drafts are what followed the last tokens when they stood in the text before.

After Saxena 2023 (prompt lookup decoding). No block runs for a draft; full depth verifies all of them in one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from adi.decoding.speculate import DraftToken, Forward, Proposing, Request, SequenceLogic, speculate
from adi.drafters.ngram import NgramIndex


def lookup(plan: Request, draft_tokens: int, ngram: int) -> SequenceLogic:
    """Draft what the text itself says comes next, verify it in one pass."""
    return speculate(plan, draft_tokens, functools.partial(_propose, plan, NgramIndex(ngram)))


def _propose(plan: Request, ngrams: NgramIndex, text: Sequence[int], most: int) -> Proposing:
    """Drafts from memory, up to one that ends the text: nothing follows it, so it need not enter the network."""
    drafts: list[DraftToken] = []
    recall = ngrams.find(text, most)
    for token in recall.tokens if recall else ():
        drafts.append(DraftToken(token, 0, (), "memory"))
        yield drafts[-1]
        if plan.ends(token):
            break
    rows = (text[-1], *(d.token for d in drafts if not plan.ends(d.token)))
    readings = yield Forward(len(text) - 1, rows, plan.layers, len(rows))
    return drafts, (), readings
