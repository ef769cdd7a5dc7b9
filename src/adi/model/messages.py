"""Chat messages as clients send them, made into what chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from adi.errors import UsageError

TEXT_PARTS = ("text", "input_text", "output_text")
OWN_ARGUMENTS = {"messages": "the prompt", "tools": "tools=...", "add_generation_prompt": "continue_final=..."}


def normal(messages: Sequence[Any], template: str, takes_parts: bool) -> list[dict[str, Any]]:
    """The messages without fields that are None, as transformers has them, and contents in parts as this template reads them.

    Parts are left to a template that ``takes_parts``, and joined by line ends for others. UsageError, with the message's
    number, for what the template cannot show.
    """
    return [_normal(place, message, template, takes_parts) for place, message in enumerate(messages)]


def _normal(place: int, message: Any, template: str, takes_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(f"message {place} is {message!r:.80}; a message needs 'role', a text such as 'user', and 'content'.")
    kept = {name: value for name, value in message.items() if value is not None}
    if not set(kept) - {"role", "name"}:
        raise UsageError(f"message {place}, of role {kept['role']!r}, says nothing; give it 'content', '' if need be.")
    if isinstance(content := kept.get("content", ""), (list, tuple)):
        texts = [_text(place, part) for part in content]
        kept["content"] = [{"type": "text", "text": text} for text in texts] if takes_parts else "\n".join(texts)
    elif not isinstance(content, str):
        raise UsageError(f"message {place} has the content {content!r:.60}; it must be a text, or a list of text parts.")
    if calls := kept.get("tool_calls"):
        if not reads(template, "tool_calls"):
            raise UsageError(f"message {place} has tool_calls, which the model's chat template does not read: {ANOTHER}.")
        kept["tool_calls"] = [_call(place, call) for call in calls]
    return kept


ANOTHER = "leave them out, or give chat_template=... of a model that calls tools"


def _text(place: int, part: Any) -> str:
    typed = isinstance(part, Mapping)
    text = part.get("text") if typed and part.get("type", "text") in TEXT_PARTS else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if typed else part
    raise UsageError(
        f"message {place} has a content part of type {kind!r:.60}; only parts with a 'text' can be read: take it out."
    )


def _call(place: int, call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object: clients send them as a JSON text, which templates would quote again."""
    function = dict(call["function"]) if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) else None
    if function is None:
        raise UsageError(f"message {place} has the tool call {call!r:.60}; it needs 'function' with 'name' and 'arguments'.")
    if isinstance(arguments := function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError as error:
            raise UsageError(
                f"message {place} calls a tool with arguments that are not JSON, {arguments!r:.60}: {error}."
            ) from None
    return {**call, "function": function}


def variants(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages, and, where tools are called, other spellings that some templates need: '' for a content that is missing,
    arguments as a JSON text."""
    calling = any("tool_calls" in message for message in messages)
    for as_text, blank in product((False, True), repeat=2) if calling else ((False, False),):
        yield [_variant(message, as_text, blank) if "tool_calls" in message else message for message in messages]


def _variant(message: dict[str, Any], as_text: bool, blank: bool) -> dict[str, Any]:
    calls = message["tool_calls"]
    if as_text:
        spelled = [json.dumps(call["function"].get("arguments", {}), ensure_ascii=False) for call in calls]
        calls = [{**call, "function": {**call["function"], "arguments": s}} for call, s in zip(calls, spelled, strict=True)]
    return {**({"content": ""} if blank else {}), **message, "tool_calls": calls}


def reads(template: str, name: str) -> bool:
    """Whether a template has the name in it."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def check_options(template: str, tools: Any, options: Any) -> None:
    """UsageError for tools or options that this template does not read: transformers would leave them out without a word."""
    if not reads(template, "messages"):
        raise UsageError(f"the chat template {template!r:.40} does not read 'messages'; give Jinja that does, or a file of it.")
    if tools is not None and (isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence)):
        raise UsageError(f"tools is {tools!r:.60}; give a list of JSON schemas (objects) or functions.")
    if tools and not reads(template, "tools"):
        raise UsageError(f"{len(tools)} tools were given, which the model's chat template does not read: {ANOTHER}.")
    if not isinstance(options, Mapping):
        raise UsageError(f"template_options is {options!r:.60}; give an object such as {{'enable_thinking': False}}.")
    for name in options:
        if name in OWN_ARGUMENTS:
            raise UsageError(f"template_options sets {name!r}; that is said by {OWN_ARGUMENTS[name]}.")
        if not isinstance(name, str) or not reads(template, name):
            raise UsageError(f"template_options sets {name!r}, which the model's chat template does not read; leave it out.")
