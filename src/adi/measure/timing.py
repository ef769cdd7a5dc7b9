"""One generation as a benchmark sees it: the task, what came of it, and adi's own way to do it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from adi.decoding.policies import Policy
from adi.decoding.records import Step
from adi.decoding.session import Session
from adi.model.checkpoint import Model


@dataclass(frozen=True)
class Task:
    """One generation to do: the prompt's tokens, how many new ones at most, and the tokens that end it."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    ends: frozenset[int]


@dataclass(frozen=True)
class Outcome:
    """One generation: its tokens, wall-clock seconds for all of it and to the first token; rounds and drafts where known."""

    token_ids: tuple[int, ...]
    seconds: float
    ttft_seconds: float
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


def timed(model: Model, policy: Policy, token_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
    """One generation by adi with its wall-clock times, the session's own making included."""
    start = time.perf_counter()
    session = Session(model, token_ids, policy, max_new_tokens=max_new_tokens)
    steps = [event for event in session if isinstance(event, Step)]
    seconds, c = time.perf_counter() - start, session.counters
    return Outcome(tuple(s.token for s in steps), seconds, steps[0].seconds, c.rounds, c.drafted, c.accepted)
