"""Random legal and illegal bodies against the server's own OpenAPI document, and what requests must keep to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("schemathesis")

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from adi import FullDepth, Model, generate
from adi.cli.serve import PlaceOptions
from serving import Running, serving

CASES = int(os.environ.get("SERVE_CASES", "60"))  # of each route
MESSAGES = [{"role": "user", "content": "hi"}]
FREE = ("n", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "stop", "ignore_eos", "skip_special_tokens", "stream", "echo", "logprobs", "user", "max_tokens",
        "return_token_strs")  # fmt: skip
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance)


@pytest.fixture(scope="module")
def running(tiny_model: Model) -> Iterator[Running]:
    with serving(tiny_model, FullDepth(), most=4, queue=16, body_bytes=100_000) as one:
        yield one


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_no_body_is_too_strange(running: Running, route: str) -> None:
    operation = schemathesis.openapi.from_url(f"{running.url}/openapi.json")[route]["POST"]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    seen = set[int]()

    @settings(max_examples=CASES, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
    @given(st.one_of([operation.as_strategy(mode) for mode in modes]), st.booleans())
    def check(case: Any, sound: bool) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)
            if sound:  # of what the document allows, what the model can do as well
                kept = {name: value for name, value in case.body.items() if name in FREE}
                case.body = {**kept, **({"prompt": "the dog"} if "chat" not in route else {"messages": MESSAGES})}
            if route != "/tokenize" and not (case.body.get("max_tokens") in (0, 1, 2) and sound):
                case.body["max_tokens"] = 3
        said = case.call(timeout=30)
        seen.add(said.status_code)
        case.validate_response(said, checks=CHECKS)
        if said.status_code >= 400:
            assert set(said.json()["error"]) == {"message", "type", "param", "code"}

    check()
    assert {200, 400} <= seen, "some were answered, and some refused"
    assert running.settled()


def post(running: Running, **more: Any) -> Any:
    return httpx.post(f"{running.url}/v1/completions", timeout=60, **more)


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b"[" * 50_000, "headers": {"content-type": "application/json"}}, 400, None),
        ({"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"json": []}, 400, None),
        ({"json": {}}, 400, "missing_required_parameter"),
        ({"json": {"prompt": "x", "wat": 1}}, 400, "unknown_parameter"),
        ({"content": b'{"prompt": "x"}', "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"json": {"prompt": "x" * 100_000}}, 413, "body_too_large"),
        ({"content": iter([b'{"prompt": "', b"x" * 100_000, b'"}']), "headers": {"content-type": "application/json"}}, 413,
         "body_too_large"),
        ({"content": b'{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}}, 400, None),
        ({"json": {"prompt": []}}, 400, None),
        ({"json": {"prompt": ""}}, 400, None),
        ({"json": {"prompt": [99999]}}, 400, None),
    ],
)  # fmt: skip
def test_illegal_bodies(running: Running, given: dict[str, Any], status: int, code: str | None) -> None:
    said = post(running, **given)
    assert said.status_code == status, said.text
    error = said.json()["error"]
    assert error["code"] == code
    assert error["message"]


def test_null_is_left_out(running: Running, tiny_model: Model) -> None:
    nulls = dict.fromkeys(("suffix", "logprobs", "stop", "n", "user", "logit_bias", "best_of", "stream", "seed", "functions"))
    said = post(running, json={"prompt": "the", "max_tokens": 4, "temperature": 0, "top_p": 0.9, **nulls})
    assert said.json()["choices"][0]["text"] == generate(tiny_model, "the", raw=True, max_new_tokens=4).text


def test_unknown_routes_have_the_same_shape(running: Running) -> None:
    said = httpx.get(f"{running.url}/v1/embeddings")
    assert (said.status_code, set(said.json()["error"])) == (404, {"message", "type", "param", "code"})
    assert httpx.get(f"{running.url}/v1/completions").status_code == 405


def test_a_key_is_asked_for(tiny_model: Model) -> None:
    with serving(tiny_model, FullDepth(), keys=("one", "two")) as running:
        body = {"prompt": "x", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic one"}):
            said = post(running, json=body, headers=headers)
            assert (said.status_code, said.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in ("one", "two"):
            assert post(running, json=body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        for path in ("", "/health", "/ready", "/metrics"):
            assert httpx.get(running.url + path).status_code == 200


def test_other_origins_and_names_are_kept_out(tiny_model: Model, running: Running) -> None:
    asked = {"Origin": "https://pages.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{running.url}/v1/completions", headers=asked).headers
    with serving(tiny_model, FullDepth(), origins=("https://pages.example",), hosts=("127.0.0.1",)) as open_one:
        said = httpx.options(f"{open_one.url}/v1/completions", headers=asked)
        assert said.headers["access-control-allow-origin"] == "https://pages.example"
        assert httpx.get(f"{open_one.url}/health", headers={"Host": "evil.example"}).status_code == 400
    with serving(tiny_model, FullDepth(), hosts=PlaceOptions(host="::1").settings()["hosts"]) as named:
        assert httpx.get(f"{named.url}/health", headers={"Host": "[::1]:8000"}).status_code == 200


def test_an_echo_alone_does_not_stream(running: Running) -> None:
    said = post(running, json={"prompt": "the dog", "max_tokens": 0, "echo": True, "stream": True})
    assert (said.status_code, said.json()["error"]["param"]) == (400, "stream")


def test_metrics_count_what_was_done(tiny_model: Model) -> None:
    with serving(tiny_model) as running:
        body = {
            "prompt": "the dog the dog the",
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "adi": {"mode": "lookup"},
        }
        said = post(running, json=body).json()
        text = httpx.get(f"{running.url}/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert found['adi:generation_tokens_total{model_name="tiny"}'] == "12.0"
    assert found['adi:prompt_tokens_total{model_name="tiny"}'] == str(float(said["usage"]["prompt_tokens"]))
    assert found['adi:token_depth_count{model_name="tiny"}'] == "12.0"
    spec = said["metrics"]["speculative_decoding"]
    drafts = 'adi:spec_decode_num_{}_tokens_total{{level="memory",model_name="tiny"}}'
    assert float(found[drafts.format("draft")]) == spec["num_draft_tokens"] > 0
    assert float(found[drafts.format("accepted")]) == spec["num_accepted_draft_tokens"]
    assert found['adi:num_requests_running{model_name="tiny"}'] == "0.0"
