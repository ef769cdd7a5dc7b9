"""LangChain's client, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("langchain_openai")

from langchain_openai import ChatOpenAI, OpenAI

import adi
from serving import Running, serving

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def running(tiny_model: adi.Model) -> Iterator[Running]:
    with serving(tiny_model) as one:
        yield one


def model(running: Running, kind: Any = ChatOpenAI, **more: Any) -> Any:
    return kind(base_url=f"{running.url}/v1", api_key="none", model="tiny", max_retries=0, **{"temperature": 0, **more})


def test_a_chat(running: Running, tiny_model: adi.Model) -> None:
    said = model(running, max_tokens=12).invoke(PROMPT)
    alone = adi.generate(tiny_model, PROMPT, max_new_tokens=12)
    assert said.content == alone.text
    assert said.usage_metadata["output_tokens"] == 12
    assert said.response_metadata["finish_reason"] == "length"


def test_a_stream_and_a_batch(running: Running, tiny_model: adi.Model) -> None:
    chat = model(running, max_tokens=12, stream_usage=True)
    pieces = list(chat.stream(PROMPT))
    assert "".join(piece.content for piece in pieces) == adi.generate(tiny_model, PROMPT, max_new_tokens=12).text
    assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) == 12
    prompts = [PROMPT, "lazy dog", "12 plus 30"]
    alone = [adi.generate(tiny_model, prompt, max_new_tokens=12).text for prompt in prompts]
    assert [said.content for said in chat.batch(prompts)] == alone


def test_structured_output(running: Running) -> None:
    pytest.importorskip("llguidance")
    from pydantic import BaseModel, Field

    class Pet(BaseModel):
        age: int = Field(ge=1, le=99)
        tame: bool

    said = model(running, max_tokens=60).with_structured_output(Pet, method="json_schema").invoke(PROMPT)
    assert isinstance(said, Pet)
    assert 1 <= said.age <= 99


def test_a_completion(running: Running, tiny_model: adi.Model) -> None:
    said = model(running, OpenAI, max_tokens=9).invoke(PROMPT)
    assert said == adi.generate(tiny_model, PROMPT, raw=True, max_new_tokens=9).text
