"""Many clients, places that run out, clients that vanish, memory that fills: nobody gets another text, and nothing is kept."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from adi import FullDepth, Lookup, Model, generate, prompt_seed
from adi.decoding import processors
from adi.serve.jobs import Answer, Engine
from families import tiny
from serving import Running, serving

FULL = FullDepth()
LONG = 80  # tokens, which take long enough to be interrupted


@pytest.fixture(scope="module")
def running(tiny_model: Model) -> Iterator[Running]:
    with serving(tiny_model, FULL, most=3, queue=4) as one:
        yield one


def body(prompt: Any = "the quick", length: int = 8, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": length, "temperature": 0, **more}


def ask(running: Running, **given: Any) -> Any:
    return httpx.post(f"{running.url}/v1/completions", json=given, timeout=120)


def test_texts_side_by_side_are_those_of_each_alone(tiny_model: Model) -> None:
    prompts = ["the quick brown fox", "12 plus 30", "é 日本", "lazy dog sleeps", "over the lazy dog and", "jumps"]
    with serving(tiny_model, most=3, queue=64) as running, ThreadPoolExecutor(8) as pool:
        asked = [(p, 5 + 7 * (i % 3), {"temperature": i % 2, "seed": i}) for i, p in enumerate(prompts * 4)]
        said = pool.map(lambda one: ask(running, **body(one[0], one[1], **one[2])).json()["choices"][0]["text"], asked)
        for (prompt, length, drawn), text in zip(asked, said, strict=True):
            assert text == generate(tiny_model, prompt, raw=True, max_new_tokens=length, **drawn).text
        assert running.settled()


def test_clients_that_vanish_in_their_streams_leave_the_others_their_texts(tiny_model: Model) -> None:
    prompts = ["the quick brown fox", "12 plus 30", "é 日本", "lazy dog sleeps"]

    def one(running: Running, i: int) -> None:
        given = body(prompts[i % 4], LONG, seed=i, temperature=i // 4 % 2, ignore_eos=True, stream=True)
        with httpx.stream("POST", f"{running.url}/v1/completions", json=given, timeout=120) as said:
            lines = said.iter_lines()
            if i % 3:  # two of three vanish after so many pieces
                next(line for n, line in enumerate(lines) if n >= i)
                return
            text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {"))
        drawn: Any = {"seed": i, "temperature": i // 4 % 2, "stop_at_eos": False}
        assert text == generate(tiny_model, prompts[i % 4], FULL, raw=True, max_new_tokens=LONG, **drawn).text

    with serving(tiny_model, most=3, queue=64) as running, ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: one(running, i), range(18)))
        assert running.settled()


def test_a_full_queue_says_when_to_come_again(running: Running) -> None:
    with ThreadPoolExecutor(7) as pool:
        held = [pool.submit(ask, running, **body(length=LONG, ignore_eos=True)) for _ in range(7)]
        while running.server.engine.open < 7:
            time.sleep(0.005)
        refused = ask(running, **body())
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert {one.result().status_code for one in held} == {200}
    assert ask(running, **body()).status_code == 200
    assert running.settled()


def test_more_answers_than_places_are_refused_at_once(running: Running) -> None:
    said = ask(running, **body(n=8))
    assert (said.status_code, said.json()["error"]["param"]) == (400, "n")


def vanish(running: Running, streamed: bool) -> None:
    """Ask for a long text, and go away while it is made."""
    given = body(length=LONG, stream=streamed)
    with (
        suppress(httpx.TimeoutException),
        httpx.stream("POST", f"{running.url}/v1/completions", json=given, timeout=0.3) as said,
    ):
        next(said.iter_lines())


def test_a_client_that_vanishes_frees_its_place(tiny_model: Model) -> None:
    with serving(tiny_model, FULL, most=1, queue=4) as running:
        for streamed in (True, False):
            vanish(running, streamed)
            assert running.settled(10), "the place is free"
        said = ask(running, **body()).json()["choices"][0]["text"]
        assert said == generate(tiny_model, "the quick", FULL, raw=True, max_new_tokens=8).text


def test_after_a_cancellation_no_pass_runs_for_it(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, forward = [], tiny_model.backbone.forward

    async def scenario() -> None:
        engine = Engine(tiny_model.backbone, most=2, queue=0)
        engine.start()
        job = await engine.submit(lambda: [Answer(tiny_model, [5], FULL, max_new_tokens=LONG, stop_at_eos=False)], 1, 60)
        async for _ in job.parts():
            break
        job.cancel()
        after = len(passes)
        await asyncio.to_thread(engine.stop)
        assert len(passes) - after <= 1, "the one that ran"
        assert engine.open == 0

    monkeypatch.setattr(tiny_model.backbone, "forward", lambda *given, **more: passes.append(1) or forward(*given, **more))
    asyncio.run(scenario())


def test_a_client_that_vanishes_while_it_waits_is_forgotten(running: Running) -> None:
    with ThreadPoolExecutor(3) as pool:
        held = [pool.submit(ask, running, **body(length=LONG, ignore_eos=True)) for _ in range(3)]
        while running.server.engine.open < 3:
            time.sleep(0.005)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{running.url}/v1/completions", json=body(), timeout=0.05)
        assert {one.result().status_code for one in held} == {200}
    assert running.settled()


def test_the_time_limit_ends_a_request(tiny_model: Model) -> None:
    with serving(tiny_model, FULL, seconds=0.15) as running:
        said = ask(running, **body(length=LONG, ignore_eos=True))
        assert (said.status_code, said.json()["error"]["code"]) == (504, "time_limit")
        lines = ask(running, **body(length=LONG, ignore_eos=True, stream=True)).text.splitlines()
        assert "time_limit" in lines[-2]
        assert running.settled()
        assert ask(running, **body(length=1)).status_code == 200


def test_a_slow_reader_holds_up_nobody(running: Running) -> None:
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body(length=LONG, stream=True, ignore_eos=True)) as slow:
        lines = slow.iter_lines()
        next(lines)
        assert ask(running, **body()).status_code == 200
        assert "[DONE]" in list(lines)[-2]


def test_what_runs_is_finished_when_the_server_stops(tiny_model: Model) -> None:
    with ThreadPoolExecutor(4) as pool:
        with serving(tiny_model, FULL, most=2, queue=8) as running:
            held = [pool.submit(ask, running, **body(length=60, ignore_eos=True)) for _ in range(4)]
            while running.server.engine.open < 4:
                time.sleep(0.005)
        texts = {one.result().json()["choices"][0]["text"] for one in held}
        assert texts == {generate(tiny_model, "the quick", FULL, raw=True, max_new_tokens=60, stop_at_eos=False).text}
        with pytest.raises(httpx.ConnectError):
            ask(running, **body())


def test_kv_memory_of_a_few_blocks_delays_and_never_kills() -> None:
    pytest.importorskip("openvino")
    from adi.model.openvino import export_and_open

    blocks = 7
    size = export_and_open(tiny("llama"), name="llama", precision="fp32", stops=(1,)).pool.block_bytes
    backbone = export_and_open(tiny("llama"), name="llama", precision="fp32", kv_bytes=blocks * size)
    model = Model(backbone=backbone, tokenizer=None, eos_ids=frozenset())
    prompts = [[(7 * i + j) % 120 for j in range(1 + 11 * i)] for i in range(6)]
    with serving(model, Lookup(), most=6, queue=32) as running, ThreadPoolExecutor(12) as pool:
        said = list(pool.map(lambda i: ask(running, **body(prompts[i % 6], 40, temperature=i % 2, seed=i)), range(18)))
        assert {one.status_code for one in said} == {200}
        too_long = ask(running, **body([3] * (32 * blocks), 40))
        assert too_long.status_code == 400
        assert "KV" in too_long.json()["error"]["message"]
        assert running.settled()
    for i, one in enumerate(said):
        alone = generate(model, prompts[i % 6], FULL, max_new_tokens=40, temperature=i % 2, seed=i)
        assert one.json()["choices"][0]["text"] == alone.text
    assert backbone.pool.free == backbone.pool.capacity, "every block came back"


def test_several_answers_share_the_prompt_and_keep_their_seeds(tiny_model: Model) -> None:
    with serving(tiny_model) as running:
        said = ask(running, **body(["the quick", "lazy dog"], 9, n=3, temperature=1, seed=4)).json()["choices"]
    assert [one["index"] for one in said] == [*range(6)]
    for i, one in enumerate(said):
        prompt, seed = ["the quick", "lazy dog"][i // 3], prompt_seed(4, i % 3)
        assert one["text"] == generate(tiny_model, prompt, raw=True, max_new_tokens=9, temperature=1, seed=seed).text


def test_a_bug_ends_the_server_with_its_own_name(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    with serving(tiny_model, FULL) as running:
        engine = running.server.engine
        engine._on_failure = failed.set
        monkeypatch.setattr(tiny_model.backbone, "forward", lambda *_, **__: 1 // 0)
        said = ask(running, **body())
        assert (said.status_code, said.json()["error"]["type"]) == (500, "server_error")
        assert failed.wait(10)
        assert httpx.get(f"{running.url}/health").status_code == 503
        assert ask(running, **body()).status_code == 500
        assert isinstance(engine.failure, ZeroDivisionError)
        assert engine.running == 0, "its request is let go"
        engine.failure = None


def test_grammars_are_compiled_outside_the_engines_thread(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all others would wait for it."""
    made, threads = processors.Constraint.__init__, list[str]()

    def noted(self: Any, *given: Any) -> None:
        threads.append(threading.current_thread().name)
        made(self, *given)

    monkeypatch.setattr(processors.Constraint, "__init__", noted)
    with serving(tiny_model, FULL) as running:
        said = ask(running, **body(response_format={"type": "json_schema", "json_schema": {"schema": {"const": "fox"}}}))
        assert said.status_code == 200, said.text
    assert len(threads) == 1
    assert "adi engine" not in threads


def test_who_comes_while_the_engine_fails_is_told_too(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go = threading.Event(), threading.Event()

    def fail(*_: Any, **__: Any) -> None:
        inside.set()
        assert go.wait(60)
        raise ZeroDivisionError

    with serving(tiny_model, FULL) as running, ThreadPoolExecutor(2) as pool:
        engine = running.server.engine
        monkeypatch.setattr(engine, "_on_failure", lambda: None)
        monkeypatch.setattr(tiny_model.backbone, "forward", fail)
        first = pool.submit(ask, running, **body())
        assert inside.wait(60)
        second = pool.submit(ask, running, **body())
        while engine._orders.empty():
            time.sleep(0.005)
        go.set()
        assert [one.result(60).status_code for one in (first, second)] == [500, 500]
        assert running.settled()
        engine.failure = None
