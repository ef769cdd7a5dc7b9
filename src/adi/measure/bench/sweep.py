"""The best static choice: always draft from one depth, always so many tokens. What adaptive depth has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any

from adi.artifact import Exits
from adi.decoding.policies import FullDepth, Policy, Static
from adi.measure.bench.timing import Outcome, timed
from adi.model.load import Model

DRAFT_LENGTHS = (1, 2, 4, 6)
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Tried:
    """One depth and draft length: median tokens per second over the prompts, and the share of drafts accepted."""

    depth: int
    draft_tokens: int
    tokens_per_second: float
    accepted_share: float | None


@dataclass(frozen=True)
class Sweep:
    """The whole grid, with full depth on the same prompts beside it."""

    prompts: int
    max_new_tokens: int
    full_tokens_per_second: float
    grid: tuple[Tried, ...]

    @property
    def best(self) -> tuple[int, int]:
        """The fastest depth and draft length."""
        fastest = max(self.grid, key=lambda tried: tried.tokens_per_second)
        return fastest.depth, fastest.draft_tokens

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best": list(self.best)}


def sweep(model: Model, exits: Exits, prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> Sweep:
    """Every depth that can draft with every draft length on the same prompts, in turn: a drifting machine wrongs none."""
    choices = list(product(Static.depths_of(exits), DRAFT_LENGTHS))
    policies: list[Policy] = [FullDepth(), *(Static(exits, *choice) for choice in choices)]
    for policy in policies:
        timed(model, policy, prompts[0], WARM_UP_TOKENS)
    found: list[list[Outcome]] = [[] for _ in policies]
    for ids in prompts:
        for place, policy in enumerate(policies):
            found[place].append(timed(model, policy, ids, max_new_tokens))
    speeds = [median(o.tokens_per_second for o in outcomes) for outcomes in found]
    grid = tuple(
        Tried(depth, draft, speeds[place], accepted_share(found[place])) for place, (depth, draft) in enumerate(choices, 1)
    )
    return Sweep(len(prompts), max_new_tokens, speeds[0], grid)


def accepted_share(outcomes: Sequence[Outcome]) -> float | None:
    """Accepted drafts over all drafts, None where there was none."""
    drafted = sum(o.drafted or 0 for o in outcomes)
    return sum(o.accepted or 0 for o in outcomes) / drafted if drafted else None
