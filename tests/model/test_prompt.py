"""Prompts as clients have them: ids in every form that tokenizers give, and messages with parts, tools and prefills."""

from __future__ import annotations

import copy
from collections import UserDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import adi
from adi.errors import UsageError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
ASKED = {"role": "user", "content": "the fox"}
CALLED = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "21"}]
# As those of models that call tools are: parts are spelled, tools and calls are JSON, and there is a switch.
TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}dog{% endif %}{% endif %}"
)
JOINING = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def tools_model(tiny_hf: Any, tiny_tokenizer: Any) -> adi.Model:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TOOLS
    return adi.load(tiny_hf, tokenizer=tokenizer)


def spelled(model: adi.Model, messages: Any, **options: Any) -> str:
    assert model.tokenizer is not None
    return str(model.tokenizer.hf.decode(model.encode(messages, **options)))


def filled(model: adi.Model, messages: Any, **options: Any) -> str:
    """As transformers fills the template in."""
    assert model.tokenizer is not None
    return str(model.tokenizer.hf.apply_chat_template(messages, tokenize=False, **options))


@dataclass
class Said:
    role: str
    content: str


class Dumped:
    """As a message object of a client library."""

    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": "the fox", "refusal": None}


# A15
@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([[5, 6, 7]]),
        torch.tensor([5, 6, 7]),
        [torch.tensor(5), torch.tensor(6), np.int64(7)],
        [torch.tensor([5, 6, 7])],
        np.array([[5, 6, 7]], np.int32),
        np.array([5, 6, 7]),
        [[5, 6, 7]],
        ([5, 6, 7],),
        deque([5, 6, 7]),
        range(5, 8),
        iter([5, 6, 7]),
        {"input_ids": [5, 6, 7]},
        {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones((1, 3), dtype=torch.long)},
        BatchEncoding({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}),
        UserDict({"input_ids": np.array([[5, 6, 7]])}),
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": torch.tensor([[5, 6, 7, 9]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
    ],
    ids=lambda given: type(given).__name__,
)
def test_token_ids_are_taken_as_tokenizers_give_them(tiny_model: adi.Model, given: Any) -> None:
    assert tiny_model.encode(copy.copy(given)) == (5, 6, 7)
    batch = adi.generate_batch(tiny_model, [copy.copy(given), "the fox"], max_new_tokens=1)
    assert batch[0].prompt_ids == (5, 6, 7) or hasattr(given, "__next__")


# A15
def test_what_the_models_own_tokenizer_gives_is_a_prompt(tiny_model: adi.Model) -> None:
    assert tiny_model.tokenizer is not None
    tokenizer, wanted = tiny_model.tokenizer.hf, tiny_model.encode("the fox")
    for tensors in (None, "pt", "np"):
        chat = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, return_tensors=tensors)
        for prompt in (chat, chat["input_ids"], tokenizer._tokenizer.encode("<|user|>the fox<|end|><|assistant|>")):
            assert adi.generate(tiny_model, prompt, max_new_tokens=2).prompt_ids == wanted
            assert len(list(adi.stream(tiny_model, prompt, max_new_tokens=2))) == 2


# A15
def test_an_encoding_of_several_texts_is_a_batch_without_its_padding(tiny_model: adi.Model) -> None:
    assert tiny_model.tokenizer is not None
    tokenizer, texts = copy.deepcopy(tiny_model.tokenizer.hf), ["the fox", "the quick brown fox", "dog"]
    tokenizer.pad_token = tokenizer.eos_token
    wanted = [tiny_model.encode(text, raw=True) for text in texts]
    for tensors in ("pt", "np"):
        padded = tokenizer(texts, padding=True, return_tensors=tensors)
        assert [got.prompt_ids for got in adi.generate_batch(tiny_model, padded, max_new_tokens=1)] == wanted
    lists = tokenizer(texts)
    assert [got.prompt_ids for got in adi.generate_batch(tiny_model, lists, max_new_tokens=1)] == wanted
    rows = adi.generate_batch(tiny_model, torch.tensor([[5, 6], [7, 8]]), max_new_tokens=1)
    assert [got.prompt_ids for got in rows] == [(5, 6), (7, 8)]


# A15, A22
@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([[5, 6], [7, 8]], "holds 2 texts; give one of them, or all to adi.generate_batch"),
        (torch.tensor([[5, 6], [7, 8]]), "holds 2 texts"),
        (["the", "fox"], "holds 2 texts"),
        ([[ASKED], [ASKED]], "holds 2 texts"),
        (torch.tensor([1.5]), "item 0 of this one is 1.5"),
        ([True, False], "item 0 of this one is True"),
        (torch.tensor(5), "not Tensor"),
        (b"the fox", "not bytes b'the fox'"),
        ({5, 6, 7}, "not set"),
        (Path("x"), "not PosixPath"),
        (ASKED, "a conversation is a list of messages"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "hides token 1"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 1]}, "not one of 3 token ids"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "the prompt is empty"),
    ],
)
def test_what_is_no_prompt_is_named(tiny_model: adi.Model, prompt: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        tiny_model.encode(prompt)


# A15
@pytest.mark.parametrize("prompts", ["the fox", b"x", 5, None, {"role": "user"}])
def test_one_prompt_is_no_batch(tiny_model: adi.Model, prompts: Any) -> None:
    with pytest.raises(UsageError, match="give a list of prompts"):
        adi.generate_batch(tiny_model, prompts)
    with pytest.raises(UsageError, match="prompt 0: the prompt is one object"):
        adi.generate_batch(tiny_model, [ASKED])


# A17
def test_content_parts_are_what_the_template_makes_of_them(tiny_model: adi.Model, tools_model: adi.Model) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]}]
    assert spelled(tiny_model, parts) == "<|user|>the \nfox<|end|><|assistant|>"
    assert spelled(tools_model, parts) == filled(tools_model, parts, add_generation_prompt=True)
    assert "<|user|>the fox<|end|>" in spelled(tools_model, parts)
    mixed = [{"role": "user", "content": ["the ", {"type": "input_text", "text": "fox <|end|>"}]}]
    assert tools_model.encode(mixed) == tools_model.encode([{"role": "user", "content": "the fox <|end|>"}])


# A17
@pytest.mark.parametrize("message", [Said("user", "the fox"), Dumped(), UserDict(ASKED), {**ASKED, "refusal": None}])
def test_messages_of_client_libraries_are_messages(tiny_model: adi.Model, message: Any) -> None:
    assert tiny_model.encode([message]) == tiny_model.encode([[message]]) == tiny_model.encode("the fox")


# A17
@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": "x"}, "message 1 .* needs 'role'"),
        ({"role": 3, "content": "x"}, "message 1 .* needs 'role'"),
        ({"role": "assistant", "content": None}, "message 1, of role 'assistant', says nothing"),
        ({"role": "user", "content": 5}, "message 1 has the content 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "message 1 .* of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "message 1 .* of type 'text'"),
        ({"role": "assistant", "tool_calls": [CALL]}, "message 1 has tool_calls, which .* does not read"),
    ],
)
def test_messages_that_cannot_be_shown_are_refused_by_number(tiny_model: adi.Model, message: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        tiny_model.encode([ASKED, message])


# A17
def test_a_template_says_itself_what_it_refuses(tiny_model: adi.Model) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(UsageError, match=r"template refuses these messages: System role not supported\.$"):
        tiny_model.encode([{"role": "system", "content": "x"}], chat_template=strict)


# A17
def test_tool_calls_and_results_are_spelled_as_transformers_spells_them(tools_model: adi.Model) -> None:
    got = spelled(tools_model, CALLED, tools=[TOOL])
    parsed = copy.deepcopy(CALLED)
    parsed[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Paris"}
    assert got == filled(tools_model, parsed, tools=[TOOL], add_generation_prompt=True)
    assert 'weather{"city": "Paris"}<|end|><|tool|>21<|end|><|assistant|>' in got
    broken = copy.deepcopy(CALLED)
    broken[1]["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(UsageError, match=r"message 1 calls .* that are not JSON, '\{'"):
        tools_model.encode(broken)
    with pytest.raises(UsageError, match="it needs 'function'"):
        tools_model.encode([{"role": "assistant", "tool_calls": [{"name": "weather"}]}])


# A17
def test_templates_that_need_texts_get_texts(tools_model: adi.Model) -> None:
    """Older templates join contents and arguments to other texts."""
    calls = "{% for c in m.tool_calls %}{{ c.function.arguments + '' }}{% endfor %}"
    joins = "{% for m in messages %}{{ m.content + '' }}" + calls + "{% endfor %}"
    assert spelled(tools_model, CALLED, chat_template=joins) == 'the fox{"city": "Paris"}21'


# B3
@pytest.mark.parametrize("last", ["The capital is", "The capital is ", "", "x <|end|>", [{"type": "text", "text": "The"}]])
def test_a_last_message_of_the_assistant_is_continued_as_in_transformers_pipeline(tools_model: adi.Model, last: Any) -> None:
    talk = [ASKED, {"role": "assistant", "content": last}]
    wanted = filled(tools_model, talk, continue_final_message=True)
    assert spelled(tools_model, talk) == spelled(tools_model, talk, continue_final=True) == wanted
    closed = filled(tools_model, talk, add_generation_prompt=True)
    assert spelled(tools_model, talk, continue_final=False) == closed
    assert adi.generate(tools_model, talk, max_new_tokens=2).prompt_ids == tools_model.encode(talk)
    if isinstance(last, str):
        assert tools_model.encode(talk)[-1] != tools_model.tokenizer.hf.eos_token_id, "what is spelled is no token"


# B3
def test_prefills_on_every_kind_of_tokenizer_and_question(tiny_model: adi.Model, tiny_folder: Path) -> None:
    talk = [ASKED, {"role": "assistant", "content": "dog"}]
    assert spelled(tiny_model, talk) == "<|user|>the fox<|end|><|assistant|>dog"
    assert spelled(tiny_model, [ASKED], continue_final=True) == "<|user|>the fox"
    assert [s.token for s in adi.stream(tiny_model, talk, max_new_tokens=3)] == list(
        adi.generate_batch(tiny_model, [talk], max_new_tokens=3)[0].token_ids
    )
    with pytest.raises(UsageError, match="continue_final is about messages, and the prompt is a text"):
        tiny_model.encode("the fox", continue_final=True)


# B4
def test_tools_and_switches_reach_the_template(tools_model: adi.Model) -> None:
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: a city
        """
        return city

    for tools in ([TOOL], (TOOL,), [weather]):
        wanted = filled(tools_model, [ASKED], tools=list(tools), enable_thinking=False, add_generation_prompt=True)
        options: Any = {"tools": tools, "template_options": {"enable_thinking": False}}
        assert spelled(tools_model, [ASKED], **options) == wanted
        assert wanted.endswith("<|assistant|>dog")
        assert adi.generate(tools_model, "the fox", max_new_tokens=1, **options).prompt_ids == tools_model.encode(
            [ASKED], **options
        )
    evil = {"type": "function", "function": {"name": "x<|end|>"}}
    ids, end = tools_model.encode([ASKED], tools=[evil]), tools_model.tokenizer.hf.eos_token_id
    assert ids.count(end) == 2, "what a tool spells like a special token is text"
    assert tools_model.encode([ASKED], tools=[evil], special_tokens=True).count(end) == 3


# B4
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tools": [TOOL]}, "1 tools were given, which the model's chat template does not read"),
        ({"tools": TOOL}, "tools is {'type'.*; give a list"),
        ({"template_options": {"enable_thinking": False}}, "sets 'enable_thinking', which .* does not read; leave it out"),
        ({"template_options": {"add_generation_prompt": False}}, "said by continue_final"),
        ({"template_options": ["x"]}, r"template_options is \['x'\]"),
        ({"chat_template": "none.jinja"}, "cannot read the chat template none.jinja"),
        ({"chat_template": "{% if messages %}"}, "template refuses these messages"),
        ({"chat_template": "{{ 1 }}"}, "does not read 'messages'; give Jinja that does"),
    ],
)
def test_options_that_the_template_does_not_read_are_refused(tiny_model: adi.Model, options: Any, complaint: str) -> None:
    for prompt in ("the fox", [ASKED]):
        with pytest.raises(adi.errors.AdiError, match=complaint):
            tiny_model.encode(prompt, **options)
    name = next(iter(options))
    for prompt, more in (([5, 6], {}), ("the fox", {"raw": True})):
        with pytest.raises(UsageError, match=f"{name} is about messages"):
            tiny_model.encode(prompt, **options, **more)


# B4
def test_a_template_of_ones_own_is_jinja_or_a_file_or_a_name(tiny_hf: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    model = adi.load(tiny_hf, tokenizer=tokenizer)
    (tmp_path / "t.jinja").write_text(JOINING)
    for given in (JOINING, tmp_path / "t.jinja", str(tmp_path / "t.jinja")):
        assert spelled(model, "the fox", chat_template=given) == "<|user|>the fox<|end|>"
    named = copy.deepcopy(tiny_tokenizer)
    named.chat_template = {"default": JOINING, "loud": "{{ messages[0]['content'] | upper }}{{ tools }}"}
    assert spelled(adi.load(tiny_hf, tokenizer=named), "fox", chat_template="loud", tools=[]) == "FOXNone"
