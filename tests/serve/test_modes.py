"""What is adi's own over the protocol: certified levels and what became of them, prices, traces, the page's slider."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

import adi
from adi.schema import from_json
from chromium import BROWSER, chromium
from conftest import random_exits
from looped import gated
from serving import Running, serving
from support import certificate

PROMPT = [1, 2, 3, 4, 1, 2]


@pytest.fixture(scope="module")
def exits(llama: adi.Model) -> adi.Exits:
    """A certificate that does not hold: random heads, believed whatever they say."""
    mine = certificate(fingerprint=llama.backbone.spec.fingerprint, trigger=adi.Always((2,)))
    return replace(random_exits(llama, (2, 4), adi.Never()), certificates=(mine,))


@pytest.fixture
def certified(llama: adi.Model, exits: adi.Exits) -> Iterator[Running]:
    with serving(llama, adi.Verified(exits), spot_check=0.5) as one:
        yield one


@pytest.fixture(scope="module")
def priced() -> adi.Model:
    return adi.load(gated(True, gate_price=True))


def ask(running: Running, status: int = 200, **more: Any) -> Any:
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, **more}
    said = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60)
    assert said.status_code == status, said.text
    return said.json()


def state(running: Running) -> str:
    told = httpx.get(f"{running.url}/metrics").text.splitlines()
    return next(line.partition('state="')[2].partition('"')[0] for line in told
                if line.startswith("adi:certificate{") and line.endswith(" 1.0"))  # fmt: skip


def test_a_certified_level_is_watched_and_its_refutation_told(certified: Running) -> None:
    (model,) = httpx.get(f"{certified.url}/v1/models").json()["data"]
    assert model["adi"]["risks"] == [{"kind": "disagreement", "level": 0.02}]
    assert state(certified) == "unwatched"
    exact = ask(certified)
    assert exact["adi"] == {"mode": "verified", "verified": True}
    said = ask(certified, adi={"risk": 0.02})
    assert said["adi"]["mode"] == "reflex"
    assert said["adi"]["drift"]["fell_back_at"] is not None, "it does not hold"
    assert state(certified) == "refuted"
    after = ask(certified, adi={"risk": 0.02})
    assert after["choices"][0]["text"] == exact["choices"][0]["text"], "from then on the text is full depth's"
    assert "never certified" in ask(certified, 400, adi={"risk": 0.5})["error"]["message"]
    assert ask(certified, 400, adi={"risk": 0.02, "mode": "full"})["error"]["param"] == "adi.risk"
    assert "greedy" in ask(certified, 400, adi={"risk": 0.02}, temperature=1)["error"]["message"]


def test_the_usual_policys_monitor_is_that_of_its_level(llama: adi.Model, exits: adi.Exits) -> None:
    with serving(llama, adi.Reflex(exits, risk=0.02, spot_check=0.5), spot_check=0.5) as running:
        assert state(running) == "holds"
        assert ask(running)["adi"]["drift"]["fell_back_at"] is not None
        assert state(running) == "refuted"
        assert ask(running, adi={"risk": 0.02})["adi"]["drift"]["fell_back_at"] == 0


def test_a_price_sets_the_depth_where_the_gate_knows_prices(priced: adi.Model) -> None:
    prices = (0.001, 10.0)
    with serving(priced, adi.FullDepth()) as running:
        assert httpx.get(f"{running.url}/v1/models").json()["data"][0]["adi"]["priced"]
        for price in prices:
            said = ask(running, adi={"mode": "reflex", "price": price})
            exits = adi.bare_exits(priced, price=price)
            way = adi.Reflex(exits, trigger=exits.trigger)
            alone = adi.generate(priced, PROMPT, way, max_new_tokens=40, price=price)
            assert said["choices"][0]["text"] == alone.text
            assert said["metrics"]["depth"]["mean"] == pytest.approx(alone.summary().mean_depth)
            free = alone.summary().free_energy
            assert free is not None
            assert said["choices"][0]["adi"]["free_energy"]["total"] == pytest.approx(free.total)
        assert ask(running, 400, adi={"mode": "reflex"})["error"]["param"] == "adi.mode"


def test_a_trace_is_one_that_adi_plot_reads(certified: Running, tmp_path: Path) -> None:
    trace = ask(certified, adi={"trace": True})["choices"][0]["adi"]["trace"]
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    read = adi.read_trace(tmp_path / "trace.json")
    assert len(read.steps) == 40
    assert all(step.looks for step in read.steps)
    assert from_json(read.summary.to_json(), type(read.summary), "summary") == read.summary


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("kind", ["risk", "price"])
def test_the_page_has_a_slider_where_the_model_has_a_choice(
    llama: adi.Model, exits: adi.Exits, priced: adi.Model, tmp_path: Path, kind: str
) -> None:
    model, policy = (llama, adi.Verified(exits)) if kind == "risk" else (priced, adi.FullDepth())
    with serving(model, policy, spot_check=0.0001) as running, chromium(tmp_path / "profile") as tab:
        tab.open(running.url, width=390)
        tab.until("!document.getElementById('slider-label').hidden")
        assert tab.js("document.getElementById('slider-name').textContent") == kind
        assert tab.js("document.getElementById('slider-value').textContent") == "none"
        tab.js("s = document.getElementById('slider'); s.value = 1; s.dispatchEvent(new Event('input'))")
        assert tab.js("document.getElementById('slider-value').textContent").startswith("0.0")
        tab.js("document.getElementById('length').value = 20; document.getElementById('prompt').focus()")
        tab.type("1 2 3 4 1 2")
        tab.press("Enter", 13)
        tab.until("document.querySelectorAll('.after').length === 1 && document.getElementById('stop').hidden")
        assert tab.js("document.querySelectorAll('.tok').length") == 20
        if kind == "risk":
            assert tab.js("document.querySelectorAll('.tok.exit').length") > 0
        assert not tab.errors
