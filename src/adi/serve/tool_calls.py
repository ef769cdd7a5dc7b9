"""Tool calls in an answer, in the form of Hermes, Qwen and SmolLM3: ``<tool_call>`` JSON ``</tool_call>``.

A call that is spelled otherwise, or is no JSON, is text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps


def calls_grammar(functions: Sequence[dict[str, Any]], several: bool) -> str:
    """What a text that is one call of these functions, or ``several``, keeps to, in llguidance's Lark; each has a ``name`` and
    may have ``parameters``, a JSON schema."""
    rules = ['start: call ("\\n" call)*' if several else "start: call"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        begin, end = f'{BEGIN}\n{{"name": {json.dumps(function["name"])}, "arguments": ', f"}}\n{END}"
        schema = {"type": "object", **(function.get("parameters") or {}), "x-guidance": SPACES}
        rules.append(f"call_{i}: {json.dumps(begin)} arguments_{i} {json.dumps(end)}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)


class ToolCalls:
    """Splits a growing text: what is certainly content, and calls once they are whole. After the last piece, ``rest``."""

    def __init__(self) -> None:
        self.count = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What of the text so far is content that was not given yet, and the calls that are whole now."""
        self._held += text
        content, calls = "", list[dict[str, Any]]()
        while True:
            before, begin, after = self._held.partition(BEGIN)
            if not begin:
                keep = next((n for n in range(len(BEGIN) - 1, 0, -1) if before.endswith(BEGIN[:n])), 0)
                given = self._unless_blank(before[: len(before) - keep])
                self._held = before[len(given) :]
                return content + given, calls
            body, end, later = after.partition(END)
            given = self._unless_blank(before)
            if not end:
                self._held = self._held[len(given) :]
                return content + given, calls
            if (call := _call(body)) is None:
                content += before + begin + body + end
            else:
                content += given
                calls.append({"index": self.count, **call})
                self.count += 1
            self._held = later

    def _unless_blank(self, text: str) -> str:
        """The text, but not the spaces and line ends that stand between calls and after them."""
        return "" if self.count and not text.strip() else text

    def rest(self) -> str:
        """What was held back, which became no call."""
        held, self._held = self._held, ""
        return self._unless_blank(held)


def _call(body: str) -> dict[str, Any] | None:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": said["name"], "arguments": text}}
