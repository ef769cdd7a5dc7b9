"""A model's generation config, by transformers' names: the tokens that end an answer, and what changes greedy text.

``transformers.generation.GenerationConfig`` says what each field means. Read here without transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adi.errors import ModelError, UsageError
from adi.files import read_json

Fields = Mapping[str, Any]
# What changes greedy text, with the value at which it does not; transformers' logits processors do it.
CHANGING: Fields = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "sequence_bias": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "watermarking_config": None,
}
# What is another way of decoding, or another prompt.
REFUSED: Fields = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0,
    "dola_layers": None,
    "guidance_scale": 1,
    "token_healing": False,
}
OTHERS = ("cache_implementation", "eos_token_id", "stop_strings")
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


def changing(fields: Fields) -> dict[str, Any]:
    """Those of the fields that change greedy text."""
    return {name: fields[name] for name, idle in CHANGING.items() if fields.get(name) not in (None, idle)}


def known_fields(given: Fields) -> Fields:
    """The fields, if adi reads all of them; UsageError names one that it does not."""
    read = sorted({*CHANGING, *REFUSED, *OTHERS})
    if strange := sorted(set(given) - {*read}):
        raise UsageError(f"generation_config holds {strange[0]!r}, which adi does not read; it reads {', '.join(read)}.")
    return given


def refuse_unmeant(fields: Fields, source: str) -> None:
    """ModelError, by name, for a generation config that asks for what adi does not do."""
    asked = {name: fields[name] for name, idle in REFUSED.items() if fields.get(name) not in (None, idle)}
    if fields.get("cache_implementation") == "quantized":
        asked["cache_implementation"] = "quantized"
    if asked:
        named = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        off = "{" + ", ".join(f"{name!r}: None" for name in asked) + "}"
        raise ModelError(
            f"the generation config of {source or 'the model'} sets {named}, which is not greedy decoding or sampling of one "
            f"text; leave it out with adi.load(..., generation_config={off}), or take it out of {FILE}."
        )


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
