"""Replicas on a Ray cluster: the same answers, the same place for what begins alike, and a replica that dies."""

from __future__ import annotations

import functools
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve")

import httpx
import ray
from ray import serve

import adi
from adi import clusters
from adi.decoding.policies import default_policy
from adi.errors import UsageError
from adi.serve.app import ServerOptions
from adi.serve.cluster import ClusterOptions, app, application, in_order, key_of


def loading(folder: str) -> tuple[adi.Model, Any]:
    model = adi.load(folder, backend="hf", threads=1)
    return model, default_policy(model)


@pytest.fixture(scope="module")
def url(tiny_folder: Path, ray_cluster: None) -> Iterator[str]:
    """Two replicas, by an address of this machine's alone."""
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        made = application(
            functools.partial(loading, str(tiny_folder)),
            ServerOptions(names=("tiny",), most=2, queue=8, body_bytes=1 << 16, temperature=0.0),
            ClusterOptions.of("2", cpus=0.5),
        )
        serve.run(made, name="adi")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


def ask(url: str, prompt: str, **more: Any) -> Any:
    return httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 8, **more}, timeout=120)


@pytest.mark.slow
def test_replicas_answer_as_one_model_does(url: str, tiny_folder: Path) -> None:
    model, _ = loading(str(tiny_folder))
    for prompt in ("the quick", "brown fox jumps", "12 plus 30", "lazy dog"):
        wanted = adi.generate(model, prompt, raw=True, max_new_tokens=8).text
        assert ask(url, prompt).json()["choices"][0]["text"] == wanted
        events = ask(url, prompt, stream=True).text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == wanted


@pytest.mark.slow
def test_refusals_come_through(url: str) -> None:
    assert ask(url, "the", best_off=2).json()["error"]["code"] == "unknown_parameter"
    assert httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == "tiny"
    assert ask(url, "x" * (1 << 17)).status_code == 413


def streamed(url: str, begun: threading.Semaphore, body: dict[str, Any]) -> tuple[str, bool]:
    """The text, as far as it came, and whether the last event says that it was cut off."""
    text, error = "", False
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=120) as said:
        for line in said.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                error = "error" in event
                text += "" if error else event["choices"][0]["text"]
                begun.release()
    return text, error


@pytest.mark.slow
def test_a_replica_that_dies_under_load_costs_no_answer(url: str, tiny_folder: Path) -> None:
    """Whole answers come from another replica; a stream that it had begun says so."""
    model, _ = loading(str(tiny_folder))
    prompts, begun = ("the quick", "brown fox jumps", "12 plus 30", "lazy dog"), threading.Semaphore(0)
    long: Any = {"max_tokens": 100, "ignore_eos": True}
    wanted = [adi.generate(model, prompt, raw=True, max_new_tokens=100, stop_at_eos=False).text for prompt in prompts]
    actors = [one for one in ray.util.list_named_actors(all_namespaces=True) if "#replica#" in one["name"]]
    assert len(actors) == 2
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(streamed, url, begun, {"prompt": prompt, **long}) for prompt in prompts]
        whole = [pool.submit(ask, url, prompt, **long) for prompt in prompts]
        assert all(begun.acquire(timeout=60) for _ in range(8)), "streams are under way"
        ray.kill(ray.get_actor(actors[0]["name"], namespace=actors[0]["namespace"]), no_restart=True)
        assert [one.result().json()["choices"][0]["text"] for one in whole] == wanted
    for one, text in zip(streams, wanted, strict=True):
        given, cut_off = one.result()
        assert text.startswith(given) if cut_off else given == text
    assert ask(url, "the quick", **long).json()["choices"][0]["text"] == wanted[0]


def test_what_begins_alike_goes_to_one_place_and_the_rest_is_spread() -> None:
    turn = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    later = [*turn, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "more"}]
    keys = [key_of(json.dumps({"messages": messages}).encode()) for messages in (turn, later)]
    assert keys[0] == keys[1] != ""
    assert key_of(json.dumps({"prompt": "a b"}).encode()) == "a b"
    assert key_of(b"no json") == key_of(b'{"messages": 3}') == key_of(b"[]") == ""
    places = Counter(in_order(str(i), ["a", "b", "c"])[0] for i in range(600))
    assert min(places.values()) > 130
    moved = [i for i in range(600) if in_order(str(i), ["a", "b"])[0] != in_order(str(i), ["a", "b", "c"])[0]]
    assert all(in_order(str(i), ["a", "b", "c"])[0] == "c" for i in moved)


def test_a_cluster_is_told_from_what_only_listens(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for minutes, and write of it."""
    clusters.require_answer(ray.get_runtime_context().gcs_address)
    monkeypatch.setattr(clusters, "SECONDS", 0.5)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="no Ray answers"):
            clusters.require_answer(f"127.0.0.1:{other.getsockname()[1]}")


@pytest.mark.parametrize("replicas", ["0", "2:1", "two", "", "1:", ":2", "-1"])
def test_replicas_that_mean_nothing_are_refused(replicas: str) -> None:
    with pytest.raises(UsageError, match=r"replicas is .*give a number such as 2"):
        ClusterOptions.of(replicas)


def test_a_configuration_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="args has 'modle'"):
        app({"modle": "x"})
    for wrong in ("", [""], [7]):
        with pytest.raises(UsageError, match="keys has"):
            app({"keys": wrong})
    asked: list[Any] = []
    monkeypatch.setattr("adi.serve.cluster.application", lambda loading, options, cluster: asked.append(options.keys))
    app({"keys": "secret"})
    app({"keys": ["one", "two"]})
    assert asked == [("secret",), ("one", "two")], "one key, not six"
    monkeypatch.undo()
    assert app({"model": "smollm2-135m", "replicas": "1:2", "most": 4}) is not None
