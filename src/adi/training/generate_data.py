"""Training data that costs one pass: the model answers prompts, given or its own, and the states of those passes are kept.

Exits and drafters learn to predict early what *this* model generates, so the best text for them is the model's own
(sequence-level distillation: Kim & Rush 2016; Medusa-2 and EAGLE train their drafters the same way). Where it writes the
prompt too, it begins with nothing but the chat template up to where a user speaks: an instruction-tuned model then writes
the user's turn from the distribution it was tuned on (Magpie, Xu et al. 2024). A model without a template begins with what
its tokenizer puts before any text, and goes on with some words of its own. Many texts run in shared passes; their last
states are recorded on the way. Every text follows from the seed and its number alone, so a stopped run goes on with the
first group of texts that is missing and ends where an undisturbed one does.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adi.decoding.frontier import BlockPass
from adi.decoding.policies import FullDepth
from adi.decoding.records import Step
from adi.decoding.sampling import Sampling, prompt_seed
from adi.decoding.scheduler import Observer, Scheduler
from adi.decoding.session import Session
from adi.decoding.teacher_forcing import KnownText
from adi.errors import UsageError
from adi.files import write_text
from adi.model.backbone import States
from adi.model.load import Model
from adi.progress import Progress, no_progress
from adi.training.shards import FORMAT, SHARD_TEXTS, in_halves, write_shard
from adi.training.texts import HELD_OUT_SHARE, is_held_out

SIDE_BY_SIDE = 64
OWN_PROMPTS = 0.75  # share of texts whose prompt the model writes too
OWN_WORDS = 0.5  # the same for a model without a chat template, which writes anything but prompts
GREEDY = 0.6  # share of answers that are greedy, as most use is
ANSWERS: Mapping[str, Any] = {"temperature": 0.8, "top_k": 48}  # how the others are sampled
OWN_TURNS: Mapping[str, Any] = {"temperature": 1.0, "top_k": 48}  # how the model writes a prompt
LONGEST_PROMPT = 160
FIRST_WORDS = 24  # tokens of its own that a model without a chat template goes on with
MARK = "\u2063user\u2063"
WORKERS = "workers"  # among a model's notes: what generates text in its place
Workers = Callable[[Sequence[tuple[int, ...]], Path, "GenerateOptions", Progress], tuple[list[Path], list[Path]]]


@dataclass(frozen=True)
class PromptTemplate:
    """Token ids of a conversation's fixed parts: before the user's words, and between them and the answer (nothing, where
    there is no chat template); at most ``longest`` tokens of the user's are written."""

    opening: tuple[int, ...]
    between: tuple[int, ...]
    longest: int

    @classmethod
    def of(cls, model: Model) -> PromptTemplate:
        """From the model's chat template, or without one from how its texts begin; AdiError where nothing does, and where a
        template changes the user's words."""
        if model.tokenizer is None or not (model.tokenizer.has_chat_template or model.tokenizer.encode("")):
            raise UsageError(
                f"{model.source} has no chat template and no token that begins a text, so it cannot write prompts; give "
                "some with "
                "prompts=... and own_prompts=0."
            )
        if not model.tokenizer.has_chat_template:
            return cls(model.tokenizer.encode(""), (), FIRST_WORDS)
        messages = [{"role": "user", "content": MARK}]
        text = model.tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, mark, after = text.partition(MARK)
        if not mark:
            raise UsageError(
                f"the chat template of {model.source} changes the user's words, so it cannot write prompts; give some."
            )
        opening, between = (tuple(model.tokenizer.hf(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
        return cls(opening, between, LONGEST_PROMPT)


def share_of_own(model: Model) -> float:
    """The share of texts that this model had better begin itself; 0 where it cannot."""
    if model.tokenizer is None or model.tokenizer.has_chat_template:
        return OWN_PROMPTS
    return OWN_WORDS if model.tokenizer.encode("") else 0.0


@dataclass(frozen=True)
class GenerateOptions:
    """``tokens`` of answers in all, at most ``max_new_tokens`` each. ``own_prompts`` is the share of prompts that the model
    writes; given ones are answered once, or with ``repeat`` again and again, sampled anew. ``held_share`` of the prompts are
    only tested on (1: all); the share ``greedy`` of the answers is greedy, the others are sampled."""

    tokens: int
    max_new_tokens: int = 200
    own_prompts: float = OWN_PROMPTS
    repeat: bool = True
    seed: int = 0
    held_share: float = HELD_OUT_SHARE
    greedy: float = GREEDY


@dataclass(eq=False)
class _Conversation:
    """One text under way. ``prompt`` is None while the model writes it."""

    number: int
    prompt: tuple[int, ...] | None
    greedy: bool
    tokens: list[int] = field(default_factory=list)
    deep: list[Tensor] = field(default_factory=list)

    def text(self) -> KnownText:
        """The finished text: all tokens that have a row."""
        assert self.prompt is not None
        return KnownText((*self.prompt, *self.tokens[:-1]), len(self.prompt) - 1)


def _conversations(prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> Iterator[_Conversation]:
    """What each text begins with, in their order."""
    if not prompts and options.own_prompts <= 0:
        raise UsageError(
            f"own_prompts is {options.own_prompts} and there are no prompts; give some, or let the model write its own."
        )
    in_order, greedily = iter(_order(len(prompts), options)), set[int]()
    for number in count():
        own, greedy = (np.random.default_rng([options.seed, number]).random(2) < (options.own_prompts, options.greedy)).tolist()
        if own or not prompts:
            yield _Conversation(number, None, greedy)
        elif (place := next(in_order, None)) is None:
            return
        else:
            yield _Conversation(number, prompts[place], greedy and place not in greedily)  # another would be the same
            greedily |= {place} if greedy else set()


def _order(prompts: int, options: GenerateOptions) -> Iterator[int]:
    """The places of given prompts: as they come, or shuffled, all of them once before any again."""
    if not options.repeat:
        yield from range(prompts)
        return
    for turn in count():
        yield from np.random.default_rng([options.seed, 0, turn]).permutation(prompts).tolist()


class _Recorder(Observer[Session]):
    """Keeps the last states of every row of each conversation."""

    def __init__(self) -> None:
        self.running: dict[Session, _Conversation] = {}

    def on_pass(self, sequence: Session, done: BlockPass, states: States) -> None:
        self.running[sequence].deep.append(in_halves(states.hidden_TD).cpu())

    def on_restart(self, sequence: Session) -> None:
        self.running[sequence].deep.clear()


def generate_shards(
    model: Model,
    prompts: Sequence[tuple[int, ...]],
    folder: Path,
    options: GenerateOptions,
    progress: Progress = no_progress,
) -> tuple[list[Path], list[Path]]:
    """Write shards into ``folder`` until their answers hold ``options.tokens`` tokens; those to train on and those held out,
    oldest first. A longer run goes on where a shorter one ended.

    ``prompts`` are token ids up to where an answer begins; which side a text is on follows from its prompt alone. The engine
    should be the one that drafts are for: its states are what a drafter reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = _Groups(model, prompts, folder, options)
    _run(groups, options, progress)
    return sides(path for group in groups.written for path in group)


def generate_group(
    model: Model, prompts: Sequence[tuple[int, ...]], folder: Path, options: GenerateOptions, number: int
) -> list[Path]:
    """The shards of one group of ``SHARD_TEXTS`` texts, in an empty folder, as ``generate_shards`` makes them; none where there
    are not so many prompts."""
    groups = _Groups(model, prompts, folder, options, number)
    _run(groups, replace(options, tokens=sys.maxsize), no_progress)
    return [path for group in groups.written for path in group]


def sides(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The shards to train on and those held out."""
    known = list(paths)
    return [p for p in known if p.name.startswith("train")], [p for p in known if p.name.startswith("held")]


def _run(groups: _Groups, options: GenerateOptions, progress: Progress) -> None:
    model = groups.model
    with Scheduler(model.backbone, most=SIDE_BY_SIDE, observer=groups.recorder, patient=True) as scheduler:
        while groups.tokens < options.tokens:
            groups.begin(scheduler)
            if not scheduler.busy:
                break  # all prompts are answered
            for session, event in scheduler.step():
                if isinstance(event, Step):
                    groups.advance(scheduler, session, event.token)
            for error in scheduler.failed.values():
                raise error
            groups.write()
            progress(min(groups.generated, options.tokens), options.tokens, f"generating text, {model.backbone.spec.precision}")


class _Groups:
    """Texts under way and finished, in groups of ``SHARD_TEXTS`` by their numbers; a group is written when it is whole and all
    before it are. ``only``: this group alone."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[tuple[int, ...]],
        folder: Path,
        options: GenerateOptions,
        only: int | None = None,
    ) -> None:
        self.only, self.first = only, only or 0
        self.model, self.folder, self.options = model, folder, options
        self.template = PromptTemplate.of(model) if options.own_prompts > 0 else None
        self.recorder = _Recorder()
        self.written = [[folder / name for name in mark.read_text().split()] for mark in sorted(folder.glob("group-*"))]
        self.tokens = tokens_in(path for group in self.written for path in group)
        self.ready: dict[int, _Conversation] = {}
        self.begun = SHARD_TEXTS * (self.first + len(self.written))
        self.ended = False  # there is no further prompt
        self.waiting = islice(_conversations(prompts, options), self.begun, None)

    @property
    def generated(self) -> int:
        """Answer tokens so far, of unfinished texts too."""
        under_way = [one for one in self.recorder.running.values() if one.prompt is not None]
        return self.tokens + sum(len(one.tokens) for one in (*self.ready.values(), *under_way))

    def begin(self, scheduler: Scheduler[Session]) -> None:
        """Let new texts join while there is room, and while those of earlier groups will not hold tokens enough."""
        longest = self.options.max_new_tokens
        mean = sum(len(one.tokens) for one in self.ready.values()) / len(self.ready) if self.ready else longest
        while len(self.recorder.running) < SIDE_BY_SIDE and not self.ended:
            earlier = self.begun // SHARD_TEXTS - self.first - len(self.written)
            if self.tokens + earlier * SHARD_TEXTS * mean >= self.options.tokens:
                return
            done = self.only is not None and self.begun == SHARD_TEXTS * (self.only + 1)
            if done or (one := next(self.waiting, None)) is None:
                self.ended = True
                return
            self.begun += 1
            self._run(scheduler, one)

    def _run(self, scheduler: Scheduler[Session], one: _Conversation) -> None:
        """Write the prompt, or answer it."""
        seed = prompt_seed(self.options.seed, one.number)
        if one.prompt is None:
            assert self.template is not None
            ids, most, sampling = self.template.opening, self.template.longest, Sampling(**OWN_TURNS, seed=seed)
        else:
            context = self.model.backbone.spec.context or sys.maxsize
            ids, most = one.prompt, min(self.options.max_new_tokens, context - len(one.prompt))
            sampling = Sampling() if one.greedy else Sampling(**ANSWERS, seed=seed)
        session = Session(self.model, ids, FullDepth(), max_new_tokens=most, sampling=sampling)
        self.recorder.running[session] = one
        scheduler.add(session)

    def advance(self, scheduler: Scheduler[Session], session: Session, token: int) -> None:
        """Take in one more token of a text; after its last one, the text is ready or, as a prompt, to be answered."""
        one, ends = self.recorder.running[session], self.model.eos_ids
        one.tokens.append(token)
        if token not in ends and len(one.tokens) < session.budget:
            return
        del self.recorder.running[session]
        if one.prompt is not None:
            self.ready[one.number] = one
            return
        assert self.template is not None
        words = (token for token in one.tokens if token not in ends)
        self._run(scheduler, _Conversation(one.number, (*self.template.opening, *words, *self.template.between), one.greedy))

    def write(self) -> None:
        """Write the groups that are whole: their shards, to train on and held out, and last the mark that all is there."""
        while True:
            number = self.first + len(self.written)
            first, stop = number * SHARD_TEXTS, (number + 1) * SHARD_TEXTS
            wanted = range(first, min(stop, self.begun) if self.ended else stop)
            if not wanted or any(n not in self.ready for n in wanted):
                return
            sides: dict[str, list[_Conversation]] = {"train": [], "held": []}
            for one in map(self.ready.pop, wanted):
                assert one.prompt is not None
                sides["held" if is_held_out(one.prompt, self.options.held_share) else "train"].append(one)
            self.written.append([self._shard(side, number, mine) for side, mine in sides.items() if mine])
            write_text(self.folder / f"group-{number:05d}", "\n".join(path.name for path in self.written[-1]))
            self.tokens += tokens_in(self.written[-1])

    def _shard(self, side: str, number: int, mine: Sequence[_Conversation]) -> Path:
        path = self.folder / f"{side}-{number:05d}-{sum(len(one.tokens) for one in mine)}.safetensors"
        write_shard(path, self.model.backbone, [one.text() for one in mine], [torch.cat(one.deep) for one in mine])
        return path


def tokens_in(paths: Iterable[Path]) -> int:
    """Answer tokens in these shards, as their names say."""
    return sum(int(path.stem.rsplit("-", 1)[1]) for path in paths)


def generate_dataset(
    models: Sequence[Model],
    prompts: Sequence[tuple[int, ...]],
    work: Path,
    options: GenerateOptions,
    progress: Progress = no_progress,
) -> tuple[list[Path], list[Path]]:
    """Shards from several engines (or precisions), each its share of ``options.tokens``: to train on, and held out. The name
    of each one's folder says what its texts follow from."""
    train, held = list[Path](), list[Path]()
    share = replace(options, tokens=-(-options.tokens // len(models)))
    for model in models:
        spec = model.backbone.spec
        stated = repr([FORMAT, spec.fingerprint, spec.numbers, spec.backend, replace(options, tokens=0), list(prompts)])
        folder = work / f"texts-{hashlib.blake2b(stated.encode(), digest_size=6).hexdigest()}-{spec.precision}"
        workers: Workers | None = model.notes.get(WORKERS)
        parts = (workers or partial(generate_shards, model))(prompts, folder, share, progress)
        train += parts[0]
        held += parts[1]
    return train, held
