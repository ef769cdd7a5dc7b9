"""The benchmark: its statistics against what they mean, and one real run on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from adi.cli.app import app
from adi.measure.bench import Contestant, _match, _ratio
from adi.measure.contestants import Outcome, Setting
from adi.measure.statistics import bootstrap_median
from adi.prompts import PromptItem

SETTING = Setting("m", None, None, 1, 0)


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    dice, covered = random.Random(0), 0
    for trial in range(200):
        found = bootstrap_median([dice.gauss(3, 1) for _ in range(40)], seed=trial, resamples=400)
        assert found.low <= found.median <= found.high
        covered += found.low <= 3 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_repeats_and_needs_values() -> None:
    assert bootstrap_median([1.0, 2.0, 5.0]) == bootstrap_median([1.0, 2.0, 5.0])
    assert bootstrap_median([2.0]).low == 2.0
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_median([])


def contestant(name: str, speeds: list[float], token: int = 7) -> Contestant:
    outcomes = {p: [Outcome((token,) * 10, 10 / speed, 0.1)] for p, speed in enumerate(speeds)}
    return Contestant(name, SETTING, outcomes=outcomes)


def test_ratios_are_medians_over_prompts_of_paired_speeds() -> None:
    items = [PromptItem((str(p),), "code" if p < 2 else "chat") for p in range(5)]
    fast, slow = contestant("adi:a", [20, 10, 90, 40, 8]), contestant("b", [10, 10, 30, 10, 10])
    found = _ratio(fast, slow, items, 0)
    assert found["median"] == pytest.approx(2.0)
    assert found["per_category"] == pytest.approx({"code": 1.5, "chat": median([3, 4, 0.8])})
    del slow.outcomes[2]
    assert _ratio(fast, slow, items, 0)["median"] == pytest.approx(1.5), "only prompts that both ran"


def test_match_is_the_share_of_prompts_with_the_same_tokens() -> None:
    one, other = contestant("adi:a", [1, 1, 1, 1]), contestant("b", [1, 1, 1, 1])
    assert _match(one, other, [0, 1, 2, 3]) == 1
    other.outcomes[2] = [Outcome((1, 2), 1.0, 0.1)]
    assert _match(one, other, [0, 1, 2, 3]) == 0.75
    assert _match(one, None, [0]) is None


def test_a_run_on_a_tiny_model(tiny_folder: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "r.json"
    rows = [{"prompt": f"the fox number {i}", "category": "even" if i % 2 == 0 else "odd"} for i in range(4)]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    args = ["bench", tiny_folder, "--prompts", prompts, "--peers", "hf:fp32,abacus", "-n", 6, "--threads", 1, "--json", out]
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == ["adi:full:fp32", "adi:verified:fp32", "hf:fp32", "abacus"]
    assert "'abacus' is not known" in runs["abacus"]["error"]
    for name in list(runs)[:3]:
        assert runs[name]["match"] == 1, "the same model says the same"
        assert runs[name]["tokens_per_second"] > 0
        assert runs[name]["ttft_seconds"] > 0
        assert runs[name]["peak_bytes"] > 10**7
        assert set(runs[name]["per_category"]) == {"even", "odd"}
    assert {(r["a"], r["b"]) for r in found["ratios"]} == {
        ("adi:full:fp32", "adi:verified:fp32"),
        ("adi:full:fp32", "hf:fp32"),
        ("adi:verified:fp32", "adi:full:fp32"),
        ("adi:verified:fp32", "hf:fp32"),
    }
    assert found["prompts_hash"]
    assert found["versions"]["torch"]
    assert "did not run" in done.stdout


@pytest.mark.parametrize(
    ("args", "complaint"),
    [(["--modes", "fast"], "'fast' is not known"), (["--modes", ""], "--modes is empty"), (["--limit", "0"], "--limit is 0")],
)
def test_mistakes_are_refused_before_any_work(args: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["bench", *args])
    assert done.exit_code == 2
    assert complaint in done.output
