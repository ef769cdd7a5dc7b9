"""The page at ``/``, driven by a real browser: what it shows is what the answer was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from adi import Lookup, Model, generate
from chromium import BROWSER, Tab, chromium
from serving import Running, serving

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
PROMPT = "the dog sleeps and the dog"
ENTER, ESCAPE, LEFT = ("Enter", 13), ("Escape", 27), ("ArrowLeft", 37)


@pytest.fixture(scope="module")
def running(tiny_model: Model) -> Iterator[Running]:
    with serving(tiny_model, Lookup()) as one:
        yield one


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as one:
        yield one


def ask(tab: Tab, prompt: str, length: int) -> None:
    tab.js(f"document.getElementById('length').value = {length}")
    tab.js("document.getElementById('prompt').focus()")
    tab.type(prompt)
    tab.press(*ENTER)


def done(tab: Tab) -> None:
    tab.until("document.querySelectorAll('.after').length && document.getElementById('stop').hidden")


@pytest.mark.parametrize(("width", "dark"), [(1000, False), (390, True)])
def test_a_chat_shows_the_text_and_how_deep_each_token_went(
    tab: Tab, running: Running, tiny_model: Model, tmp_path: Path, width: int, dark: bool
) -> None:
    tab.errors.clear()
    tab.open(running.url, width=width, dark=dark)
    tab.until("document.getElementById('mode').value === 'lookup'")
    ask(tab, PROMPT, 40)
    done(tab)
    alone = generate(tiny_model, PROMPT, Lookup(), max_new_tokens=40)
    assert tab.js("document.querySelector('.assistant .final').textContent") == alone.text
    levels = tab.js("[...document.querySelectorAll('.tok')].map((t) => t.classList[1])")
    assert levels == [step.level for step in alone.steps if step.text]
    assert tab.js("document.querySelectorAll('.draft').length") == 0
    share = round(100 * alone.counters.accepted / alone.counters.drafted)
    assert tab.js("document.getElementById('acceptance').textContent") == f"{share}%"
    assert tab.js("document.getElementById('depth').textContent").startswith(f"{alone.summary().mean_depth:.1f} of 6")
    assert float(tab.js("document.getElementById('speed').textContent")) > 0
    tab.press(*LEFT)
    assert "of 6 blocks" in tab.js("document.getElementById('status').textContent")
    assert tab.js("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
    background = tab.js("getComputedStyle(document.documentElement).backgroundColor")
    assert background == ("rgb(20, 22, 25)" if dark else "rgb(253, 253, 251)")
    ask(tab, "and then", 5)
    tab.until("document.querySelectorAll('.after').length === 2")
    assert not tab.errors
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5_000


def test_escape_stops_an_answer_and_its_passes(tab: Tab, running: Running) -> None:
    tab.open(running.url)
    tab.until("document.getElementById('mode').value === 'lookup'")
    ask(tab, PROMPT, 400)
    tab.until("document.querySelectorAll('.tok').length > 0")
    tab.press(*ESCAPE)
    done(tab)
    assert running.settled(10)
    assert "stopped" in tab.js("document.querySelector('.after').textContent")


def test_drafts_are_shown_until_they_are_decided(tab: Tab, running: Running) -> None:
    tab.open(running.url)
    tab.until("document.getElementById('mode').value === 'lookup'")
    tab.js("""window.seen = new Set(); new MutationObserver(() => document.querySelectorAll('.draft').forEach(
        (d) => seen.add(d.className.includes('gone') ? 'gone' : 'draft'))).observe(document.body,
        { subtree: true, childList: true, attributes: true })""")
    ask(tab, PROMPT, 60)
    done(tab)
    assert tab.js("[...seen].sort().join()") == "draft,gone"


def test_what_is_refused_is_told(tab: Tab, running: Running) -> None:
    tab.open(running.url)
    tab.until("document.getElementById('mode').value === 'lookup'")
    ask(tab, PROMPT, 40_000)
    tab.until("document.querySelector('.error[role=alert]') !== null")
    assert "context" in tab.js("document.querySelector('.error[role=alert]').textContent")
