"""The model's generation config: which tokens end an answer, on every engine, with and without each file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import adi
from adi.errors import ModelError
from adi.model.generation_config import end_tokens, read_fields

ENDS = [0, 77]  # the tokenizer's end token and another one


def folder_with(source: Path, place: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    """A copy of a model's folder, whose config.json also states ``config``; its generation_config.json is ``generation``."""
    shutil.copytree(source, place)
    stated = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**stated, **config}))
    (place / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (place / "generation_config.json").write_text(json.dumps(generation))
    return place


# A6
@pytest.mark.parametrize(
    ("generation", "ends"),
    [
        (None, ENDS),  # transformers makes one of config.json
        ({"temperature": 0.7, "do_sample": True}, ENDS),  # transformers' generate would never end
        ({"eos_token_id": 5}, [5]),
        ({"eos_token_id": [5, 6]}, [5, 6]),
    ],
)
def test_the_same_tokens_end_an_answer_on_every_engine(
    generation: dict[str, Any] | None, ends: list[int], tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    folder = folder_with(tiny_folder, tmp_path / "m", {"eos_token_id": ENDS}, generation)
    theirs = t.AutoModelForCausalLM.from_pretrained(folder).generation_config
    if theirs.eos_token_id is not None:
        assert theirs.eos_token_id in (ends, ends[0])
    read = read_fields(folder)
    assert {name: read.get(name) for name in ("eos_token_id", "temperature")} == {
        "eos_token_id": theirs.eos_token_id,
        "temperature": theirs.temperature,
    }
    for backend in ("hf", "openvino"):
        model = adi.load(folder, backend=backend, precision="fp32")
        assert model.eos_ids == set(ends), backend


# A6
def test_a_model_in_memory_ends_where_its_own_generate_ends(tiny_hf: Any, tiny_tokenizer: Any) -> None:
    ids = [5, 60, 7, 80]
    text = adi.generate(adi.load(tiny_hf), ids, max_new_tokens=30, stop_at_eos=False).token_ids
    ends, kept = [text[12], text[20]], tiny_hf.generation_config.eos_token_id
    tiny_hf.generation_config.eos_token_id = ends
    try:
        with torch.no_grad():
            theirs = tiny_hf.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 4:].tolist()
        for tokenizer in (None, tiny_tokenizer):
            got = adi.generate(adi.load(tiny_hf, tokenizer=tokenizer), ids, max_new_tokens=30)
            assert (list(got.token_ids), got.finish) == (theirs, "eos")
    finally:
        tiny_hf.generation_config.eos_token_id = kept


def test_end_tokens_of_a_model_of_text_and_more_are_its_text_parts_too() -> None:
    assert end_tokens({}, {"text_config": {"eos_token_id": [1, 2]}}, None) == {1, 2}
    assert end_tokens({}, {"eos_token_id": 3, "text_config": {"eos_token_id": [1, 2]}}, None) == {3}
    assert end_tokens({}, {}, None) == frozenset()
    with pytest.raises(ModelError, match="eos_token_id is '2'; it must be a token id"):
        end_tokens({"eos_token_id": ["2"]}, {}, None)
