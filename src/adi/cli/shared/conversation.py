"""Messages, tools and template options from files and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from adi.cli.shared.options import option
from adi.cli.shared.output import read_input
from adi.errors import FileError, UsageError

MessagesOption = Annotated[
    Path | None,
    option("--messages", metavar="FILE", help="Instead of a prompt: chat messages as JSON ('-' reads standard input)."),
]
WORDS = {"true": True, "false": False, "none": None, "null": None}
_chat = partial(option, panel="Chat template", rare=True)


@dataclass(frozen=True)
class ChatOptions:
    """How messages become a text."""

    template_option: Annotated[
        list[str] | None,
        _chat("--template-option", metavar="NAME=VALUE", help="For the chat template: enable_thinking=false; may be repeated."),
    ] = None
    tools: Annotated[
        Path | None, _chat("--tools", metavar="FILE", help="JSON schemas of tools, for a template that reads them.")
    ] = None
    chat_template: Annotated[
        Path | None, _chat("--chat-template", metavar="FILE", help="A Jinja template in the place of the tokenizer's.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """Those given, as ``generate`` takes them; AdiError for a file or value that is none."""
        from adi.files import read_text

        found: dict[str, Any] = {}
        if self.template_option:
            found["template_options"] = dict(map(_assigned, self.template_option))
        if self.tools is not None:
            found["tools"] = _objects(read_text(self.tools, "tools"), f"the tools {self.tools}")
        if self.chat_template is not None:
            found["chat_template"] = read_text(self.chat_template, "chat template")
        return found


def read_messages(path: Path) -> list[Any]:
    """The messages of a JSON file: a list, or an object that holds it as ``messages``, as requests do."""
    from adi.files import read_text

    text = read_input() if str(path) == "-" else read_text(path, "messages")
    return _objects(text, "the messages on standard input" if str(path) == "-" else f"the messages {path}", "messages")


def _objects(text: str, what: str, field: str = "tools") -> list[Any]:
    from adi.files import parse_json

    try:
        value = parse_json(text)
    except ValueError as error:
        raise FileError(f"{what} are not JSON: {str(error).rstrip('.')}.") from None
    found = value.get(field) if isinstance(value, dict) else value
    if not isinstance(found, list) or not found or not all(isinstance(item, dict) for item in found):
        raise FileError(f"{what} are {found!r:.60}; they must be a JSON list of objects, at least one.")
    return found


def _assigned(text: str) -> tuple[str, Any]:
    """Name and value of "name=value", the value as JSON where it is some."""
    import json

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--template-option is NAME=VALUE, such as enable_thinking=false, not {text!r}.")
    if value.lower() in WORDS:
        return name.strip(), WORDS[value.lower()]
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value
