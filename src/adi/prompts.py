"""Prompt files: JSONL with ``prompt`` (or ``turns``) and, if you like, ``category``; and the sets that the package carries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adi.errors import AdiError
from adi.files import expanded, parse_json, read_text

BUILTIN = Path(__file__).parent / "data" / "prompts"
BUILTIN_NAMES = {"builtin": "tune", "bench": "bench"}


@dataclass(frozen=True)
class PromptItem:
    """One prompt: the user's turns (one, mostly) and what kind of task it is."""

    turns: tuple[str, ...]
    category: str

    @property
    def prompt(self) -> str:
        return self.turns[0]


def read_prompts(source: str | Path) -> list[PromptItem]:
    """The prompts of a JSONL file, or of a set by name: "builtin" (480 to train on), "bench" (80 to measure with).

    Raises ValueError, with file and line, for a line that is not an object with ``prompt`` or ``turns``.
    """
    path = BUILTIN / f"{BUILTIN_NAMES[str(source)]}.jsonl" if str(source) in BUILTIN_NAMES else expanded(source)
    try:
        lines = read_text(path, "prompts file").split("\n")
    except ValueError as error:
        raise AdiError(f"{error} Sets by name: {', '.join(BUILTIN_NAMES)}.") from None
    items = [_item(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise AdiError(f"{path} holds no prompts.")
    return items


def spread(items: Sequence[PromptItem], count: int) -> list[PromptItem]:
    """``count`` prompts (all, where there are not so many), evenly over the set, so that every category is there."""
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def prompts_hash(items: Sequence[PromptItem]) -> str:
    """A short name for exactly these prompts in this order."""
    return hashlib.blake2b(repr([(i.turns, i.category) for i in items]).encode(), digest_size=8).hexdigest()


def _item(line: str, where: str) -> PromptItem:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise AdiError(f"{where} is not JSON: {error}.") from None
    if not isinstance(value, dict) or not set(value) <= {"prompt", "turns", "category"}:
        raise AdiError(f"{where} is not an object with 'prompt' (or 'turns') and 'category'.")
    turns = value.get("turns", [value["prompt"]] if "prompt" in value else None)
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise AdiError(f"{where} needs 'prompt', a text, or 'turns', a list of texts.")
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn):
        raise AdiError(f"{where} holds half of a surrogate pair, which is no text; write the character whole.")
    if not isinstance(value.get("category", "other"), str):
        raise AdiError(f"{where} has a 'category' that is no text.")
    return PromptItem(tuple(turns), value.get("category", "other"))
