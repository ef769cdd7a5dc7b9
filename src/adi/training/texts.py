"""Training texts as token ids: which are held out, how they are cut, and what category of prompt they answer.

A text is a ``KnownText``: the row of its token ``first`` is the first that predicts a token to learn, so ``ids[: first + 1]``
is the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from adi.decoding.teacher_forcing import KnownText
from adi.drafters.datastore import Datastore
from adi.errors import UsageError
from adi.files import read_text
from adi.model.load import Model

HELD_OUT_SHARE = 0.08
TEXT_WINDOW = 256
MOST_TEXT_BYTES = 4 << 30
OTHER = "other"


def is_held_out(prompt_ids: Sequence[int], share: float = HELD_OUT_SHARE) -> bool:
    """Whether texts with this prompt are only tested on. It follows from the prompt alone, so one that comes twice, in another
    run or at another precision, is always on the same side."""
    digest = hashlib.blake2b(" ".join(map(str, prompt_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def prompt_of(text: KnownText) -> tuple[int, ...]:
    """Token ids of the prompt."""
    return text.ids[: text.first + 1]


def answer_tokens(texts: Iterable[KnownText]) -> int:
    """How many rows of these texts predict a token of an answer."""
    return sum(len(text.ids) - text.first for text in texts)


def first_of(texts: Sequence[KnownText], tokens: int) -> list[KnownText]:
    """As many of the texts as hold so many answer tokens, from the first on."""
    before = accumulate((answer_tokens([text]) for text in texts), initial=0)
    return [text for text, at in zip(texts, before, strict=False) if at < tokens]


def windows_of(model: Model, path: Path) -> list[KnownText]:
    """A text file cut into sequences; every token after a window's first is one to learn from."""
    if model.tokenizer is None:
        raise UsageError(f"reading {path} needs a tokenizer, and {model.source} has none; load it with one.")
    ids = model.tokenizer.encode(read_text(path, "text", MOST_TEXT_BYTES))
    windows = [tuple(ids[at : at + TEXT_WINDOW]) for at in range(0, len(ids), TEXT_WINDOW)]
    return [KnownText(window[:-1]) for window in windows if len(window) > 1]


def interleave(groups: Sequence[Sequence[str]]) -> list[str]:
    """Round-robin over the prompt files, so that a token budget is shared by all of them; duplicates are dropped."""
    if alone := [group for group in groups if isinstance(group, str)]:
        raise UsageError(
            f"prompts come in groups, one per file, and {alone[0]!r:.40} is a text: give a list of lists of texts."
        )
    longest = max((len(group) for group in groups), default=0)
    mixed = (group[i] for i in range(longest) for group in groups if i < len(group))
    return list(dict.fromkeys(mixed))


def datastore_of(texts: Iterable[KnownText], name: str = "datastore") -> Datastore:
    """Every answer with the two tokens before it."""
    return Datastore.of([text.ids[max(0, text.first - 1) :] for text in texts], name)


@dataclass(frozen=True)
class Categories:
    """Categories of prompts, by their token ids, so that reports can show where exits and drafters do well. What is not among
    them (plain text, prompts that the model wrote itself) is "other"."""

    known: Mapping[tuple[int, ...], str] = field(default_factory=dict)

    @classmethod
    def of(cls, categories: Mapping[str, str], encode: Callable[[str], Sequence[int]]) -> Categories:
        """From the category of each prompt's text; ``encode`` gives what an answer follows."""
        return cls({tuple(encode(prompt)): category for prompt, category in categories.items()})

    def of_text(self, text: KnownText) -> str:
        """The category of one text's prompt."""
        return self.known.get(prompt_of(text), OTHER)
