"""``adi train`` on two processes of one machine: each takes half of every batch, so it trains what one process trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adi.schema import from_json
from adi.training.train_looped import TrainSettings, train_looped

pytestmark = pytest.mark.slow  # four processes that import torch
SETTINGS = """
task = "products-S3"
steps = 8
batch = 4
warmup = 2
save_every = 5
gate_only = 0.25
ema = 0.5
[model]
hidden_size = 16
intermediate_size = 32
num_attention_heads = 2
turns = 2
"""


def launched(folder: Path, processes: int = 2) -> str:
    (folder / "tiny.toml").write_text(SETTINGS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, "-m", "adi", "train", str(folder / "tiny.toml"), "--out", str(folder / "made")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_processes_train_what_one_does_and_resume_to_the_bit(tmp_path: Path) -> None:
    import tomllib

    said = launched(tmp_path)
    made = tmp_path / "made"
    assert said.count("Saved to") == 1
    assert "8 of 8" in (made / "work" / "log.txt").read_text()
    two = load_file(made / "model.safetensors")
    one = train_looped(from_json(tomllib.loads(SETTINGS), TrainSettings, "settings"), tmp_path / "one")
    for name, weight in one.named_parameters():
        torch.testing.assert_close(two[name], weight.detach(), atol=2e-5, rtol=1e-3)

    kept = sorted(path.name for path in (made / "work" / "checkpoint-5").glob("carry*"))
    assert kept == ["carry-1-of-2.safetensors", "carry-2-of-2.safetensors"]
    shutil.rmtree(made / "work" / "checkpoint-8")
    (made / "model.safetensors").unlink()
    launched(tmp_path)
    again = load_file(made / "model.safetensors")
    assert all(torch.equal(again[name], two[name]) for name in two)
