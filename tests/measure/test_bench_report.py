"""The page of a benchmark: right numbers the right way round, safe against the texts in it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from adi.cli.app import app
from adi.measure.bench.report import PairedRatio, RunFigures, against_base, bench_page, is_result, read_result
from adi.measure.bench.run import FORMAT, VERSION

HOSTILE = "</style><script>alert(1)</script>"


def run(name: str, speed: float, **changes: Any) -> dict[str, Any]:
    figures = {"tokens_per_second": speed, "ttft_seconds": 0.05, "match": 0.5, "match_tokens": 0.75}
    return {
        "name": name,
        "error": None,
        "about": f"about {name}",
        **figures,
        "tokens_per_second_low": speed * 0.9,
        "tokens_per_second_high": speed * 1.1,
        "peak_bytes": 2**29,
        "tokens_per_round": None,
        "accepted_share": None,
        "match_with": "adi:full:int4",
        "per_category": {"code": figures, "chat": {**figures, "tokens_per_second": speed / 2}},
        **changes,
    }


def ratio(a: str, b: str, median: float) -> dict[str, Any]:
    return {"a": a, "b": b, "median": median, "low": median / 2, "high": median * 3}


RESULT: dict[str, Any] = {
    "format": FORMAT, "version": VERSION, "command": "adi bench m", "versions": {"torch": "2"}, "processor": "P",
    "machine": "x", "threads": 2, "model": "m", "prompts": 4, "max_new_tokens": 8, "prompt_tokens": None,
    "runs": [
        run("adi:full:int4", 40.0),
        run("adi:verified:int4", 80.0),
        run("llama.cpp", 50.0),
        {"name": "economize", "error": "no\nmodule"},
    ],
    "ratios": [
        ratio("adi:full:int4", "adi:verified:int4", 0.5),
        ratio("adi:full:int4", "llama.cpp", 0.8),
        ratio("adi:verified:int4", "adi:full:int4", 2.0),
        ratio("adi:verified:int4", "llama.cpp", 1.6),
    ],
}  # fmt: skip


def test_ratios_are_of_the_run_over_its_base() -> None:
    ratios = msgspec.convert(RESULT["ratios"], list[PairedRatio])
    full, verified, llama = msgspec.convert(RESULT["runs"][:3], list[RunFigures])

    def against(run: RunFigures, base: str | None = None) -> tuple[str, float, float, float]:
        found = against_base(run, ratios, base)
        assert found is not None
        return found.b, found.median, found.low, found.high

    assert against(full) == ("adi:full:int4", 1, 1, 1)
    assert against(verified) == ("adi:full:int4", 2.0, 1.0, 6.0)
    assert against(llama) == pytest.approx(("adi:full:int4", 1.25, 1 / 2.4, 2.5)), "inverted"
    assert against(llama, "adi:verified:int4")[1] == pytest.approx(0.625)
    assert against_base(msgspec.convert(run("b", 1.0), RunFigures), ratios) is None


def test_the_page_shows_everybody_by_speed() -> None:
    html = bench_page(RESULT)
    bars = html[html.index("Tokens per second") : html.index("Speed against")]
    assert re.findall(r'text-anchor="end">([^<]+)<', bars) == ["adi:verified:int4", "llama.cpp", "adi:full:int4"]
    lengths = [float(w) for w in re.findall(r'<rect class="\w+" x="\d+" y="[\d.]+" width="([\d.]+)"', bars)]
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 50 / 80, 0.5], abs=1e-3)
    assert "1.25 (0.42 to 2.50)" in html
    assert "0.62 (0.21 to 1.25)" in bench_page(RESULT, "adi:verified:int4")
    assert "economize: no\nmodule" in html
    assert '<td class="best">80.0</td>' in html
    assert "<td>25.0</td>" in html, "llama.cpp in the category chat"


def test_the_page_needs_no_network_and_no_script() -> None:
    html = bench_page(RESULT)
    assert not re.search(r"https?://|\bsrc=|@import|url\(|<script|<link|<img", html)
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"{{|{%|{#", html)


def test_hostile_texts_stay_texts() -> None:
    value = copy.deepcopy(RESULT)
    value |= {"model": HOSTILE, "command": HOSTILE, "processor": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    value["runs"][2] |= {"name": HOSTILE, "about": HOSTILE, "match_with": HOSTILE, "per_category": {HOSTILE: RESULT["runs"][2]}}
    value["runs"][3] |= {"error": HOSTILE}
    html = bench_page(value)
    assert HOSTILE not in html
    assert "&amp;lt;" not in html, "nothing was escaped twice"
    assert "&lt;script&gt;alert(1)" in html


def test_an_unknown_base_is_refused() -> None:
    for base in ("llama.cpp", "adi:full:int8"):
        with pytest.raises(ValueError, match="choose among adi:verified:int4, adi:full:int4"):
            bench_page(RESULT, base)


def test_the_command_draws_it(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(RESULT, indent=1))
    assert is_result(file)
    done = CliRunner().invoke(app, ["plot", str(file), "--base", "adi:full:int4"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.html").read_text() == bench_page(RESULT, "adi:full:int4")
    assert bench_page(read_result(file)) == bench_page(RESULT)
    (tmp_path / "t.json").write_text("{}")
    assert (
        "is an option for benchmarks only" in CliRunner().invoke(app, ["plot", str(tmp_path / "t.json"), "--base", "x"]).output
    )


@pytest.mark.parametrize("change", [{"version": 1}, {"runs": [{"name": "x"}]}, {"runs": 3}, {"ratios": [{"a": 1}]}])
def test_damaged_results_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps({**RESULT, **change}))
    with pytest.raises(ValueError, match=r"r\.json is"):
        read_result(file)
