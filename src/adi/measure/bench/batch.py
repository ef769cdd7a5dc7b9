"""Groups of prompts in one batch against the same prompts one by one, in turn and in the same process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from adi.measure.bench.summary import interval
from adi.measure.bench.timing import Outcome, Pair, Task, Together
from adi.measure.bench.worker import System

WARM_UP_TOKENS = 4


def batching(contestants: Sequence[System]) -> list[System]:
    """Those whose batches are measured: full depth, where nothing but the sharing of passes can make a difference."""
    return [c for c in contestants if c.name.startswith("adi:full:") and c.error is None and c.batch_error is None]


def groups_of(prompts: Sequence[int], size: int) -> list[Sequence[int]]:
    """Groups of ``size`` distinct prompts each; what is left over joins none."""
    return [prompts[at : at + size] for at in range(0, len(prompts) - size + 1, size)]


def run_groups(
    contestants: Sequence[System],
    tasks: Sequence[Task],
    groups: Sequence[Sequence[int]],
    save: Callable[[], None],
    forced_read: Callable[[str], None],
) -> None:
    """Every group that is not finished, by each of adi's full depths; ``save`` after each.

    What goes wrong here is a line of its own in the result and leaves the runs before it as they are.
    """
    for place, group in enumerate(groups):
        mine = [tasks[p] for p in group]
        for contestant in batching(contestants):
            if group[0] in contestant.pairs:
                continue
            forced_read(f"{contestant.name}, batch {place + 1} of {len(groups)}")
            found = _pair(contestant, mine, batch_first=place % 2 == 0)
            if found is None:
                contestant.batch_error, contestant.error = contestant.error, None
            else:
                contestant.pairs[group[0]] = found
        save()


def _pair(contestant: System, tasks: Sequence[Task], *, batch_first: bool) -> Pair | None:
    """One group both ways; None once something went wrong, which the contestant's ``error`` tells."""
    contestant.ask("batch", [replace(task, max_new_tokens=min(WARM_UP_TOKENS, task.max_new_tokens)) for task in tasks])
    together: Together | None = contestant.ask("batch", tasks) if batch_first else None
    alone: list[Outcome | None] = [contestant.ask("run", task) for task in tasks]
    if not batch_first:
        together = contestant.ask("batch", tasks)
    outcomes = [outcome for outcome in alone if outcome is not None]
    if together is None or len(outcomes) < len(tasks):
        return None
    return Pair(
        batch_seconds=together.seconds,
        batch_tokens=sum(map(len, together.token_ids)),
        alone_seconds=sum(outcome.seconds for outcome in outcomes),
        alone_tokens=sum(len(outcome.token_ids) for outcome in outcomes),
        same=[outcome.token_ids for outcome in outcomes] == list(together.token_ids),
    )


def batch_entries(contestants: Sequence[System], size: int | None, restarts: int, seed: int) -> list[dict[str, Any]]:
    """The figures of each contestant that ran batches, or its error: tokens per second both ways and their ratio.

    ``same`` says whether every prompt of every group got the same tokens in the batch as alone.
    """
    ran = [c for c in contestants if c.pairs or c.batch_error is not None]
    return [_entry(c, size, restarts, seed) for c in ran]


def _entry(contestant: System, size: int | None, restarts: int, seed: int) -> dict[str, Any]:
    pairs = contestant.pairs
    known = {"name": contestant.name, "batch": size, "groups": len(pairs), "error": contestant.batch_error}
    if not pairs:
        return known
    found = interval({first: pair.ratio for first, pair in pairs.items()}, restarts, seed)
    return {
        **known,
        "batch_tokens_per_second": median(pair.batch_tokens / pair.batch_seconds for pair in pairs.values()),
        "alone_tokens_per_second": median(pair.alone_tokens / pair.alone_seconds for pair in pairs.values()),
        "median": found.median,
        "low": found.low,
        "high": found.high,
        "same": all(pair.same for pair in pairs.values()),
    }
