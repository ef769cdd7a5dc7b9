"""Many requests of every kind, some given up: each has the text that it has alone, and nothing is kept.

With SERVE_REQUESTS=24000 SERVE_JSON=docs/results/serve_soak.json it is a soak, whose figures go to that file; transformers'
modules take ten times as long as the compiled engine, and get a tenth of the requests.
"""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

import adi
from adi.decoding.frontier import Frontier
from adi.measure.provenance import provenance
from serving import Running, serving

pytestmark = pytest.mark.slow  # hundreds of requests
REQUESTS = int(os.environ.get("SERVE_REQUESTS", "160"))
SHARES = {"openvino": REQUESTS, "hf": REQUESTS if REQUESTS < 1000 else REQUESTS // 10}
CLIENTS, GROWTH = 8, 64 << 20
PROMPTS = ("the quick brown fox", "12 plus 30 is", "é 日本 😀", "over the lazy dog and then the dog", "x")
MODES, STOPS = ("verified", "full", "lookup"), (None, "s", "th")


def held() -> dict[str, int]:
    """What this process has: threads, open files, and resident pages that no file stands behind."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))
    files = len([*Path("/proc/self/fd").iterdir()])
    return {"threads": threading.active_count(), "files": files, "private_bytes": 1024 * private}


def note(**told: Any) -> None:
    """Into the file that SERVE_JSON names."""
    if path := os.environ.get("SERVE_JSON"):
        file = Path(path)
        engines = json.loads(file.read_text())["engines"] if file.exists() else {}
        command = f"SERVE_REQUESTS={REQUESTS} SERVE_JSON={path} python -m pytest tests/serve/test_server_soak.py"
        found = {"engines": {**engines, told["backend"]: told}, **provenance(command, [])}
        file.write_text(json.dumps(found, indent=1) + "\n")


@pytest.mark.parametrize("backend", [*SHARES])
def test_nothing_is_mixed_up_and_nothing_is_kept(tiny_folder: Path, backend: str) -> None:
    pytest.importorskip("torch" if backend == "hf" else "openvino")
    model, counts, requests = adi.load(str(tiny_folder), backend=backend, threads=1), Counter[str](), SHARES[backend]
    begun = time.perf_counter(), time.process_time()

    @cache
    def alone(prompt: str, length: int, temperature: float, seed: int, stop: str | None) -> str:
        """By full depth, whose text is that of every mode."""
        drawn: Any = {"temperature": temperature, "seed": seed, "stop": stop}
        return adi.generate(model, prompt, adi.FullDepth(), raw=True, max_new_tokens=length, **drawn).text

    def one(running: Running, client: httpx.Client, number: int) -> None:
        dice = random.Random(number)
        asked = (dice.choice(PROMPTS), dice.choice((1, 7, 30)), dice.choice((0, 1)), dice.randrange(3), dice.choice(STOPS))
        streamed, gives_up, mode = dice.random() < 0.5, dice.random() < 0.2, dice.choice(MODES)
        names = ("prompt", "max_tokens", "temperature", "seed", "stop")
        body = {**dict(zip(names, asked, strict=True)), "stream": streamed, "adi": {"mode": mode}}
        with client.stream("POST", f"{running.url}/v1/completions", json=body, timeout=None) as said:
            if gives_up:
                [*islice(said.iter_lines(), number % 9)]
                counts["given up"] += 1
                return
            lines = list(said.iter_lines())
        if streamed:
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        else:
            text = json.loads("\n".join(lines))["choices"][0]["text"]
        assert text == alone(*asked), (number, body)
        counts["the text alone"] += 1

    apart = httpx.Limits(max_keepalive_connections=0)  # a server may close what was idle just when it is used again
    with serving(model, most=4, queue=CLIENTS) as running, httpx.Client(limits=apart) as client:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda number: one(running, client, number), range(requests // 4)))
            assert running.settled()
            before = held()
            list(pool.map(lambda number: one(running, client, number), range(requests // 4, requests)))
            assert running.settled(), "no place is stuck"
            after = held()
        took = {"seconds": time.perf_counter() - begun[0], "processor_seconds": time.process_time() - begun[1]}
        note(backend=backend, requests=counts, before=before, after=after, **took)
        assert counts.total() == requests
        assert after["threads"] <= before["threads"] + 2
        assert after["files"] <= before["files"] + CLIENTS
        assert after["private_bytes"] <= before["private_bytes"] + GROWTH
        assert httpx.get(f"{running.url}/health").status_code == 200
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Frontier) and one.ids], "no sequence is kept"
