"""Does memory grow with use? ``python tools/soak.py --generations 10000 --json OUT.json``; exit code 1 where it does.

Generations of every mode, with changing prompts and lengths, some of them given up half way and some interrupted inside
the network. Looked at again and again: private memory, blocks of KV memory that sequences hold, sequences alive, open
files, threads.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import adi
from adi.artifact import shipped
from adi.decoding.frontier import Frontier
from adi.measure.provenance import provenance
from adi.prompts import PromptItem, read_prompts

MIB = 2**20
KINDS = (
    *("full", "verified", "reflex", "lookup", "exits", "sampled", "cancelled", "verified", "interrupted", "reflex sampled"),
    *("batch", "cancelled", "full", "batch cancelled"),
)
TOGETHER = 4  # texts of a batch
LONG_WORDS = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """What the process holds after so many generations.

    ``private_bytes`` are resident pages that no file stands behind: the kernel may take the others (weights) away and bring
    them back, so growth is measured by these. ``kv_pages`` is None where the engine has no pool of them.
    """

    generations: int
    seconds: float
    resident_bytes: int
    private_bytes: int
    kv_pages: int | None
    sequences_alive: int
    open_files: int
    threads: int


def look(model: adi.Model, generations: int, seconds: float) -> Sample:
    """Without collecting garbage before: what waits for that is memory too."""
    alive = sum(type(thing) is Frontier for thing in gc.get_objects())
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (s.partition(":") for s in lines) if name in ("VmRSS", "RssAnon")}
    counts = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]  # noqa: PTH208
    pool = getattr(model.backbone, "pool", None)
    held = (1024 * kib["VmRSS"], 1024 * kib["RssAnon"], None if pool is None else pool.used)
    return Sample(generations, round(seconds, 1), *held, alive, *counts)


@dataclass(frozen=True)
class Work:
    """What there is to do: a model, its exits, an entropy below which reflex mode uses them, and texts to begin from."""

    model: adi.Model
    exits: adi.Exits
    threshold: float
    texts: Sequence[str]
    most_new_tokens: int = 8

    def do(self, kind: str, number: int) -> int:
        """One piece of work of that kind, never the same twice; how many generations it was."""
        dice = random.Random(number)
        asked = [self._prompt(number + i, dice) for i in range(TOGETHER if kind.startswith("batch") else 1)]
        length, reflex = dice.randint(2, self.most_new_tokens), adi.Reflex(self.exits, thresholds=self.threshold)
        drafting = None if self.exits.drafter is None else self.exits
        policy, options = adi.Verified(drafting), {"max_new_tokens": length, "raw": True, "stop_at_eos": False}
        match kind:
            case "full":
                adi.generate(self.model, asked[0], adi.FullDepth(), **options)
            case "verified":
                adi.generate(self.model, asked[0], policy, **options)
            case "exits":
                adi.generate(self.model, asked[0], adi.Verified(self.exits, draft_tokens=4), **options)
            case "reflex":
                adi.generate(self.model, asked[0], reflex, logprobs=2 * (number % 2) or None, **options)
            case "lookup":
                adi.generate(self.model, asked[0], adi.Lookup(), **options)
            case "sampled" | "reflex sampled":
                chosen = policy if kind == "sampled" else reflex
                adi.generate(self.model, asked[0], chosen, temperature=0.8, top_p=0.9, seed=number, **options)
            case "cancelled":
                steps = adi.stream(self.model, asked[0], dice.choice([policy, reflex, adi.FullDepth()]), **options)
                list(itertools.islice(steps, length // 2))
                steps.close()  # type: ignore[attr-defined]
            case "interrupted":
                interrupted(self.model, dice.randint(1, length), lambda: adi.generate(self.model, asked[0], policy, **options))
            case "batch":
                adi.generate_batch(self.model, asked, dice.choice([policy, reflex, adi.FullDepth()]), **options)
            case "batch cancelled":
                calls = dice.randint(1, length)
                interrupted(self.model, calls, lambda: adi.generate_batch(self.model, asked, policy, **options))
        return len(asked)

    def _prompt(self, number: int, dice: random.Random) -> str:
        """A number and the beginning of some text; now and then a long one."""
        words = itertools.cycle(self.texts[number % len(self.texts)].split())
        most = LONG_WORDS if number % 50 == 0 else dice.randint(1, 12)
        return f"{number}. {' '.join(itertools.islice(words, most))}"


def interrupted(model: adi.Model, calls: int, do: Callable[[], object]) -> None:
    """As if Ctrl-C came while so many passes have begun."""
    backbone: Any = model.backbone
    forward, left = backbone.forward, itertools.count(calls, -1)

    def failing(*args: Any, **options: Any) -> Any:
        if next(left) <= 1:
            raise KeyboardInterrupt
        return forward(*args, **options)

    backbone.forward = failing
    try:
        do()
    except KeyboardInterrupt:
        pass
    finally:
        del backbone.forward


def soak(
    work: Work,
    generations: int,
    every: int,
    on_sample: Callable[[Sample], object] = lambda sample: None,
    after_each: Callable[[], object] = lambda: None,
) -> tuple[list[Sample], dict[str, int]]:
    """Samples every so many generations, the first before any; and how many there were of each kind. ``after_each`` is called
    after each piece of work: a test leaks there."""
    started, done, kinds = time.monotonic(), 0, Counter[str]()
    samples = [look(work.model, 0, 0.0)]
    for kind in itertools.cycle(KINDS):
        if done >= generations:
            return samples, dict(kinds)
        count = work.do(kind, done)
        after_each()
        done, kinds[kind] = done + count, kinds[kind] + count
        if done // every > samples[-1].generations // every or done >= generations:
            samples.append(look(work.model, done, time.monotonic() - started))
            on_sample(samples[-1])
    raise AssertionError("the kinds never end")


def judged(samples: Sequence[Sample], warm_up: int, most_growth_mib: float) -> dict[str, Any]:
    """Growth after the warm-up, its slope by Theil and Sen with an interval, and what is wrong, in sentences.

    Growth is from the median of the first tenth of what comes after the warm-up to the median of the last tenth. The interval
    takes samples for independent, which they are not quite.
    """
    from scipy.stats import theilslopes

    warm = [sample for sample in samples if sample.generations >= warm_up]
    tenth = max(1, len(warm) // 10)
    begin, end = (statistics.median(s.private_bytes for s in part) / MIB for part in (warm[:tenth], warm[-tenth:]))
    thousands = [s.generations / 1000 for s in warm]
    slope, _, low, high = theilslopes([s.private_bytes / MIB for s in warm], thousands, alpha=CONFIDENCE)
    wrong = []
    if end - begin > most_growth_mib:
        wrong.append(f"private memory grew by {end - begin:.1f} MiB after the warm-up; {most_growth_mib:g} MiB are allowed.")
    for name, what in (("kv_pages", "blocks of KV memory are still held"), ("sequences_alive", "sequences are still alive")):
        if most := max(getattr(s, name) or 0 for s in samples):
            wrong.append(f"between generations {most} {what}.")
    for name in ("open_files", "threads"):
        first, last = getattr(warm[0], name), getattr(warm[-1], name)
        if last > first:
            wrong.append(f"{name.replace('_', ' ')} rose from {first} to {last} after the warm-up.")
    return {
        "warm_up_generations": warm[0].generations,
        "private_mib": {"start": samples[0].private_bytes / MIB, "warm": begin, "end": end},
        "resident_mib": {"start": samples[0].resident_bytes / MIB, "end": samples[-1].resident_bytes / MIB},
        "resident_peak_mib": max(s.resident_bytes for s in samples) / MIB,
        "growth_mib": end - begin,
        "most_growth_mib": most_growth_mib,
        "slope_mib_per_1000": {"slope": float(slope), "low": float(low), "high": float(high)},
        "kv_pages": [samples[-1].kv_pages, max((s.kv_pages or 0) for s in samples)],
        "open_files": [warm[0].open_files, warm[-1].open_files],
        "threads": [warm[0].threads, warm[-1].threads],
        "wrong": wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="where no exits are shipped, its own head is read early")
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=1_000, help="generations before growth counts")
    parser.add_argument("--every", type=int, default=100, help="generations between two looks")
    parser.add_argument("--most-growth-mib", type=float, default=64.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    items: list[PromptItem] = read_prompts("train")
    model = adi.load(given.model)
    layers = model.backbone.spec.layers
    own = given.model in shipped()
    exits = adi.load_exits(given.model) if own else adi.bare_exits(model, (layers // 2, layers - 1))
    work = Work(model, exits, 0.3 if own else 0.1, [item.prompt for item in items])
    samples, kinds = soak(work, given.generations, given.every, lambda sample: print(json.dumps(asdict(sample)), flush=True))
    found = judged(samples, given.warm_up, given.most_growth_mib)
    print(json.dumps(found, indent=1))
    if given.json is not None:
        about = provenance(" ".join(["python", "tools/soak.py", *sys.argv[1:]]), items)
        spec = work.model.backbone.spec
        value = {"format": "adi-soak", **about, "model": spec.name, "backend": spec.backend, "precision": spec.precision}
        value |= {"generations": samples[-1].generations, "kinds": kinds, "seconds": samples[-1].seconds, **found}
        given.json.write_text(json.dumps({**value, "samples": [asdict(s) for s in samples]}, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
