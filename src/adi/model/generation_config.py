"""A model's generation config, by transformers' names: the tokens that end an answer, and what changes greedy text.

``transformers.generation.GenerationConfig`` says what each field means. Read here without transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adi.errors import ModelError
from adi.files import read_json

Fields = Mapping[str, Any]
FILE = "generation_config.json"
TEXT_CONFIGS = ("decoder", "generator", "text_config")  # where transformers looks for what config.json itself leaves open


def read_fields(folder: Path) -> dict[str, Any]:
    """The generation config of a model's folder as transformers makes it: its own file, or else what config.json states."""
    if (folder / FILE).exists():
        return _object(folder / FILE, "generation configuration")
    return config_fields(_object(folder / "config.json", "configuration"))


def config_fields(config: Fields) -> dict[str, Any]:
    """What a model's configuration states; of a model of text and more, what its text part does too."""
    text = next((part for name in TEXT_CONFIGS if isinstance(part := config.get(name), Mapping)), {})
    return {name: value for part in (text, config) for name, value in part.items() if value is not None}


def _object(path: Path, what: str) -> dict[str, Any]:
    found = read_json(path, what) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def end_tokens(generation: Fields, config: Fields, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those of the generation config, as in transformers, whose ``generate`` knows no others.

    Where it has none, ``generate`` would never end; then those of the model's configuration and of its tokenizer do.
    """
    stated = generation.get("eos_token_id")
    found = (
        [stated]
        if stated is not None
        else [config_fields(config).get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)]
    )
    given = [i for one in found for i in (one if isinstance(one, (list, tuple)) else [one]) if i is not None]
    if wrong := [i for i in given if type(i) is not int]:
        raise ModelError(f"the model's eos_token_id is {wrong[0]!r}; it must be a token id, or several.")
    return frozenset(given)
