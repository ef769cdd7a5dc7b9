"""One generation as a benchmark sees it: the task, what came of it, and adi's own way to do it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from adi.decoding.generate import generate_batch
from adi.decoding.policies import Policy
from adi.decoding.records import Step
from adi.decoding.session import Session
from adi.model.load import Model


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


@dataclass(frozen=True)
class Together:
    """Several generations in one batch: each one's tokens, and wall-clock seconds for all of them."""

    token_ids: tuple[tuple[int, ...], ...]
    seconds: float


@dataclass(frozen=True)
class Pair:
    """One group of prompts in one batch and one by one: seconds and tokens of each, and whether the tokens are the same."""

    batch_seconds: float
    batch_tokens: int
    alone_seconds: float
    alone_tokens: int
    same: bool

    @property
    def ratio(self) -> float:
        """How many times the tokens per second of one by one."""
        return (self.batch_tokens / self.batch_seconds) / (self.alone_tokens / self.alone_seconds)


def timed(model: Model, policy: Policy, token_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
    """One generation by adi with its wall-clock times, the session's own making included."""
    start = time.perf_counter()
    session = Session(model, token_ids, policy, max_new_tokens=max_new_tokens)
    steps = [event for event in session if isinstance(event, Step)]
    seconds, c = time.perf_counter() - start, session.counters
    return Outcome(tuple(s.token for s in steps), seconds, steps[0].seconds, c.rounds, c.drafted, c.accepted)


def timed_together(model: Model, policy: Policy, tasks: Sequence[Task]) -> Together:
    """All these generations, of the same length at most, in one batch."""
    (most,) = {task.max_new_tokens for task in tasks}
    start = time.perf_counter()
    found = generate_batch(model, [task.token_ids for task in tasks], policy, max_new_tokens=most, most=len(tasks))
    return Together(tuple(text.token_ids for text in found), time.perf_counter() - start)
