"""Prompt files: the sets that the package carries, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from adi.prompts import read_prompts


def test_the_built_in_prompts_are_many_distinct_and_separate() -> None:
    train, bench = read_prompts("train"), read_prompts("bench")
    assert len({i.turns for i in train}) == len(train) >= 400
    assert len({i.turns for i in bench}) == len(bench) >= 60
    assert not {i.turns for i in train} & {i.turns for i in bench}
    assert len({i.category for i in bench}) == 8


@pytest.mark.parametrize(
    "text", ["", "\n\n", "not json", '{"text": "a"}', '{"prompt": 3}', '{"turns": []}', '["a"]', '{"prompt": "a", "x": 1}']
)
def test_prompt_files_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"p\.jsonl"):
        read_prompts(path)


def test_prompt_files_may_hold_odd_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n{"turns": ["c", "d"], "category": "chat"}\n')
    assert [i.turns for i in read_prompts(path)] == [("a\u2028b",), ("c", "d")]


def test_an_unknown_set_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ValueError, match=r"builtin: .*'train' \(480 prompts to train on\), 'bench' \(80 to measure with\)"):
        read_prompts("builtin")


@pytest.mark.parametrize(
    "text", ['{"prompt": " \\n"}', '{"turns": ["a", ""]}', '{"category": "a"}', '{"prompt": "a", "category": 1}']
)
def test_lines_without_a_prompt_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + text)
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2"):
        read_prompts(path)
