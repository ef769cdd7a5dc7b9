"""``adi history``, and whose texts it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import adi
from adi.cli.app import app
from adi.drafters.history import History
from adi.model.tokenizer import Tokenizer, tokenizer_fingerprint

OURS = {"fingerprint": "ours", "vocabulary": 100}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "habits.adi"


def test_a_fingerprint_is_of_what_the_ids_mean(tiny_tokenizer: Any, tiny_folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    own = tokenizer_fingerprint(Tokenizer(tiny_tokenizer))
    other = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    assert tokenizer_fingerprint(Tokenizer(other)) == own
    assert len(own) == 32
    other.add_tokens(["<|more|>"])
    assert tokenizer_fingerprint(Tokenizer(other)) != own


def adi_(*args: Any) -> Any:
    return CliRunner().invoke(app, ["history", *map(str, args)], env={"COLUMNS": "200"})


def test_the_command_shows_and_shortens(path: Path, tiny_tokenizer: Any, tiny_folder: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer)
    known = History.open(path, fingerprint=tokenizer_fingerprint(tokenizer), vocabulary=304)
    for text in ("the quick brown fox", "the lazy dog \x1b[31m", "and [bold]then"):
        known.learn(tokenizer.encode(text))
    done = adi_(path, "--texts", 2, "--model", tiny_folder)
    assert done.exit_code == 0, done.output
    for part in (known.info().fingerprint, "262,144", f"{known.info().tokens:,}", f"{known.info().bytes:,}"):
        assert part in done.stdout
    assert done.stdout.index("the lazy dog \ufffd[31m") < done.stdout.index("and [bold]then")
    assert "quick" not in done.stdout
    assert "\x1b" not in done.stdout
    newest = len(tokenizer.encode("and [bold]then"))
    assert adi_(path, "--keep-tokens", newest).exit_code == 0
    assert known.info().tokens == newest
    assert adi_(path, "--forget").exit_code == 0
    assert known.info().sequences == 0


def test_a_comparison_remembers_its_text_once(path: Path, tiny_tokenizer: Any, tiny_folder: Path) -> None:
    """And not what it warms up with."""
    args = ["run", "the fox", "--model", tiny_folder, "--backend", "hf", "--compare", "-n", 12, "--history", path]
    done = CliRunner().invoke(app, list(map(str, args)))
    assert done.exit_code == 0, done.output
    known = History.open(path, fingerprint=tokenizer_fingerprint(Tokenizer(tiny_tokenizer)), vocabulary=304)
    assert known.info().sequences == 1


def test_mistakes_get_a_sentence_and_exit_code_2(path: Path, tmp_path: Path, tiny_folder: Path) -> None:
    History.open(path, **OURS)
    (tmp_path / "junk").write_text("junk")
    for args, complaint in (
        ((tmp_path / "none",), "cannot read the history"),
        ((tmp_path / "junk",), "is not a history file"),
        ((path, "--forget", "--keep-tokens", 3), "--keep-tokens 3 and --forget say different things"),
        ((path, "--keep-tokens", -3), "Invalid value for '--keep-tokens'"),
        ((path, "--texts", -1), "Invalid value for '--texts'"),
        ((path, "--texts", 1, "--model", tiny_folder), "of another tokenizer than"),
    ):
        done = adi_(*args)
        assert done.exit_code == 2, done.output
        assert complaint in " ".join(done.output.split())
        assert "Traceback" not in done.output


def test_a_text_that_cannot_be_remembered_is_given_all_the_same(path: Path, tiny_model: adi.Model, tiny_tokenizer: Any) -> None:
    mine = tokenizer_fingerprint(Tokenizer(tiny_tokenizer))
    policy = adi.Verified(history=History.open(path, fingerprint=mine, vocabulary=tiny_model.backbone.spec.vocabulary))
    adi.generate(tiny_model, "hello fox", policy, max_new_tokens=6, stop_at_eos=False)
    path.write_bytes(b"junk" * 64)
    with pytest.warns(UserWarning, match="this text was not remembered"):
        got = adi.generate(tiny_model, "hello dog", policy, max_new_tokens=6, stop_at_eos=False)
    assert (
        got.token_ids == adi.generate(tiny_model, "hello dog", adi.FullDepth(), max_new_tokens=6, stop_at_eos=False).token_ids
    )
