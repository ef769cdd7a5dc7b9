"""What a drafter is given to learn from: shards of tracks to train and to test on, and what the model said in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adi.drafters.datastore import Datastore
from adi.errors import AdiError
from adi.files import read_text
from adi.model.backbone import Backbone
from adi.model.load import Model
from adi.training.answers import Answer, is_held_out
from adi.training.drafter_shards import DrafterShard, read_drafter_shard, write_drafter_shards
from adi.training.generate_data import GenerateOptions, talk, tokens_in

TEXT_WINDOW = 256
OPENING = 32  # tokens that tell whether a text is one that training saw
MOST_TEXT_BYTES = 4 << 30
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DrafterData:
    """Shards to train on, shards held out, what the model said in the first, and how many tokens that is."""

    shards: list[Path]
    checks: list[Path]
    spoken: Datastore
    tokens: int

    def said_after(self, known: Datastore | None) -> Datastore:
        """What was said before, where anything is known of it, and then what is said here."""
        return self.spoken if known is None else known.and_more(self.spoken)


def data_from_answers(
    backbone: Backbone, train: Sequence[Answer], held: Sequence[Answer], work: Path, forced_read: Tell
) -> DrafterData:
    """From answers that are there: one more pass over each."""
    shards = write_drafter_shards(backbone, train, work / "tracks", lambda d, t: forced_read("tracks", d, t))
    checks = write_drafter_shards(backbone, held, work / "held-tracks", lambda d, t: forced_read("held-tracks", d, t))
    spoken = Datastore.of([a.ids[max(0, a.start - 2) :] for a in train])
    return DrafterData(shards, checks, spoken, sum(a.tokens for a in train))


def data_from_talk(
    voices: Sequence[Model], prompts: Sequence[Sequence[int]], work: Path, options: GenerateOptions, forced_read: Tell
) -> DrafterData:
    """From texts that the model writes now, on the engines that drafts are for, each its share of ``options.tokens``; texts
    are held out by their prompts."""
    share = replace(options, tokens=-(-options.tokens // len(voices)))
    parts = [_talked(voice, prompts, work, share, forced_read) for voice in voices]
    shards, checks = ([path for part in parts for path in part[side]] for side in (0, 1))
    if not checks or (options.held_share < 1 and not shards):
        raise AdiError(f"a talk of {options.tokens} tokens is too little to train and test on; ask for more.")
    return DrafterData(shards, checks, _spoken(shards), tokens_in(shards))


def _talked(
    voice: Model, prompts: Sequence[Sequence[int]], work: Path, options: GenerateOptions, forced_read: Tell
) -> tuple[list[Path], list[Path]]:
    """One engine's shards, to train on and held out.

    A longer talk goes on where a shorter one ended. The folder's name says what else it was written for.
    """
    if any(work.glob("talk-*")):
        raise AdiError(
            f"the texts in {work} were made by an older adi, whose held-out texts shared prompts with those trained on; delete "
            "that folder, or choose another --out."
        )
    stated = [voice.backbone.spec.fingerprint, voice.backbone.spec.precision, options.max_new_tokens, options.own_prompts]
    text = repr([*stated, options.side_by_side, options.seed, options.held_share, [tuple(p) for p in prompts]])
    folder = work / f"texts-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    return talk(voice, prompts, folder, options, lambda d, t: forced_read("talk", min(d, t), t))


def said(lessons: DrafterData) -> list[Answer]:
    """All texts of the lessons, those held out marked."""
    return [*said_in(lessons.shards, False), *said_in(lessons.checks, True)]


def said_in(shards: Sequence[Path], held_out: bool) -> list[Answer]:
    """The texts of these shards, each one's answer all but its last token."""
    found = []
    for path in shards:
        tracks = read_drafter_shard(path)
        counts = tracks.sequence_N.unique_consecutive(return_counts=True)[1].tolist()
        for i, (ids, answer) in enumerate(zip(tracks.ids_N.split(counts), tracks.answer_N.split(counts), strict=True)):
            start = int(answer.int().argmax()) + 1
            found.append(Answer(f"{path.stem}:{i}", tuple(ids.tolist()), start, False, held_out))
    return found


def _spoken(shards: Sequence[Path]) -> Datastore:
    """Every answer with the two tokens before it."""
    return Datastore.of([a.ids[max(0, a.start - 2) :] for a in said_in(shards, False)])


def seen_in(known: Datastore) -> Callable[[DrafterShard], Tensor]:
    """Marks the positions of texts whose answers begin as one of the datastore's does: those that training saw."""
    openings = {tuple(part[:OPENING].tolist()) for part in np.split(known.ids_N, np.cumsum(known.lengths_M)[:-1])}

    def mark(shard: DrafterShard) -> Tensor:
        counts = shard.sequence_N.unique_consecutive(return_counts=True)[1]
        texts = zip(shard.ids_N.split(counts.tolist()), shard.answer_N.split(counts.tolist()), strict=True)
        begun = [tuple(ids[max(0, int(answer.int().argmax()) - 1) :][:OPENING].tolist()) for ids, answer in texts]
        return torch.tensor([opening in openings for opening in begun]).repeat_interleave(counts)

    return mark


def windows_of(model: Model, path: Path) -> list[Answer]:
    """A text file cut into sequences; every token after a window's first is one to learn from."""
    if model.tokenizer is None:
        raise AdiError("text files need a tokenizer; load the model with one.")
    ids = model.tokenizer.encode(read_text(path, "text", MOST_TEXT_BYTES))
    names = [(f"{path.name}:{at}", ids[at : at + TEXT_WINDOW]) for at in range(0, len(ids), TEXT_WINDOW)]
    return [Answer(name, tuple(part), 1, True, is_held_out(name)) for name, part in names if len(part) > 1]
