"""``adi triggers``: the study, the probe that it fits, the rule that it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adi
from conftest import random_exits
from support import adi_, time_once


@pytest.fixture(autouse=True)
def _time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    time_once(monkeypatch)


def test_triggers_prints_tables(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = ["--prompts", tmp_path / "p.jsonl"]
    prompts[1].write_text("\n".join(json.dumps({"prompt": f"the fox number {i}"}) for i in range(6)))
    done = adi_("triggers", tiny_folder, *prompts, "--exits", "bare:3", "--limit", 4, "-n", 8, "--calibrate", "")
    assert done.exit_code == 0, done.output
    for said in ("AUROC", "An oracle would stop at", "temperature", "of full depth", "others test"):
        assert said in done.stdout
    done = adi_("triggers", tiny_folder, *prompts, "--exits", "bare:3", "--calibrate", prompts[1])
    assert done.exit_code == 2
    assert "6 prompts would calibrate and test" in done.output
    assert "needs --save" in adi_("triggers", tiny_folder, "--exits", "bare:3", "--fit-probe", prompts[1]).output


def test_a_probe_is_fitted_kept_and_studied(tiny_folder: Path, tiny_model: adi.Model, tmp_path: Path) -> None:
    prompts, fitting = tmp_path / "p.jsonl", tmp_path / "f.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"the fox number {i}"}) for i in range(4)))
    fitting.write_text("\n".join(json.dumps({"prompt": f"the dog number {i}"}) for i in range(10)))
    random_exits(tiny_model, (2, 4), adi.Never()).save(tmp_path / "exits")
    given = ["--exits", tmp_path / "exits", "-n", 6]
    done = adi_("triggers", tiny_folder, *given, "--fit-probe", fitting, "--save", tmp_path / "probed")
    assert done.exit_code == 0, done.output
    assert "state and head" in done.stdout
    exits = adi.load_exits(tmp_path / "probed")
    assert exits.probe is not None
    assert exits.report["probe"]["texts"] == 10
    given = ["--exits", tmp_path / "probed", "-n", 6, "--prompts", prompts, "--calibrate", fitting, "--calibrate-limit", 3]
    found = json.loads(adi_("triggers", tiny_folder, *given, "--json", "--save", tmp_path / "chosen").stdout)
    best = next(one for one in found["estimates"] if one["trigger"] is not None)
    assert adi.load_exits(tmp_path / "chosen").trigger.to_json() == best["trigger"]
    assert {"state_probe", "joint_probe"} <= {score["signal"] for score in found["scores"]}
    assert found["probe"] == exits.report["probe"]
    rule = json.dumps({"kind": "threshold", "signal": "joint_probe", "at": 0.5, "min_depth": 0})
    done = adi_(
        "run",
        "hello",
        "--model",
        tiny_folder,
        "--exits",
        tmp_path / "probed",
        "--trigger",
        rule,
        "-n",
        6,
        "--compare",
        "--json",
    )
    assert json.loads(done.stdout)["identical"]
