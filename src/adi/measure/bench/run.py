"""``bench``: systems in turn on the same prompts, in one run; medians of per-prompt ratios with their interval.

Every prompt is run by every system before the next prompt begins, in an order that rotates with the prompt, so that a machine
whose speed drifts favours nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adi.errors import UsageError
from adi.measure.bench.outcomes import Setting, Sweep, Task
from adi.measure.bench.resume import ResumeFile
from adi.measure.bench.summary import batch_entries, part_of, ratio_entries, run_entry
from adi.measure.bench.worker import System, prepare
from adi.measure.provenance import files_hash, provenance
from adi.measure.statistics import common_prefix
from adi.progress import Progress, no_progress
from adi.prompts import PromptItem, read_prompts, spread

FORMAT, VERSION = "adi-bench", 2
WARM_UP_TOKENS, BATCH_WARM_UP_TOKENS = 8, 4
SWEEP_SET, SWEEP_PROMPTS, SWEEP_TOKENS = "train", 4, 48  # the set that exits are trained on
BATCHING = ("adi:", "openvino-genai:")
SPARE = 64  # positions beyond prompt and answer, for drafts that overshoot


@dataclass(frozen=True)
class Extent:
    """How much to run. ``prompt_tokens`` makes every prompt exactly so long; ``sweep`` chooses static mode's setting.

    With ``restarts`` the prompts are dealt out to so many processes of each system, one after the other: where a process lies
    in memory may be worth a tenth of its speed, and that then shows in the intervals. With sizes in ``batch``, after the paired
    runs, each system that can also runs all prompts in groups of each size, a group at once, in turn.
    """

    max_new_tokens: int = 128
    repeats: int = 1
    prompt_tokens: int | None = None
    sweep: bool = False
    restarts: int = 1
    batch: tuple[int, ...] = ()

    def check(self, prompts: int) -> None:
        """AdiError where so many prompts cannot be dealt out so."""
        if not 1 <= self.restarts <= prompts:
            raise UsageError(f"--restarts is {self.restarts} and there are {prompts} prompts; it must be from 1 to {prompts}.")
        smallest = prompts // self.restarts
        for size in self.batch:
            if not 1 <= size <= smallest:
                raise UsageError(
                    f"--batch is {size}; it must be at least 1, and at most the {smallest} prompts that each process gets."
                )

    def parts(self, prompts: int) -> list[list[int]]:
        """The prompts of each restart."""
        return [[p for p in range(prompts) if part_of(p, self.restarts) == i] for i in range(self.restarts)]

    def groups(self, part: Sequence[int]) -> list[Sequence[int]]:
        """Distinct prompts for each batch of a size, sizes in their order; what is left over joins none."""
        return [part[at : at + size] for size in self.batch for at in range(0, len(part) - size + 1, size)]


def bench(
    names: Sequence[str],
    items: Sequence[PromptItem],
    setting: Setting,
    extent: Extent,
    *,
    command: str = "",
    result: Path | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Run all systems on all prompts (first turns) and return the result document.

    At least one must be one of adi's modes: it encodes the prompts for everybody. A system that cannot run is listed with its
    error. With ``result``, where the document will be written, prompts that are finished are kept beside it until the
    ``ResumeFile`` is discarded, and the same benchmark resumes with the rest.
    """
    names = list(dict.fromkeys(names))
    extent.check(len(items))
    facts = provenance(command, items)
    resume = ResumeFile(result, _terms(names, facts, setting, extent))
    kept = resume.read()
    progress(0, 0, "preparing")
    prepare(names, setting)
    sweeps = dict(kept.sweeps)
    for name in names:
        if extent.sweep and name.startswith("adi:static:") and name not in sweeps:
            progress(0, 0, f"sweeping for {name}")
            sweeps[name] = _swept(name, setting)
            resume.save([], sweeps)
    systems = [
        System(name, replace(setting, static=swept.best), sweep=swept) if (swept := sweeps.get(name)) else System(name, setting)
        for name in names
    ]
    kept.restore(systems)
    _Bench(systems, items, extent, progress, lambda: resume.save(systems, sweeps)).run()
    return {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        **asdict(setting),
        **asdict(extent),
        "precision": list(dict.fromkeys(n.rpartition(":")[2] for n in names if n.startswith("adi:"))),
        "device": "cpu",
        "runs": [run_entry(s, systems, items, extent.restarts) for s in systems],
        "ratios": ratio_entries(systems, items, setting.seed, extent.restarts),
        "batches": batch_entries(systems, extent.restarts, setting.seed),
    }


def of_length(prompt: str, tokens: int, encode: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
    """The prompt as exactly ``tokens`` tokens: its own text repeated, cut before what the chat template ends with.

    AdiError where the template alone is longer.
    """
    short, other = encode(prompt), encode("x")
    tail = common_prefix(short[::-1], other[::-1])
    if tokens <= len(other):
        raise UsageError(f"--prompt-tokens {tokens} is too short: the chat template alone takes {len(other)} tokens.")
    text = prompt
    while len(long := encode(text)) < tokens:
        text = f"{text}\n{text}"
    return long[: tokens - tail] + long[len(long) - tail :]


def _terms(names: Sequence[str], facts: dict[str, Any], setting: Setting, extent: Extent) -> dict[str, Any]:
    """All that outcomes depend on."""
    files = files_hash(*(Path(name) for name in (setting.exits, setting.model) if name))
    where = {name: facts[name] for name in ("prompts_hash", "versions", "machine")}
    own = asdict(setting) | {"static": list(setting.static) if setting.static else None, "files": files}
    return {"systems": list(names), **where, **own, **asdict(extent), "batch": list(extent.batch)}


def _swept(name: str, setting: Setting) -> Sweep:
    """The sweep for one static system, on prompts that the benchmark does not use."""
    items = spread(read_prompts(SWEEP_SET), SWEEP_PROMPTS)
    sweeper = System(name, replace(setting, static=None))
    try:
        sweeper.start()
        sweeper.ready()
        prompts = [sweeper.ask("encode", item.prompt) for item in items]
        found: Sweep | None = sweeper.ask("sweep", prompts, SWEEP_TOKENS)
    finally:
        sweeper.stop()
    if found is None:
        raise UsageError(f"the sweep for {name} failed: {sweeper.error}")
    return found


@dataclass
class _Bench:
    """The runs of one benchmark; ``save`` keeps what is finished."""

    systems: Sequence[System]
    items: Sequence[PromptItem]
    extent: Extent
    progress: Progress
    save: Callable[[], None]

    def run(self) -> None:
        """All parts with something left to do, each in new processes; the last one, if none has, to see what loads."""
        parts = self.extent.parts(len(self.items))
        for part in [part for part in parts if not self._is_finished(part)] or parts[-1:]:
            try:
                tasks = self._start()
                self._run_prompts(tasks, part)
                self._run_batches(tasks, self.extent.groups(part))
            finally:
                for system in self.systems:
                    system.stop()

    def _is_finished(self, part: Sequence[int]) -> bool:
        groups = self.extent.groups(part)
        batched = all(group[0] in s.batches.get(len(group), ()) for group in groups for s in self._batching())
        return batched and self._finished_prompts().issuperset(part)

    def _finished_prompts(self) -> set[int]:
        return {p for system in self.systems for p in system.outcomes}

    def _batching(self) -> list[System]:
        """Whose batches are measured: all that can."""
        return [s for s in self.systems if s.name.startswith(BATCHING) and s.error is None and s.batch_error is None]

    def _start(self) -> list[Task]:
        """Load all and warm up; adi's modes first, since one of them encodes the prompts and knows how long they are."""
        own = [s for s in self.systems if s.name.startswith("adi:")]
        self._load(own)
        encoder = next((s for s in own if s.error is None), None)
        if encoder is None:
            raise UsageError(f"{own[0].name} cannot run, and it encodes the prompts for all: {own[0].error}")
        length, new = self.extent.prompt_tokens, self.extent.max_new_tokens

        def encode(text: str) -> tuple[int, ...]:
            ids: tuple[int, ...] | None = encoder.ask("encode", text)
            if ids is None:
                raise UsageError(f"{encoder.name} cannot encode the prompts: {encoder.error}")
            return ids

        encoded = [encode(i.prompt) if length is None else of_length(i.prompt, length, encode) for i in self.items]
        _check_room(encoded, new, encoder.details.get("spec", {}).get("context"))
        tasks = [Task(ids, new, encoder.ends) for ids in encoded]
        others = [s for s in self.systems if s not in own]
        for system in others:
            system.setting = replace(system.setting, context=max(map(len, encoded)) + new + SPARE)
        self._load(others)
        for system in self.systems:
            self.progress(0, 0, f"warming up {system.name}")
            system.run(replace(tasks[0], max_new_tokens=min(WARM_UP_TOKENS, new)))
        return tasks

    def _load(self, systems: Sequence[System]) -> None:
        """All at once: nothing is measured yet."""
        for system in systems:
            system.start()
        for system in systems:
            self.progress(0, 0, f"loading {system.name}")
            system.ready()

    def _run_prompts(self, tasks: Sequence[Task], part: Sequence[int]) -> None:
        """Every prompt of this part that is not finished, ``repeats`` times by each system; ``save`` after each."""
        before = self._finished_prompts()
        each = self.extent.repeats * len(self.systems)
        total, done = len(tasks) * each, len(before) * each
        for place, p in enumerate(part):
            if p in before:
                continue
            for repeat in range(self.extent.repeats):
                turn = (place + repeat) % len(self.systems)
                for system in [*self.systems[turn:], *self.systems[:turn]]:
                    if (outcome := system.run(tasks[p])) is not None:
                        system.outcomes.setdefault(p, []).append(outcome)
                    done += 1
                    self.progress(done, total, system.name)
            self.save()

    def _run_batches(self, tasks: Sequence[Task], groups: Sequence[Sequence[int]]) -> None:
        """Every group that is not finished, by each system that can, in turn; ``save`` after each.

        What goes wrong here is a line of its own in the result and leaves the paired runs as they are.
        """
        begun: set[tuple[str, int]] = set()
        for place, group in enumerate(groups):
            systems, size = self._batching(), len(group)
            turn = place % max(1, len(systems))
            for system in [*systems[turn:], *systems[:turn]]:
                self.progress(place, len(groups), f"{system.name}, {size} at once")
                found, given = system.batches.setdefault(size, {}), [tasks[p] for p in group]
                if group[0] in found:
                    continue
                if (system.name, size) not in begun:
                    begun.add((system.name, size))
                    system.ask("batch", [replace(t, max_new_tokens=min(BATCH_WARM_UP_TOKENS, t.max_new_tokens)) for t in given])
                if (outcome := system.ask("batch", given)) is None:
                    system.batch_error, system.error = system.error, None
                else:
                    found[group[0]] = outcome
            self.save()


def _check_room(encoded: Sequence[Sequence[int]], new: int, context: int | None) -> None:
    """AdiError for a prompt that leaves no room for its answer: better now than in the middle."""
    longest = max(range(len(encoded)), key=lambda place: len(encoded[place]))
    if context is not None and len(encoded[longest]) + new > context:
        raise UsageError(
            f"prompt {longest + 1} has {len(encoded[longest])} tokens, and with --max-new-tokens {new} that is more than the "
            f"model's context of {context}: shorten it, or ask for fewer tokens."
        )
