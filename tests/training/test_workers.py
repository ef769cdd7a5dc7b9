"""Training text from Ray workers is what one process makes, also where a worker dies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import adi
from adi.training import workers
from adi.training.generate_data import WORKERS, GenerateOptions, generate_dataset
from adi.training.workers import RayWorkers

pytestmark = pytest.mark.slow  # a cluster
OPTIONS = GenerateOptions(tokens=1 << 20, max_new_tokens=3, own_prompts=0.0, repeat=False, seed=5)
PROMPTS = [(5, 6, 7 + i) for i in range(80)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_texts_from_workers_are_those_of_one_process(
    tiny_folder: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adi.load(tiny_folder, backend="hf", threads=1)
    for options in (OPTIONS, GenerateOptions(tokens=100, max_new_tokens=3, own_prompts=0.5, seed=6)):
        here, there = tmp_path / f"here{options.seed}", tmp_path / f"there{options.seed}"
        model.notes.pop(WORKERS, None)
        generate_dataset([model], PROMPTS, here, options)
        model.notes[WORKERS] = RayWorkers(str(tiny_folder), "hf", "fp32")
        generate_dataset([model], PROMPTS, there, options)
        assert files(here) == files(there) != {}
    mark, group = tmp_path / "died", workers._group

    def dying(*given: Any) -> Any:
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return group(*given)

    monkeypatch.setattr(workers, "_group", dying)
    generate_dataset([model], PROMPTS, tmp_path / "again", OPTIONS)
    assert mark.exists()
    assert files(tmp_path / "again") == files(tmp_path / "here5")


def test_a_stopped_run_goes_on_with_the_first_group_that_is_missing(
    tiny_folder: Path, ray_cluster: None, tmp_path: Path
) -> None:
    model = adi.load(tiny_folder, backend="hf", threads=1)
    generate_dataset([model], PROMPTS, tmp_path / "here", OPTIONS)
    whole = files(tmp_path / "here")
    last = max(name for name in whole if "group-" in name)
    (tmp_path / "here" / last).unlink()
    model.notes[WORKERS] = RayWorkers(str(tiny_folder), "hf", "fp32")
    generate_dataset([model], PROMPTS, tmp_path / "here", OPTIONS)
    assert files(tmp_path / "here") == whole
