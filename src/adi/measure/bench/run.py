"""``bench``: contestants in turn on the same prompts, in one run; medians of per-prompt ratios with their interval.

Every prompt is run by every contestant before the next prompt begins, in an order that turns with the prompt, so that a
machine whose speed drifts wrongs nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adi.errors import AdiError
from adi.measure.bench.batch import batch_entries, batching, groups_of, run_groups
from adi.measure.bench.resume import Partial
from adi.measure.bench.summary import part_of, ratio_entries, run_entry
from adi.measure.bench.systems import Setting
from adi.measure.bench.timing import Task
from adi.measure.bench.worker import System, prepare
from adi.measure.provenance import provenance
from adi.prompts import PromptItem, read_prompts, spread

FORMAT, VERSION = "adi-bench", 2
WARM_UP_TOKENS = 8
SWEEP_SET, SWEEP_PROMPTS, SWEEP_TOKENS = "train", 4, 48  # the set that exits are trained on
SPARE = 64  # positions beyond prompt and answer, for drafts that overshoot
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Extent:
    """How much to run. ``prompt_tokens`` makes every prompt exactly so long; ``sweep`` chooses static mode's setting.

    With ``restarts`` the prompts are dealt out to so many processes of each contestant, one after the other: what luck a
    process has (where its memory lies may be worth a tenth of its speed) then shows in the intervals. With ``batch``, after
    the paired runs, each of adi's full depths also meets groups of so many prompts in one batch and one by one.
    """

    max_new_tokens: int = 128
    repeats: int = 1
    prompt_tokens: int | None = None
    sweep: bool = False
    restarts: int = 1
    batch: int | None = None


def bench(
    names: Sequence[str],
    items: Sequence[PromptItem],
    setting: Setting,
    extent: Extent,
    *,
    command: str = "",
    result: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Run all contestants on all prompts (first turns) and return the result document.

    At least one must be one of adi's modes: it encodes the prompts for everybody. A contestant that cannot run is listed
    with its error. With ``result``, where the document will be written, prompts that are finished are kept beside it until
    ``finished`` is called, and the same benchmark goes on with the rest.
    """
    names = list(dict.fromkeys(names))
    _check(extent, len(items))
    facts = provenance(command, items)
    partial = _partial(names, facts, setting, extent, result)
    sweeps = partial.sweeps() if partial else {}
    progress(0, 0, "preparing")
    prepare(names, setting)
    for name in names:
        if extent.sweep and name.startswith("adi:static:") and name not in sweeps:
            progress(0, 0, f"sweeping for {name}")
            sweeps[name] = _swept(name, setting)
            if partial:
                partial.save([], sweeps)
    contestants = [System(name, _own(setting, sweeps.get(name)), sweep=sweeps.get(name)) for name in names]
    if partial:
        partial.restore(contestants)

    def save() -> None:
        if partial:
            partial.save(contestants, sweeps)

    for part in _parts(contestants, len(items), extent):
        try:
            tasks = _start(contestants, items, extent, lambda what: progress(0, 0, what))
            _run(contestants, tasks, part, extent, save, progress)
            if extent.batch is not None:
                run_groups(contestants, tasks, groups_of(part, extent.batch), save, lambda what: progress(0, 0, what))
        finally:
            for contestant in contestants:
                contestant.stop()
    return {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        **asdict(setting),
        **asdict(extent),
        "precision": list(dict.fromkeys(n.rpartition(":")[2] for n in names if n.startswith("adi:"))),
        "device": "cpu",
        "runs": [run_entry(c, contestants, items, extent.restarts) for c in contestants],
        "ratios": ratio_entries(contestants, items, setting.seed, extent.restarts),
        "batches": batch_entries(contestants, extent.batch, extent.restarts, setting.seed),
    }


def finished(result: Path) -> None:
    """The document is written: what was kept for resuming goes."""
    Partial.beside(result, {}).discard()


def of_length(prompt: str, tokens: int, encode: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
    """The prompt as exactly ``tokens`` tokens: its own text repeated, cut before what the chat template ends with.

    ValueError where the template alone is longer.
    """
    short, other = encode(prompt), encode("x")
    tail = next((i for i, (a, b) in enumerate(zip(short[::-1], other[::-1], strict=False)) if a != b), len(other))
    if tokens <= len(other):
        raise AdiError(f"--prompt-tokens {tokens} is too short: the chat template alone takes {len(other)} tokens.")
    text = prompt
    while len(long := encode(text)) < tokens:
        text = f"{text}\n{text}"
    return long[: tokens - tail] + long[len(long) - tail :]


def _partial(
    names: Sequence[str], facts: dict[str, Any], setting: Setting, extent: Extent, result: Path | None
) -> Partial | None:
    if result is None:
        return None
    kept = {name: facts[name] for name in ("prompts_hash", "versions", "machine")}
    own = asdict(setting) | {"static": list(setting.static) if setting.static else None, "files": _files(setting)}
    return Partial.beside(result, {"contestants": list(names), **kept, **own, **asdict(extent)})


def _files(setting: Setting) -> str:
    """What tells exits and a model of the same names apart: when their files were written, and how long they are."""
    found = []
    for name in (setting.exits, setting.model):
        place = Path(name) if name else None
        if place is not None and place.exists():
            states = [(f.name, f.stat()) for f in sorted(place.iterdir() if place.is_dir() else [place]) if f.is_file()]
            found += [(file, state.st_size, state.st_mtime_ns) for file, state in states]
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _check(extent: Extent, prompts: int) -> None:
    if not 1 <= extent.restarts <= prompts:
        raise AdiError(
            f"--restarts is {extent.restarts} and there are {prompts} prompts; it must be at least 1, and no more than these."
        )
    smallest = prompts // extent.restarts
    if extent.batch is not None and not 2 <= extent.batch <= smallest:
        raise AdiError(
            f"--batch is {extent.batch}; it must be at least 2, and at most the {smallest} prompts that each process gets."
        )


def _parts(contestants: Sequence[System], prompts: int, extent: Extent) -> list[list[int]]:
    """The prompts of each restart that has something left to do; of the last one, if none has, to see who is there.

    An interrupted part goes on in new processes, and still counts as one.
    """
    done = {p for c in contestants for p in c.outcomes}
    parts = [[p for p in range(prompts) if part_of(p, extent.restarts) == i] for i in range(extent.restarts)]

    def unfinished(part: list[int]) -> bool:
        groups = groups_of(part, extent.batch) if extent.batch is not None else []
        return not done.issuperset(part) or any(group[0] not in c.pairs for group in groups for c in batching(contestants))

    return [part for part in parts if unfinished(part)] or parts[-1:]


def _own(setting: Setting, swept: dict[str, Any] | None) -> Setting:
    return replace(setting, static=(swept["best"][0], swept["best"][1])) if swept else setting


def _swept(name: str, setting: Setting) -> dict[str, Any]:
    """The sweep for one static contestant, on prompts that the benchmark does not use."""
    items = spread(read_prompts(SWEEP_SET), SWEEP_PROMPTS)
    sweeper = System(name, replace(setting, static=None))
    try:
        sweeper.start()
        sweeper.ready()
        prompts = [sweeper.ask("encode", item.prompt) for item in items]
        found: dict[str, Any] | None = sweeper.ask("sweep", prompts, SWEEP_TOKENS)
    finally:
        sweeper.stop()
    if found is None:
        raise AdiError(f"the sweep for {name} failed: {sweeper.error}")
    return found


def _start(
    contestants: Sequence[System], items: Sequence[PromptItem], extent: Extent, forced_read: Callable[[str], None]
) -> list[Task]:
    """Load everybody and warm up; adi's modes first, since one of them encodes the prompts and knows how long they are."""
    own = [c for c in contestants if c.name.startswith("adi:")]
    _load(own, forced_read)
    speaker = next((c for c in own if c.error is None), None)
    if speaker is None:
        raise AdiError(f"{own[0].name} cannot run, and it gives the others their tokens: {own[0].error}")
    length = extent.prompt_tokens

    def encode(text: str) -> tuple[int, ...]:
        ids: tuple[int, ...] | None = speaker.ask("encode", text)
        if ids is None:
            raise AdiError(f"{speaker.name} cannot encode the prompts: {speaker.error}")
        return ids

    encoded = [encode(i.prompt) if length is None else of_length(i.prompt, length, encode) for i in items]
    _fit(encoded, extent.max_new_tokens, speaker.details.get("spec", {}).get("context"))
    tasks = [Task(ids, extent.max_new_tokens, speaker.ends) for ids in encoded]
    context = max(len(ids) for ids in encoded) + extent.max_new_tokens + SPARE
    others = [c for c in contestants if c not in own]
    for contestant in others:
        contestant.setting = replace(contestant.setting, context=context)
    _load(others, forced_read)
    for contestant in contestants:
        forced_read(f"warming up {contestant.name}")
        contestant.run(replace(tasks[0], max_new_tokens=min(WARM_UP_TOKENS, extent.max_new_tokens)))
    return tasks


def _fit(encoded: Sequence[Sequence[int]], new: int, context: int | None) -> None:
    """ValueError for a prompt that has no room for its answer: better now than in the middle."""
    longest = max(range(len(encoded)), key=lambda place: len(encoded[place]))
    if context is not None and len(encoded[longest]) + new > context:
        raise AdiError(
            f"prompt {longest + 1} has {len(encoded[longest])} tokens, and with --max-new-tokens {new} that is more than the "
            f"model's context of {context}: shorten it, or ask for fewer tokens."
        )


def _load(contestants: Sequence[System], forced_read: Callable[[str], None]) -> None:
    """Everybody at once: nothing is measured yet."""
    for contestant in contestants:
        contestant.start()
    for contestant in contestants:
        forced_read(f"loading {contestant.name}")
        contestant.ready()


def _run(
    contestants: Sequence[System],
    tasks: Sequence[Task],
    part: Sequence[int],
    extent: Extent,
    save: Callable[[], None],
    progress: Progress,
) -> None:
    """Every prompt of this part that is not finished, ``repeats`` times by everybody; ``save`` after each."""
    finished_before = {p for c in contestants for p in c.outcomes}
    each = extent.repeats * len(contestants)
    total, done = len(tasks) * each, len(finished_before) * each
    for place, i in enumerate(part):
        if i in finished_before:
            continue
        for repeat in range(extent.repeats):
            turn = (place + repeat) % len(contestants)
            for contestant in [*contestants[turn:], *contestants[:turn]]:
                outcome = contestant.run(tasks[i])
                if outcome is not None:
                    contestant.outcomes.setdefault(i, []).append(outcome)
                done += 1
                progress(done, total, contestant.name)
        save()
