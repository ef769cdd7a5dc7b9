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
NAMES = "{% for tool in tools or () %}{{ tool.function.name }} {% endfor %}"
TEMPLATE = NAMES + "{% if tools %}as <tool_call>JSON</tool_call>{% endif %}" + CHAT_TEMPLATE
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


PLACE = {"$defs": {"place": {"enum": ["Rome", "Oslo"]}}, "type": "object", "properties": {"city": {"$ref": "#/$defs/place"}},
         "required": ["city"], "additionalProperties": False}  # fmt: skip
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"],
           "additionalProperties": False}  # fmt: skip
BOTH: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in (("go", PLACE), ("add", NUMBERS))
]
NAMED: Any = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED, {"type": "function", "function": {"name": "go"}}], ids=str)
def test_an_answer_that_must_call_does(running: Running, model: adi.Model, choice: Any, streamed: bool) -> None:
    given: Any = {"model": "tiny", "messages": MESSAGES, "tools": BOTH, "max_tokens": 100, "temperature": 1, "seed": 4}
    said = running.client().chat.completions.create(**given, tool_choice=choice, parallel_tool_calls=False, stream=streamed)
    if streamed:
        said = list(said)
        calls = [call for one in said for call in one.choices[0].delta.tool_calls or ()]
        assert not any(one.choices[0].delta.content for one in said)
    else:
        calls = said.choices[0].message.tool_calls
        assert said.choices[0].message.content is None
        assert said.choices[0].finish_reason == "tool_calls"
    (call,) = calls
    assert choice == "required" or call.function.name == choice["function"]["name"]
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Oslo") if call.function.name == "go" else arguments["a"] in range(10)


def test_a_call_that_is_asked_for_is_full_depths_own(running: Running) -> None:
    given: Any = {"model": "tiny", "messages": MESSAGES, "tools": BOTH, "max_tokens": 100, "temperature": 0}
    texts = {
        running.client().chat.completions.create(**given, tool_choice=NAMED, extra_body={"adi": {"mode": mode}})
        .choices[0].message.tool_calls[0].function.arguments
        for mode in ("full", "lookup", "verified")
    }  # fmt: skip
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}, "tools": BOTH}, "tool_choice"),
        ({"tool_choice": "required", "tools": BOTH, "grammar": 'start: "a"'}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": BOTH}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": BOTH}, "tool_choice"),
        ({"tools": BOTH, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wat"}}}], "tool_choice": "required"},
         None),
    ],
)  # fmt: skip
def test_choices_without_meaning_are_refused_by_name(running: Running, given: Any, param: str | None) -> None:
    import httpx

    said = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4, **given})
    error = said.json()["error"]
    assert said.status_code == 400, error
    assert (error["param"] or "").split(".")[0] == (param or ""), error


def test_langchains_tools_and_structured_output(running: Running) -> None:
    openai_chat = pytest.importorskip("langchain_openai").ChatOpenAI
    from pydantic import BaseModel, ConfigDict, Field

    class Pet(BaseModel):
        """A pet."""

        model_config = ConfigDict(extra="forbid")

        age: int = Field(ge=1, le=99)
        tame: bool

    chat = openai_chat(base_url=f"{running.url}/v1", api_key="none", model="tiny", max_retries=0, temperature=0)
    said = chat.with_structured_output(Pet, method="function_calling").invoke("12 plus 30")
    assert isinstance(said, Pet)
    called = chat.bind_tools([Pet], tool_choice="any", parallel_tool_calls=False).invoke("12 plus 30")
    assert [call["name"] for call in called.tool_calls] == ["Pet"]


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
