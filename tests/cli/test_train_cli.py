"""``adi train`` from a file of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import adi_

TINY = """
task = "products-S3"
steps = 3
batch = 4
[model]
hidden_size = 16
intermediate_size = 32
num_attention_heads = 2
turns = 2
"""


def test_settings_become_a_model_that_solves(tmp_path: Path) -> None:
    settings = tmp_path / "tiny.toml"
    settings.write_text(TINY)
    done = adi_("train", settings, "--out", tmp_path / "made")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made" / "model.safetensors").exists()
    assert "3 of 3" in (tmp_path / "made" / "work" / "log.txt").read_text()
    assert adi_("solve", tmp_path / "made", "1,2").exit_code == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("task = ", "is not TOML"),
        (TINY.replace("steps = 3", "steps = 0"), "steps: expected int >= 1"),
        (TINY.replace("batch = 4", "size = 4"), "unknown field"),
        (TINY.replace("products-S3", "chess"), "no task 'chess'"),
        (TINY + "\nprice = 2", "model.price is no field"),
        ('objective = "cheap"\n' + TINY, "objective: invalid enum value 'cheap'"),
        ("price = -1.0\n" + TINY, "price: expected float >= 0"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(tmp_path: Path, text: str, match: str) -> None:
    settings = tmp_path / "bad.toml"
    settings.write_text(text)
    done = adi_("train", settings, "--out", tmp_path / "made")
    assert done.exit_code == 2
    assert match in done.output + done.stderr


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = adi_("train", tmp_path / "none.toml", "--out", tmp_path / "made")
    assert done.exit_code == 2
    assert "none.toml" in done.output + done.stderr
