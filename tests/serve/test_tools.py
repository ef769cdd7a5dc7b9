"""Tools through the chat template, and calls in the answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("llguidance")

import adi
from adi.serve.tool_calls import ToolCalls
from conftest import CHAT_TEMPLATE
from serving import Running, serving

CALL = '{"name": "add", "arguments": {"a": 12, "b": 30}}'
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TEMPLATE = "{% if tools %}{{ tools | tojson }} as <tool_call>JSON</tool_call>{% endif %}" + CHAT_TEMPLATE
MESSAGES: Any = [{"role": "user", "content": "12 plus 30"}]


@pytest.fixture(scope="module")
def model(tiny_hf: Any, tiny_tokenizer: Any) -> adi.Model:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return adi.load(tiny_hf, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def running(model: adi.Model) -> Iterator[Running]:
    with serving(model) as one:
        yield one


def grammar(text: str) -> Any:
    """Makes the model say just this."""
    return {"grammar": f"start: {json.dumps(text)}"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("before", ["", "so: "])
def test_a_call_is_a_call(running: Running, streamed: bool, before: str) -> None:
    given: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 120, "temperature": 0}
    said = running.client().chat.completions.create(
        **given, stream=streamed, extra_body=grammar(f"{before}<tool_call>\n{CALL}\n</tool_call>")
    )
    if streamed:
        deltas = [chunk.choices[0] for chunk in said if chunk.choices]
        content = "".join(one.delta.content or "" for one in deltas)
        calls = [call for one in deltas for call in one.delta.tool_calls or ()]
        finish = deltas[-1].finish_reason
    else:
        message, finish = said.choices[0].message, said.choices[0].finish_reason
        content, calls = message.content or "", message.tool_calls
    assert content == before
    (call,) = calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 12, "b": 30}
    assert call.id.startswith("call_")
    assert finish == "tool_calls"


def test_tools_are_in_the_prompt_unless_none_are_to_be_used(running: Running, model: adi.Model) -> None:
    client, given = running.client(), {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 2}
    with_tools = client.chat.completions.create(**given)
    assert with_tools.usage.prompt_tokens == len(model.encode(MESSAGES, tools=TOOLS))
    without = client.chat.completions.create(**given, tool_choice="none")
    assert without.usage.prompt_tokens == len(model.encode(MESSAGES))


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("plain <tool> text", "plain <tool> text", []),
        (f"a<tool_call>{CALL}</tool_call>", "a", ["add"]),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", ["add", "add"]),
        ("<tool_call>no json</tool_call>x", "<tool_call>no json</tool_call>x", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ("open <tool_call>{", "open <tool_call>{", []),
        ("ends with <tool_ca", "ends with <tool_ca", []),
    ],
)
def test_pieces_of_any_size_give_the_same(size: int, text: str, content: str, names: list[str]) -> None:
    splitter, said, calls = ToolCalls(), "", list[Any]()
    for at in range(0, len(text), size):
        more, found = splitter.push(text[at : at + size])
        said, calls = said + more, calls + found
    assert said + splitter.rest() == content
    assert [call["function"]["name"] for call in calls] == names
    assert [call["index"] for call in calls] == [*range(len(names))]
