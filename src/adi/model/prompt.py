"""What a prompt may be: a text, chat messages, or token ids in any form in which tokenizers give them."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

from adi.errors import UsageError


class TokenArray(Protocol):
    """Token ids as a tensor or an array, with a batch axis of one or without."""

    def tolist(self) -> Any: ...


Message = Mapping[str, Any]
Encoding = Mapping[str, Any]  # of one text, as a tokenizer gives it: ``input_ids`` and perhaps ``attention_mask``
Prompt = str | Sequence[Message] | Sequence[int] | TokenArray | Encoding
KINDS = "a text, a list of messages, or token ids (a list, a tensor, or what a tokenizer returns)"


class ChatKeywords(TypedDict, total=False):
    """How messages become a text; what is left out has its default."""

    continue_final: bool | None
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None
    chat_template: str | os.PathLike[str] | None
    template_options: Mapping[str, Any] | None


class PromptKeywords(ChatKeywords, total=False):
    """How a prompt is read."""

    raw: bool
    special_tokens: bool


def opened(prompt: Any) -> str | list[Any] | tuple[int, ...]:
    """The text, the messages, or the token ids that a prompt is; UsageError for what is none of these, or several texts."""
    if isinstance(prompt, str):
        return prompt
    given, mask = prompt, None
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        given, mask = prompt["input_ids"], prompt.get("attention_mask")
    elif hasattr(prompt, "attention_mask") and hasattr(prompt, "ids"):  # an Encoding of the tokenizers library
        given, mask = prompt.ids, prompt.attention_mask
    items = _row(given)
    if isinstance(items, Mapping):
        raise UsageError(f"the prompt is one object, {dict(items)!s:.60}; a conversation is a list of messages.")
    if not isinstance(items, list):
        raise UsageError(f"a prompt is {KINDS}, not {type(given).__name__} {given!r:.60}.")
    if (nested := sum(isinstance(item, (list, str)) for item in items)) > 1:
        raise UsageError(f"the prompt holds {nested} texts; give one of them, or all to adi.generate_batch.")
    if items and all(isinstance(item, Mapping) for item in items):
        return items
    return _token_ids(items, mask)


def opened_batch(prompts: Any) -> list[Any]:
    """The prompts of a batch; what a tokenizer returned for several texts becomes an encoding of each."""
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        names = [name for name in ("input_ids", "attention_mask") if prompts.get(name) is not None]
        return [dict(zip(names, row, strict=True)) for row in zip(*(prompts[name] for name in names), strict=True)]
    if isinstance(prompts, (str, bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise UsageError(f"prompts is {type(prompts).__name__} {prompts!r:.60}; give a list of prompts, [prompt] for one.")
    return list(prompts)


def _row(value: Any) -> Any:
    """The plain value without batch axes of one."""
    items = _plain(value)
    while isinstance(items, list) and len(items) == 1 and isinstance(items[0], list):
        items = items[0]
    return items


def _plain(value: Any) -> Any:
    """Arrays, sequences and iterators as lists, and objects of clients' libraries as what they hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if (isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))) or hasattr(value, "__next__"):
        return [item if type(item) is int else _plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.model_dump() if callable(getattr(value, "model_dump", None)) else value


def _token_ids(items: Sequence[Any], mask: Any) -> tuple[int, ...]:
    """The ids without what the mask says is padding."""
    for place, item in enumerate(items):
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise UsageError(f"a prompt is {KINDS}; item {place} of this one is {item!r:.60}.")
    ids = tuple(map(operator.index, items))
    if mask is None:
        return ids
    given = _row(mask)
    if not isinstance(given, list) or len(given) != len(ids):
        raise UsageError(f"the attention mask {given!r:.60} is not one of {len(ids)} token ids; give 0 or 1 for each.")
    read = list(map(bool, given))
    first, last = (read.index(True), len(read) - read[::-1].index(True)) if any(read) else (0, 0)
    if not all(read[first:last]):
        raise UsageError(
            f"the attention mask hides token {read.index(False, first)}, inside the text; only padding at the ends is left out "
            "here: leave out yourself what is not to be read."
        )
    return ids[first:last]
