"""Prompt files: JSONL with ``prompt``, ``turns`` or token ``ids`` and, if you like, ``category``; and the package's sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from adi.errors import FileError, UsageError
from adi.files import expanded, package_data, parse_json, read_text
from adi.schema import Natural, Record, from_json

SETS = {"train": "480 prompts to train on", "bench": "80 to measure with", "workloads": "300 of three kinds of work"}
Text = Annotated[str, Meta(pattern=r"\S")]


@dataclass(frozen=True)
class PromptItem:
    """One prompt: the user's turns (one, mostly) and what kind of task it is; or token ids, for a model without a tokenizer."""

    turns: tuple[str, ...]
    category: str
    ids: tuple[int, ...] = ()

    @property
    def prompt(self) -> str:
        """The text; UsageError where it is ids."""
        if self.ids:
            raise UsageError(f"a prompt is the token ids {list(self.ids)!s:.40}, and a text is needed here; give 'prompt'.")
        return self.turns[0]

    @property
    def text_or_ids(self) -> str | tuple[int, ...]:
        return self.ids or self.turns[0]


class _Line(Record, frozen=True):
    prompt: Text | None = None
    turns: Annotated[tuple[Text, ...], Meta(min_length=1)] | None = None
    ids: tuple[Natural, ...] = ()
    category: str = "other"


def read_prompts(source: str | Path) -> list[PromptItem]:
    """The prompts of a JSONL file, or of a set in the package by name (``SETS``).

    Raises AdiError, with file and line, for a line that is not an object with ``prompt`` or ``turns``.
    """
    sets = ", ".join(f"{name!r} ({what})" for name, what in SETS.items())
    path = package_data("prompts") / f"{source}.jsonl" if str(source) in SETS else expanded(source)
    try:
        lines = read_text(path, "prompts file").split("\n")
    except FileError as error:
        raise FileError(f"{error} Sets by name: {sets}.") from None
    items = [_item(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise FileError(f"{path} holds no prompts.")
    return items


def spread(items: Sequence[PromptItem], count: int) -> list[PromptItem]:
    """``count`` prompts (all, where there are not so many), evenly over the set, so that every category is there."""
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def prompts_hash(items: Sequence[PromptItem]) -> str:
    """A short name for exactly these prompts in this order."""
    known = [(i.turns, i.category, *([i.ids] if i.ids else [])) for i in items]
    return hashlib.blake2b(repr(known).encode(), digest_size=8).hexdigest()


def _item(text: str, where: str) -> PromptItem:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise FileError(f"{where} is not JSON: {error}.") from None
    line = from_json(value, _Line, where)
    turns = line.turns or (() if line.prompt is None else (line.prompt,))
    if bool(turns) == bool(line.ids):
        raise FileError(f"{where} needs 'prompt', a text, or 'turns', a list of texts, or 'ids', token ids: one of them.")
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn):
        raise FileError(f"{where} holds half of a surrogate pair, which is no text; write the character whole.")
    return PromptItem(turns, line.category, line.ids)
