"""Many requests of every kind, some given up: each has the text that it has alone, and nothing is kept.

With SERVE_REQUESTS=24000, and -o faulthandler_timeout=0 for pytest, it is a soak.
"""

from __future__ import annotations

import gc
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

import adi
from adi.decoding.frontier import Frontier
from serving import Running, serving

REQUESTS = int(os.environ.get("SERVE_REQUESTS", "160"))
CLIENTS, GROWTH = 8, 64 << 20
PROMPTS = ("the quick brown fox", "12 plus 30 is", "é 日本 😀", "over the lazy dog and then the dog", "x")
WAYS: dict[str, Any] = {"verified": adi.Verified(), "full": adi.FullDepth(), "lookup": adi.Lookup()}


def private_bytes() -> int:
    """Resident pages that no file stands behind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))


def test_nothing_is_mixed_up_and_nothing_is_kept(tiny_model: adi.Model) -> None:
    @cache
    def alone(prompt: str, length: int, mode: str, temperature: float, seed: int, stop: str | None) -> str:
        drawn: Any = {"temperature": temperature, "seed": seed, "stop": stop}
        return adi.generate(tiny_model, prompt, WAYS[mode], raw=True, max_new_tokens=length, **drawn).text

    def one(running: Running, client: httpx.Client, number: int) -> None:
        dice = random.Random(number)
        asked = (dice.choice(PROMPTS), dice.choice((1, 7, 30)), dice.choice([*WAYS]), dice.choice((0, 1)), dice.randrange(3))
        stop, streamed, gives_up = dice.choice((None, "s", "th")), dice.random() < 0.5, dice.random() < 0.2
        names = ("prompt", "max_tokens", "mode", "temperature", "seed")
        body = dict(zip(names, asked, strict=True)) | {"stop": stop, "stream": streamed}
        body["adi"] = {"mode": body.pop("mode")}
        with client.stream("POST", f"{running.url}/v1/completions", json=body, timeout=120) as said:
            if gives_up:
                return
            lines = list(said.iter_lines())
        if streamed:
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        else:
            text = json.loads("\n".join(lines))["choices"][0]["text"]
        assert text == alone(*asked, stop), (number, body)

    with serving(tiny_model, most=4, queue=CLIENTS) as running, httpx.Client() as client:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda number: one(running, client, number), range(REQUESTS // 4)))
            assert running.settled()
            gc.collect()
            before = (threading.active_count(), len([*Path("/proc/self/fd").iterdir()]), private_bytes())
            list(pool.map(lambda number: one(running, client, number), range(REQUESTS // 4, REQUESTS)))
            assert running.settled(), "no place is stuck"
            gc.collect()
            after = (threading.active_count(), len([*Path("/proc/self/fd").iterdir()]), private_bytes())
        assert after[0] <= before[0] + 2
        assert after[1] <= before[1] + CLIENTS
        assert after[2] <= before[2] + GROWTH
        assert httpx.get(f"{running.url}/health").status_code == 200
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Frontier) and one.ids], "no sequence is kept"
