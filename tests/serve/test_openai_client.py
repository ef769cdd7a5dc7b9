"""OpenAI's own client, unchanged, gets the texts that the library gives alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai

import adi
from serving import Running, serving
from support import PET, PETS

MESSAGES: Any = [{"role": "user", "content": "the quick brown fox"}]
PROMPT = "the lazy dog and then the dog"


@pytest.fixture(scope="module")
def running(tiny_model: adi.Model) -> Iterator[Running]:
    with serving(tiny_model) as one:
        yield one


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return running.client()


def test_a_chat_answer_is_the_text_alone(client: Any, tiny_model: adi.Model) -> None:
    said = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, extra_body={"adi": {"mode": "lookup"}}
    )
    alone = adi.generate(tiny_model, MESSAGES, adi.Lookup(), max_new_tokens=24)
    choice = said.choices[0]
    assert choice.message.content == alone.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == {"length": "length", "eos": "stop"}[alone.finish]
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(alone.prompt_ids), len(alone.token_ids))
    assert said.object == "chat.completion"
    spec = said.metrics["speculative_decoding"]
    assert spec["num_accepted_draft_tokens"] == alone.counters.accepted
    assert sum(spec["acceptance_histogram"]) == spec["num_spec_steps"]
    assert said.metrics["depth"]["histogram"] == alone.summary().depth_histogram
    assert said.adi == {"mode": "lookup", "verified": True}


@pytest.mark.parametrize("mode", ["full", "lookup", "verified"])
def test_sampled_answers_have_the_text_of_their_seed(client: Any, tiny_model: adi.Model, mode: str) -> None:
    drawn = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    more = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "adi": {"mode": mode}}
    said = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=16, n=3, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias={"70": -5}, extra_body=more, **drawn,
    )  # fmt: skip
    own: Any = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {70: -5}, **drawn}
    alone = adi.generate(tiny_model, MESSAGES, n=3, max_new_tokens=16, top_k=50, min_p=0.01, repetition_penalty=1.1, **own)
    assert [choice.message.content for choice in said.choices] == [one.text for one in alone]
    assert said.usage.completion_tokens == sum(len(one.token_ids) for one in alone)


def test_a_stream_is_the_text_in_pieces_with_its_usage(client: Any, tiny_model: adi.Model) -> None:
    chunks = list(client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    alone = adi.generate(tiny_model, MESSAGES, max_new_tokens=24)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == alone.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_stream_side_by_side(client: Any, tiny_model: adi.Model) -> None:
    texts = ["", ""]
    for chunk in client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, temperature=1, seed=3, n=2, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [one.text for one in adi.generate(tiny_model, MESSAGES, n=2, max_new_tokens=12, temperature=1, seed=3)]


def test_completions_of_texts_and_ids(client: Any, tiny_model: adi.Model) -> None:
    ids = list(tiny_model.encode(PROMPT, raw=True))
    said = client.completions.create(model="tiny", prompt=[PROMPT, "é 日本"], max_tokens=10, temperature=0)
    alone = [adi.generate(tiny_model, one, raw=True, max_new_tokens=10).text for one in (PROMPT, "é 日本")]
    assert [choice.text for choice in said.choices] == alone
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=10, temperature=0).choices[0].text == alone[0]
    streamed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, temperature=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + alone[0]


def test_stop_strings_end_an_answer(client: Any, tiny_model: adi.Model) -> None:
    whole = adi.generate(tiny_model, PROMPT, raw=True, max_new_tokens=30).text
    stop = whole[8:10]
    said = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop])
    assert said.choices[0].text == whole[: whole.find(stop)]
    assert said.choices[0].finish_reason == "stop"


def test_logprobs_are_full_depths(client: Any, tiny_model: adi.Model) -> None:
    said = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    alone = adi.generate(tiny_model, MESSAGES, max_new_tokens=6, logprobs=3)
    places = said.choices[0].logprobs.content
    assert [place.logprob for place in places] == pytest.approx([step.logprobs[step.token] for step in alone.steps])
    assert all(len(place.top_logprobs) == 3 for place in places)
    assert all(place.top_logprobs[0].logprob == max(top.logprob for top in place.top_logprobs) for place in places)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_echoed_logprobs_score_the_prompt(client: Any, tiny_model: adi.Model, length: int) -> None:
    import torch

    from adi.decoding.teacher_forcing import KnownText, forced_pass, full_logits

    ids = tiny_model.encode(PROMPT * 4, raw=True)
    said = client.completions.create(
        model="tiny", prompt=list(ids), max_tokens=length, temperature=0, echo=True, logprobs=2
    ).choices[0]
    (forced,) = forced_pass(tiny_model.backbone, [KnownText(ids)])
    logs = torch.cat(list(full_logits(tiny_model.backbone, forced.deep_ND))).log_softmax(-1)
    wanted = [float(logs[i, token]) for i, token in enumerate(ids[1:])]
    assert said.logprobs.token_logprobs[0] is None
    assert said.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-4)
    assert len(said.logprobs.tokens) == len(ids) + length == len(said.logprobs.top_logprobs)
    assert said.logprobs.text_offset[:2] == [0, len(said.logprobs.tokens[0])]
    assert said.text.startswith(tiny_model.tokenizer.decode(list(ids)))  # type: ignore[union-attr]


def test_json_of_a_schema(client: Any, tiny_model: adi.Model) -> None:
    pytest.importorskip("llguidance")
    said = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=60, temperature=1, seed=2, response_format=PET
    ).choices[0]
    assert json.loads(said.message.content) in PETS
    assert said.finish_reason == "stop"
    assert (
        said.message.content
        == adi.generate(tiny_model, MESSAGES, max_new_tokens=60, temperature=1, seed=2, response_format=PET).text
    )
    spelled = client.completions.create(
        model="tiny", prompt="x", max_tokens=20, temperature=1, seed=1, extra_body={"grammar": 'start: ("ab" | "cd")+ "."'}
    )
    assert set(spelled.choices[0].text.removesuffix(".").replace("ab", "").replace("cd", "")) == set()


def test_models_and_tokens(client: Any, running: Running, tiny_model: adi.Model) -> None:
    import httpx

    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "adi", 512)
    said = httpx.post(f"{running.url}/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
    assert tuple(said["tokens"]) == tiny_model.encode(MESSAGES)
    assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
    assert httpx.get(f"{running.url}/health").status_code == httpx.get(f"{running.url}/ready").status_code == 200


REFUSED = {
    "model": {"model": "another"},
    "temperature": {"temperature": 3},
    "functions": {"functions": []},
    "tool_choice": {"tool_choice": "required"},
    "reasoning_effort": {"reasoning_effort": "high"},
    "store": {"store": True},
    "stop": {"stop": [""]},
    "top_logprobs": {"top_logprobs": 2},
    "max_completion_tokens": {"max_tokens": 0},
    "stream_options": {"stream_options": {"include_usage": True}},
    "adi.risk": {"adi": {"risk": 0.02}},
    "adi.mode": {"adi": {"mode": "reflex"}},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "logit_bias": {"logit_bias": {"9999": 1}},
    "messages.0": {"messages": ["hello"]},
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_is_not_done_is_refused_by_name(running: Running, param: str) -> None:
    import httpx

    said = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4, **REFUSED[param]})
    error = said.json()["error"]
    assert said.status_code == (404 if param == "model" else 400), error
    assert param.split(".")[-1] in error["message"] or error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_clients_see_openai_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="another"):
        client.chat.completions.create(model="another", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5000)
