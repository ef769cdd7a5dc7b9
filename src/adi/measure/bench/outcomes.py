"""What a benchmark runs and what it gets: the setting, tasks, systems that run them, outcomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What all systems share.

    ``exits`` names trained exits, None the model's own head; ``risk`` or ``threshold`` is for reflex; ``backend`` is of adi's
    modes; ``static`` is the depth and draft length of static mode; ``context`` the longest sequence that will come;
    ``kv_precision`` is of adi's keys and values.
    """

    model: str
    exits: str | None
    threshold: float | None
    threads: int
    seed: int
    backend: str = "auto"
    static: tuple[int, int] | None = None
    context: int = 2048
    risk: float | None = None
    kv_precision: str = "auto"


@dataclass(frozen=True)
class Task:
    """One generation to do: the prompt's tokens, how many new ones at most, and the tokens that end it."""

    token_ids: Ids
    max_new_tokens: int
    ends: frozenset[int]


@dataclass(frozen=True)
class Outcome:
    """One generation: its tokens, wall-clock seconds for all of it and to the first token; rounds and drafts where known."""

    token_ids: Ids
    seconds: float
    ttft_seconds: float
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


@dataclass(frozen=True)
class BatchOutcome:
    """Several generations in one batch: each one's tokens, and wall-clock seconds for all of them."""

    token_ids: tuple[Ids, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.token_ids)) / self.seconds


@dataclass(frozen=True)
class SweepPoint:
    """One depth and draft length: median tokens per second over the prompts, and the share of drafts accepted."""

    depth: int
    draft_tokens: int
    tokens_per_second: float
    accepted_share: float | None


@dataclass(frozen=True)
class Sweep:
    """Every static choice, always so many drafts from one depth, with full depth on the same prompts beside them."""

    prompts: int
    max_new_tokens: int
    full_tokens_per_second: float
    grid: tuple[SweepPoint, ...]

    @property
    def best(self) -> tuple[int, int]:
        """The fastest depth and draft length."""
        fastest = max(self.grid, key=lambda point: point.tokens_per_second)
        return fastest.depth, fastest.draft_tokens

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best": list(self.best)}


@dataclass(frozen=True)
class Runner:
    """A loaded system. ``details`` go into its entry of the result; adi's modes also encode, know what ends, sweep, and run
    batches."""

    run: Callable[[Task], Outcome]
    details: Mapping[str, Any]
    encode: Callable[[str], Ids] | None = None
    ends: frozenset[int] = field(default=frozenset())
    sweep: Callable[[Sequence[Ids], int], Sweep] | None = None
    batch: Callable[[Sequence[Task]], BatchOutcome] | None = None


def accepted_share(outcomes: Sequence[Outcome]) -> float | None:
    """Accepted drafts over all drafts, None where there was none."""
    drafted = sum(o.drafted or 0 for o in outcomes)
    return sum(o.accepted or 0 for o in outcomes) / drafted if drafted else None
