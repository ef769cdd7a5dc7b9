"""``Habituation``: what a model learns from its own answers to one kind of work while its weights stay as they are.

The prompts of a workload are split into those to learn from, those that choose (thresholds, what drafts are worth) and those
that are only tested on. The model answers all of them greedily; the drafter and the datastore of its exits then grow with the
answers to the first 25, 50, 100, ... prompts, each stage going on from the one before, and last its exit heads. Every stage
is a file that a stopped run finds again.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adi.arguments import real, settle, whole
from adi.artifact import Exits
from adi.drafters.network import Drafter
from adi.errors import FileError, UsageError
from adi.exits.heads import Adapter, Heads
from adi.exits.triggers import Never
from adi.files import write_json
from adi.model.load import Model
from adi.progress import Progress, no_progress
from adi.prompts import PromptItem
from adi.schema import read_json_as
from adi.training.generate_data import GenerateOptions, generate_dataset
from adi.training.report import judge_drafter, judge_heads, report_json
from adi.training.shards import Teacher, choose_shortlist, texts_in, write_forced_shards
from adi.training.texts import Categories, answer_tokens, datastore_of, first_of
from adi.training.train_drafter import DraftOptions, as_halves, fit_drafter
from adi.training.train_heads import HeadOptions, fit_heads
from adi.training.trainer import fresh_checkpoint, quicker_in_bfloat16
from adi.training.tune import WARM, TuneOptions, default_depths, on_cpu, teacher_of

Ids = tuple[int, ...]
STAGES = (25, 50, 100, 200, 400)
CHOOSING, TESTING = 0.08, 0.17  # shares of the prompts
FEWEST = 20  # prompts, of which some are to be held out
MORE_TOKENS = 1024  # of the answers, that the shortlist of exits made for other text takes in
MOST_EPOCHS, MOST_TURNS = 12, 3
EPOCHS_FIRST = 4  # passes over what is there, before the prompts are answered again
HEAD_EPOCHS = 2
REHEARSED = 0.5  # answers to prompts of other work beside each answer to the workload, so that other work stays as cheap
SHARES = {"drafter": 0.55, "heads": 0.1}  # of the budget that generating leaves; the rest is for measuring


@dataclass(frozen=True)
class HabitOptions:
    """``minutes`` are what all parts together may take on this machine, ``max_new_tokens`` the longest answer."""

    minutes: float = 60.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, minutes=real("minutes", self.minutes, "above 0", lambda m: m > 0))
        settle(self, max_new_tokens=whole("max_new_tokens", self.max_new_tokens, 2))
        settle(self, seed=whole("seed", self.seed, 0, (1 << 63) - 1))


@dataclass(frozen=True)
class Workload:
    """Token ids of the prompts by what they are for, in the order in which they are learned, and their categories by ids."""

    train: tuple[Ids, ...]
    choosing: tuple[Ids, ...]
    testing: tuple[Ids, ...]
    categories: Mapping[Ids, str]


def split(model: Model, items: Sequence[PromptItem], options: HabitOptions) -> Workload:
    """The prompts by what they are for. Prompts that differ in punctuation or case alone are for the same.

    Raises UsageError where none would be held out, and for a prompt that leaves no room for an answer.
    """
    raw = model.tokenizer is None or not model.tokenizer.has_chat_template
    groups: dict[str, list[PromptItem]] = {}
    for item in items:
        text = item.text_or_ids
        key = re.sub(r"[\W_]+", " ", text.casefold()).strip() if isinstance(text, str) else repr(text)
        groups.setdefault(key, []).append(item)
    order = np.random.default_rng(options.seed).permutation(len(groups)).tolist()
    sides: list[list[PromptItem]] = [[], [], []]
    kinds = [list(groups.values())[place] for place in order]
    quotas = [round(share * len(items)) for share in (CHOOSING, TESTING)]
    for group in kinds:
        side = next((i + 1 for i, quota in enumerate(quotas) if len(sides[i + 1]) < quota), 0)
        sides[side] += group
    if len(items) < FEWEST or not all(sides):
        raise UsageError(
            f"{len(items)} prompts of {len(groups)} kinds are too few to learn from some and be tested on others; give at "
            f"least {FEWEST}, better some hundreds."
        )
    encoded = [{_encoded(model, item, raw, options): item.category for item in side} for side in sides]
    known = {ids: kind for side in encoded for ids, kind in side.items()}
    train, choosing, testing = (tuple(side) for side in encoded)
    return Workload(train, choosing, testing, known)


def _encoded(model: Model, item: PromptItem, raw: bool, options: HabitOptions) -> Ids:
    ids, context = tuple(model.encode(item.text_or_ids, raw=raw)), model.backbone.spec.context
    if context is not None and len(ids) + options.max_new_tokens > context:
        raise UsageError(
            f"the prompt {str(item.text_or_ids)!r:.60} has {len(ids)} tokens, and with an answer of {options.max_new_tokens} "
            f"it is longer than the model's context of {context}; shorten it, or lower --max-new-tokens."
        )
    return ids


@dataclass(frozen=True)
class Plan:
    """How the budget is used: passes of each stage of the drafter and of the last one, for which the prompts are answered so
    many ``turns`` more, sampled; answer tokens for the heads, seconds for measuring."""

    minutes: float
    epochs: int
    last_epochs: int
    turns: int
    head_tokens: int
    measuring: float


def divided(seconds: float, whole: float, answering: float) -> tuple[int, int]:
    """So many further turns of answers and passes over all answers for the last stage, where a pass over one turn takes
    ``whole`` seconds and answering once more ``answering``."""
    turns = int((seconds - EPOCHS_FIRST * whole) / (answering + EPOCHS_FIRST * whole))
    turns = min(max(turns, 0), MOST_TURNS)
    return turns, min(max(1, int((seconds - turns * answering) / (whole * (1 + turns)))), MOST_EPOCHS)


@dataclass(frozen=True)
class Stage:
    """What is known after so many ``prompts``."""

    prompts: int
    exits: Exits
    judged: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Habituation:
    """The parts of one run in the folder ``out``; ``engines`` are the model as it will be used, each writes its answers.

    ``keep``: exits of this model to begin with, None where it has none. ``talk``: prompts of other work, whose answers the
    drafter learns beside (``REHEARSED``).
    """

    model: Model
    engines: Sequence[Model]
    out: Path
    workload: Workload
    keep: Exits | None
    options: HabitOptions
    progress: Progress = no_progress
    talk: Sequence[Ids] = ()

    def __post_init__(self) -> None:
        spec = self.model.backbone.spec
        if self.keep is not None:
            self.keep.check(self.model.backbone)
        self.readout = on_cpu(self.model.backbone.readout().tensors())
        self.depths = default_depths(spec.layers) if self.keep is None else self.keep.depths
        self.categories = Categories(self.workload.categories)
        self.talk = tuple(self.talk)
        self.work.mkdir(parents=True, exist_ok=True)
        self._same_run()

    @property
    def work(self) -> Path:
        return self.out / "work"

    def _same_run(self) -> None:
        """FileError for a folder that was begun with something else."""
        spec = self.model.backbone.spec
        engines = [f"{e.backend} {e.precision}" for e in (model.backbone.spec for model in self.engines)]
        texts = hashlib.blake2b(repr((self.workload, self.talk)).encode(), digest_size=8).hexdigest()
        began = None if self.keep is None or self.keep.drafter is None else self.keep.drafter.digest()
        stated = {"model": spec.fingerprint, "engines": engines, "prompts": texts, "exits": began}
        stated |= {name: value for name, value in asdict(self.options).items() if name != "minutes"}
        path = self.work / "habituate.json"
        if not path.exists():
            write_json(path, stated)
        found = read_json_as(path, dict[str, Any], "file of settings")
        if other := next((name for name in stated if found.get(name) != stated[name]), None):
            raise FileError(
                f"{self.out} was begun with another {other} ({found.get(other)!s:.60}, not {stated[other]!s:.60}); give "
                "the same again, or choose another --out."
            )

    def _generated(self, prompts: Sequence[Ids], engine: Model, held: bool, turn: int = 0) -> list[Path]:
        """The shards of an engine's answers, greedy in turn 0."""
        options = GenerateOptions(
            tokens=1 << 40,
            max_new_tokens=self.options.max_new_tokens,
            own_prompts=0.0,
            repeat=False,
            seed=self.options.seed + turn,
            held_share=float(held),
            greedy=float(turn == 0),
        )
        most = len(prompts) * options.max_new_tokens  # answers may end before

        def counted(done: int, _: int, what: str) -> None:
            self.progress(min(done, most), most, what)

        return generate_dataset([engine], prompts, self.work, options, counted)[held]

    @cached_property
    def choosing(self) -> list[Path]:
        return [path for engine in self.engines for path in self._generated(self.workload.choosing, engine, True)]

    @cached_property
    def testing(self) -> list[Path]:
        return [path for engine in self.engines for path in self._generated(self.workload.testing, engine, True)]

    def parts(self) -> Iterator[tuple[int, list[Path]]]:
        """After so many prompts, the shards that came to those before."""
        prompts = self.workload.train
        for begin, end in pairwise([0, *(at for at in STAGES if at < len(prompts)), len(prompts)]):
            yield end, [path for engine in self.engines for path in self._generated(prompts[begin:end], engine, False)]

    @cached_property
    def rehearsed(self) -> list[Path]:
        """The shards of answers to other work."""
        return [path for engine in self.engines if self.talk for path in self._generated(self.talk, engine, False)]

    def answer_to(self, prompt: Ids) -> Ids:
        """The first engine's answer to a prompt that is only tested on."""
        found = next(text for text in texts_in(self.testing) if text.ids[: len(prompt)] == prompt)
        return found.ids[len(prompt) :]

    def plan(self) -> Plan:
        """How the budget is used, from what the first answers and a first pass over them take here; kept in a file.

        UsageError for a budget that holds less than one pass.
        """
        path, minutes = self.work / "plan.json", self.options.minutes
        if path.exists():
            kept = read_json_as(path, Plan, "plan (delete it)")
            if kept.minutes == minutes:
                return kept
        began, parts, note = time.monotonic(), self.parts(), self.work / "answering.json"
        prompts, shards = next(parts)
        if not note.exists():  # or they are found again in no time
            write_json(note, time.monotonic() - began)
        generating = read_json_as(note, float, "seconds of answering (delete it)")
        total, left = len(self.workload.train), minutes * 60
        passing = self._timed_pass(shards[:1]) * len(shards) * (1 + len(self.talk) / total)
        answers = len(self.workload.choosing) + len(self.workload.testing) + total + len(self.talk)
        left -= generating * answers / prompts
        stages = [at for at in STAGES if at < total]
        one = passing * (sum(stages) + total) / prompts
        if (least := one / SHARES["drafter"] - left) > 0:
            raise UsageError(
                f"--minutes is {minutes:g}, and answering {answers} prompts, one pass over the answers and measuring take some "
                f"{minutes + least / 60:.1f} minutes here; give that much, or fewer prompts."
            )
        training, whole = SHARES["drafter"] * left, passing * total / prompts
        epochs = 2 if training > 4 * one else 1
        turns, last = divided(training - epochs * passing * sum(stages) / prompts, whole, generating * total / prompts)
        each = passing / max(1, answer_tokens(texts_in(shards)))
        head_tokens = int(SHARES["heads"] * left / (each * HEAD_EPOCHS * len(self.depths)))
        measuring = left * (1 - sum(SHARES.values()))
        plan = Plan(minutes, epochs, last, turns, max(1, head_tokens), measuring)
        write_json(path, asdict(plan))
        self.progress(0, 0, f"{last} passes over {1 + turns} answers to each of {total} prompts fit in {minutes:g} minutes")
        return plan

    def _sampled(self, turns: int) -> list[Path]:
        """Further answers to the prompts to learn from, in so many turns."""
        train, order = self.workload.train, range(1, turns + 1)
        return [path for turn in order for engine in self.engines for path in self._generated(train, engine, False, turn)]

    def _timed_pass(self, shards: Sequence[Path]) -> float:
        """Seconds of the drafter's learning from these shards once, as tried on what is thrown away."""
        began, checkpoint = time.monotonic(), self.work / "trial.pt"
        checkpoint.unlink(missing_ok=True)
        teacher = self._teacher(shards)
        self._fit(teacher, shards, checkpoint, 1, self._begin(teacher))
        checkpoint.unlink()
        return time.monotonic() - began

    def _shortlist(self, shards: Sequence[Path]) -> Tensor:
        """The tokens that drafter and heads can name: those of the exits to begin with, and of these answers."""
        vocabulary, known = self.model.backbone.spec.vocabulary, None if self.keep is None else self.keep.drafter
        if known is None:
            return choose_shortlist(shards, vocabulary, TuneOptions.shortlist)
        own = choose_shortlist(shards, vocabulary, MORE_TOKENS)
        ids_S: Tensor = torch.cat([known.tensors()["ids_S"], own]).unique()
        return ids_S

    def _teacher(self, shards: Sequence[Path]) -> Teacher:
        return teacher_of(self.model.backbone, self.readout, self._shortlist(shards), shards[0])

    def _begin(self, teacher: Teacher) -> Drafter | None:
        """The drafter to go on from, which names the teacher's tokens from now on."""
        known = None if self.keep is None else self.keep.drafter
        return None if known is None else replace(known.map(lambda weight: weight.float()), ids_S=teacher.among.ids_S)

    def _fit(self, teacher: Teacher, shards: Sequence[Path], checkpoint: Path, epochs: int, begin: Drafter | None) -> Drafter:
        quick = quicker_in_bfloat16(self.work / "drafter.dtype")
        rate = DraftOptions.learning_rate * (1.0 if begin is None else WARM)
        how = DraftOptions(epochs=epochs, learning_rate=rate, seed=self.options.seed, bfloat16=quick)
        backbone = self.model.backbone
        made_of = [how, teacher.among.ids_S.tolist(), [path.name for path in shards], begin and begin.digest()]
        fresh_checkpoint(checkpoint, made_of)
        return fit_drafter(teacher, backbone.embed, shards, checkpoint, how, self.progress, backbone.last_mlp(), begin)

    def stages(self) -> list[Stage]:
        """The exits after 0, 25, 50, ... prompts, their heads as they were."""
        plan, spec = self.plan(), self.model.backbone.spec
        parts = list(self.parts())
        teacher = self._teacher([path for _, shards in parts for path in shards])
        base = self.keep or Exits.of(spec, self.depths, Never())
        found = [Stage(0, base, self._judged(base.drafter))]
        net, seen = self._begin(teacher), list[Path]()
        for prompts, shards in parts:
            seen += shards
            last = prompts == len(self.workload.train)
            learned = [*seen, *(self._sampled(plan.turns) if last else [])]
            learned += self.rehearsed[: math.ceil(len(self.rehearsed) * prompts / len(self.workload.train))]
            epochs = plan.last_epochs if last else plan.epochs
            net = self._fit(teacher, learned, self.work / f"drafter-{prompts}.pt", epochs, net)
            used = as_halves(net)
            report = judge_drafter(used, teacher, self.model.backbone.embed, self.choosing, progress=self.progress)
            habits = datastore_of(texts_in(seen), "habits")
            exits = replace(base, drafter=used, habits=habits, report={**base.report, "drafter": report})
            found.append(Stage(prompts, exits, self._judged(used)))
        return found

    def _judged(self, drafter: Drafter | None) -> dict[str, Any]:
        """The drafter's figures on the answers that are only tested on; empty without one."""
        if drafter is None:
            return {}
        net = drafter.map(lambda weight: weight.float())
        teacher = teacher_of(self.model.backbone, self.readout, net.tensors()["ids_S"].long(), self.testing[0])
        embed = self.model.backbone.embed
        return judge_drafter(net, teacher, embed, self.testing, self.categories, progress=self.progress)

    def with_heads(self, exits: Exits) -> tuple[Exits, list[dict[str, Any]]]:
        """The exits with heads that have learned from the answers too, and the agreement at each depth on those that are only
        tested on, before and after."""
        shards = [path for _, part in self.parts() for path in part]
        teacher, backbone, depths = self._teacher(shards), self.model.backbone, self.depths
        texts = [first_of(texts_in(shards), self.plan().head_tokens), texts_in(self.choosing), texts_in(self.testing)]
        names = ("states", "choosing-states", "testing-states")
        train, choosing, testing = (
            write_forced_shards(backbone, some, self.work / name, depths, self.progress, f"reading {name}")
            for name, some in zip(names, texts, strict=True)
        )
        before = None if self.keep is None else self.keep.heads
        how = HeadOptions(epochs=HEAD_EPOCHS, rank=TuneOptions.rank, seed=self.options.seed)
        made_of = [how, teacher.among.ids_S.tolist(), [path.name for path in train], depths]
        checkpoint = fresh_checkpoint(self.work / "heads.pt", made_of)
        begin = None if before is None else before.adapters
        adapters = fit_heads(teacher, depths, train, checkpoint, how, self.progress, begin)
        reports, trigger, totals = judge_heads(backbone, teacher, adapters, choosing, Categories(), self.progress)
        after = judge_heads(backbone, teacher, adapters, testing, self.categories, self.progress)[0]
        report = {**report_json(reports, totals, answer_tokens(texts[0])), "drafter": exits.report["drafter"]}
        found = replace(exits, heads=Heads(teacher.among.ids_S, adapters), trigger=trigger, report=report, certificates=())
        rows = [{"depth": row.depth, "bare": row.bare_agreement, "after": row.agreement} for row in after]
        if before is not None:
            own = teacher_of(backbone, self.readout, before.ids_S, testing[0])
            known = {d: Adapter(**{n: t.float() for n, t in a.tensors().items()}) for d, a in before.adapters.items()}
            was = judge_heads(backbone, own, known, testing, self.categories, self.progress)[0]
            rows = [{**row, "before": one.agreement} for row, one in zip(rows, was, strict=True)]
        return found, rows
