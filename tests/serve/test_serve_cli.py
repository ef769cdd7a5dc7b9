"""``adi serve`` from the shell: it starts, answers, finishes what runs on SIGTERM, and says what is wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

import adi
from support import adi_

OPTIONS = ("--port", "0", "--backend", "hf", "--mode", "full", "--name", "tiny")


@contextmanager
def command(folder: Path, *options: str) -> Iterator[tuple[Any, str]]:
    """The process, and where it serves."""
    given = [sys.executable, "-m", "adi", "serve", str(folder), *OPTIONS, *options]
    with subprocess.Popen(given, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            while "http://" not in said and process.poll() is None:
                said += process.stderr.readline()
            yield process, re.findall(r"http://[\d.:]+", said)[0]
        finally:
            process.kill()


def open_requests(url: str) -> float:
    """How many run or wait."""
    told = httpx.get(f"{url}/metrics").text
    return sum(map(float, re.findall(r"^adi:num_requests_(?:running|waiting)\S* (\S+)$", told, re.MULTILINE)))


def takes_requests(url: str) -> bool:
    """Whether it says that it is ready."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False


def test_sigterm_finishes_what_runs_and_takes_nothing_new(tiny_folder: Path, tiny_model: adi.Model) -> None:
    asked = {"prompt": "the quick", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    options = {"max_new_tokens": 400, "raw": True, "stop_at_eos": False}
    alone = adi.generate(tiny_model, "the quick", adi.FullDepth(), **options).text
    with command(tiny_folder, "--most", "2") as (process, url), ThreadPoolExecutor(6) as pool:
        ask = lambda: httpx.post(f"{url}/v1/completions", json=asked, timeout=120)  # noqa: E731
        assert ask().json()["choices"][0]["text"] == alone
        with httpx.stream("POST", f"{url}/v1/completions", json={**asked, "stream": True}, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            under_way = [pool.submit(ask) for _ in range(4)]
            until = time.monotonic() + 20
            while open_requests(url) < 5 and time.monotonic() < until:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            while takes_requests(url) and time.monotonic() < until + 20:
                time.sleep(0.01)
            assert not takes_requests(url)
            assert process.poll() is None, "while what it took is answered"
            assert "[DONE]" in list(lines)[-2]
        assert {one.result().json()["choices"][0]["text"] for one in under_way} == {alone}
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            ask()
        assert process.stderr.read() == "", "nothing of a request is logged"


def test_what_cannot_be_served_is_told_before_the_model_is_loaded(tiny_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = adi_("serve", "nowhere", "--port", taken.getsockname()[1])
    assert said.exit_code == 2
    assert "cannot be listened on" in said.output
    assert adi_("serve", "nowhere", "--port", 0, "--host", "203.0.113.1").exit_code == 2
    assert adi_("serve", tiny_folder, "--queue", -1).exit_code == 2
    assert "--api-key is ''" in adi_("serve", tiny_folder, "--api-key", "").output
