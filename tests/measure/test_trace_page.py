"""The page of a trace: whole, safe against the texts in it, and right about the exits."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from adi.decoding.records import Candidate, Draft, Look, Step, Summary
from adi.measure.trace import Trace
from adi.measure.trace_page import level_table, plot, trace_page

HOSTILE = "</script><img src=x onerror=alert(1)>"
LAYERS, EXIT = 6, 2


def look(depth: int, token: int, *, fired: bool = False, entropy: float = 0.5) -> Look:
    return Look(depth, token, f" t{token}", fired, {"entropy": entropy}, (Candidate(token, f" t{token}", 0.75),))


def step(index: int, token: int, depth: int, looks: tuple[Look, ...] = (), **changes: Any) -> Step:
    drafted = depth < LAYERS
    values = Step(
        index=index,
        token=token,
        text=f" t{token}",
        depth=depth,
        level="exit" if drafted else "full",
        round=index + 1,
        drafted=drafted,
        accepted=drafted,
        signals={},
        looks=looks,
        rejected=(),
        seconds=0.25 * index,
    )
    return replace(values, **changes)


REJECTED = (Draft(9, " t9", EXIT, "exit"), Draft(4, " t4", 0, "memory"))
STEPS = (
    step(0, 1, LAYERS, (look(LAYERS, 1),)),
    step(1, 2, EXIT, (look(EXIT, 2, fired=True, entropy=0.25), look(LAYERS, 2))),
    step(
        2,
        3,
        LAYERS,
        (look(EXIT, 9, fired=True, entropy=0.75), look(LAYERS, 3)),
        rejected=(
            Draft(9, " t9", EXIT, "exit"),
            Draft(4, " t4", 0, "memory"),
        ),
    ),
)


def trace(steps: tuple[Step, ...] = STEPS, **changes: Any) -> Trace:
    summary = Summary(
        mode="verified", model="tiny", backend="hf", precision="fp32", tokens=len(steps), rounds=2, drafted=2,
        accepted=1, mean_depth=4.5, depth_histogram={}, block_rows=18, block_rows_full=24, block_passes=12,
        block_passes_full=18, seconds=0.5, tokens_per_second=6.0, finish="length", calibrated=True,
    )  # fmt: skip
    made = Trace(
        model="tiny",
        backend="hf",
        precision="fp32",
        mode="verified",
        layers=LAYERS,
        depths=(EXIT,),
        trigger={"kind": "threshold", "signal": "entropy", "at": 1.0, "min_depth": 0},
        prompt="Why?",
        text="".join(s.text for s in steps),
        summary=summary,
        steps=steps,
    )
    return replace(made, **changes)


def embedded(html: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', html, re.DOTALL)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


class Tags(HTMLParser):
    """The tags of a page, and the text of its title."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.title = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["title"]:
            self.title += data.rstrip("\n")


def test_page_needs_no_network() -> None:
    html = trace_page(trace())
    assert not re.search(r"https?://|\bsrc=|@import|url\(", html)
    assert "default-src 'none'" in html
    assert '<html lang="en">' in html
    assert 'name="viewport"' in html
    assert not re.search(r"{{|{%|{#", html)
    assert not {"link", "img", "iframe", "object", "base"} & set(Tags(html).tags)


def test_embedded_steps_parse_back() -> None:
    data = embedded(trace_page(trace()))
    assert tuple(Step.from_json(s) for s in data["steps"]) == STEPS
    assert (data["prompt"], data["layers"], data["depths"]) == ("Why?", LAYERS, [EXIT])
    assert data["summary"] == trace().summary.to_json()


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "<!--<script>", "]]>", "{{ data }}{% raw %}", "&lt;b&gt;", "\u2028\u2029", "\ud800", "\x00\u202e", '"\\', "é語"],
)
def test_hostile_text_stays_text(text: str) -> None:
    odd = step(0, 1, EXIT, (replace(look(EXIT, 1), text=text, candidates=(Candidate(1, text, 1.0),)),), text=text)
    odd = replace(odd, rejected=(Draft(2, text, EXIT),), signals={text: 1.0})
    hostile = trace((odd,), prompt=text, model=text, mode=text, trigger={"kind": text, text: [text]})
    html = trace_page(hostile)
    if "<" in text:
        assert text not in html
    assert Tags(html).tags == Tags(trace_page(trace())).tags
    data = embedded(html)
    assert Step.from_json(data["steps"][0]) == odd
    assert (data["prompt"], data["model"], data["trigger"]) == (text, text, hostile.trigger)
    assert "\x00" not in html
    html.encode("utf-8")  # a lone surrogate must not reach the file


def test_title_is_the_prompt_shortened() -> None:
    assert Tags(trace_page(trace(prompt="a <b>\n & c"))).title == "a <b> & c · tiny"
    assert len(Tags(trace_page(trace(prompt="word " * 99))).title) < 90
    assert Tags(trace_page(trace(prompt=" "))).title == "Trace · tiny"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(bad: float) -> None:
    odd = step(0, 1, EXIT, (look(EXIT, 1, entropy=bad),), signals={"margin": bad})
    data = embedded(trace_page(trace((odd,), summary=replace(trace().summary, tokens_per_second=bad))))
    assert data["steps"][0]["looks"][0]["signals"] == {"entropy": None}
    assert data["steps"][0]["signals"] == {"margin": None}
    assert data["summary"]["tokens_per_second"] is None
    assert data["levels"][0]["entropy"] is None


def test_empty_traces_and_missing_looks() -> None:
    empty = embedded(trace_page(trace((), depths=(), trigger=None)))
    assert (empty["steps"], empty["first"]) == ([], 0)
    assert [row["depth"] for row in empty["levels"]] == [LAYERS]
    bare = embedded(trace_page(trace((step(0, 1, LAYERS), step(1, 2, EXIT)))))
    assert [(row["depth"], row["tokens"], row["looked"]) for row in bare["levels"]] == [(EXIT, 1, 0), (LAYERS, 1, 0)]


def test_levels_count_tokens_rejected_drafts_and_looks() -> None:
    memory, shallow, full = level_table(trace())
    assert (memory["level"], memory["depth"], memory["tokens"], memory["rejected"], memory["looked"]) == ("memory", 0, 0, 1, 0)
    assert shallow == {
        "level": "exit", "depth": EXIT, "tokens": 1, "rejected": 1, "looked": 2, "fired": 2, "agreed": 1, "fired_agreed": 1,
        "entropy": 0.5,
    }  # fmt: skip
    assert (full["level"], full["looked"], full["fired"], full["agreed"], full["tokens"]) == ("full", 3, 0, 3, 2)


def test_memory_and_drafter_are_two_levels() -> None:
    steps = (step(0, 1, 0, level="drafter"), step(1, 2, 0, level="memory"), step(2, 3, LAYERS), step(3, 4, 0, level="drafter"))
    rows = level_table(trace(steps, depths=(0,), trigger={"kind": "never"}))
    assert [(row["level"], row["tokens"]) for row in rows] == [("memory", 1), ("drafter", 2), ("full", 1)]
    html = trace_page(trace(steps))
    for name in ("memory", "drafter", "full"):
        assert f".l-{name} {{" in html, "each level has a colour of its own"


def test_levels_have_depths_that_are_no_exits() -> None:
    rows = level_table(trace((step(0, 1, 4), step(1, 2, LAYERS, (look(3, 2),)))))
    assert [row["depth"] for row in rows] == [EXIT, 3, 4, LAYERS]


def test_first_shown_is_a_rejection_else_the_most_looked_at() -> None:
    assert embedded(trace_page(trace()))["first"] == 2
    assert embedded(trace_page(trace(STEPS[:2])))["first"] == 1


def test_write_page(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    plot(trace(prompt="\ud800"), target)
    assert target.read_text(encoding="utf-8") == trace_page(trace(prompt="\ud800"))
