"""docs/triggers.md and its plots say what the result files hold."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trigger_page", ROOT / "tools" / "triggers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_and_plots_are_current() -> None:
    tool = ROOT / "tools" / "triggers.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_every_plot() -> None:
    page = (ROOT / "docs" / "triggers.md").read_text()
    plots = {path.name for path in (ROOT / "docs" / "images").glob("triggers-*.svg")}
    assert set(re.findall(r"\(images/(triggers-[\w-]+\.svg)\)", page)) == plots


def test_lines_and_columns_lie_where_their_values_say(tool: ModuleType) -> None:
    drawn = tool.lines("t <1>", ["a", "b"], {"x": [0.0, 1.0], "y&z": [0.5, 0.25]}, 0.0, 1.0, (0.0, 1.0))
    ys = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)]
    assert ys == pytest.approx([tool.TOP + tool.HIGH * (1 - v) for v in (0.0, 1.0, 0.5, 0.25)], abs=0.06)
    assert "t &lt;1&gt;" in drawn
    assert "y&amp;z" in drawn
    drawn = tool.columns("t", ["a", "b"], {"x": [0.1, 0.2]}, 0.2, (0, 0.2), True)
    heights = [float(h) for h in re.findall(r'y="[\d.]+" width="[\d.]+" height="([\d.]+)" fill', drawn)]
    assert heights[:2] == pytest.approx([tool.HIGH / 2, tool.HIGH], abs=0.06)


def test_speed_is_drawn_against_full_depth(tool: ModuleType) -> None:
    run = {"name": "margin", "ratios": {"full": {"median": 0.8, "low": 0.7, "high": 1.0}}}
    study = {"estimates": [{"rule": "margin", "ratio": 1.0}, {"rule": "static", "ratio": 0.8}]}
    drawn = tool.speed_plot(study, {"runs": [run]})
    bars = [float(w) for w in re.findall(r'width="([\d.]+)" height="12"', drawn)]
    assert bars[0] == pytest.approx(2 * bars[1], abs=0.2)
    one = float(re.findall(r'class="one" x1="([\d.]+)"', drawn)[0])
    reach = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)"', drawn)[0]
    assert float(reach[1]) == pytest.approx(one, abs=0.06)
    assert float(re.findall(r'<circle cx="([\d.]+)"', drawn)[0]) == pytest.approx(260 + bars[1], abs=0.06)
