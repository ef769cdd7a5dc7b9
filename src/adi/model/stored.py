"""What a model folder may hold instead of plain weights: an adapter, quantised weights, code of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from adi.errors import ModelError, NotExportableError
from adi.files import read_json

VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
BECOMES_PLAIN = ("mxfp4", "fp8")  # transformers makes floats of it where no GPU runs it


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and not a model; ModelError for one that cannot be read here."""
    if not (folder / "adapter_config.json").exists() or any(folder.glob("model*.safetensors")):
        return False
    stated = _fields(folder / "adapter_config.json")
    kind, base = str(stated.get("peft_type")).upper(), stated.get("base_model_name_or_path")
    if kind in VIRTUAL_TOKENS:
        raise ModelError(
            f"{folder} is an adapter of the kind {kind}, which puts virtual tokens before the text, and adi runs none; "
            "adapters that change weights (LoRA and its like) can be loaded."
        )
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"{folder} is a {kind} adapter for {base}, and reading it needs peft: pip install peft, or merge it into its base "
            "(merge_and_unload) and save that."
        )
    return True


def require_plain(source: str, folder: Path) -> None:
    """NotExportableError, in a sentence, for a folder from which no compiled engine can start."""
    if is_adapter(folder):
        raise NotExportableError(
            f"{source} is an adapter beside its base, and an export starts from one model: merge_and_unload() and save it."
        )
    stored = _fields(folder / "config.json").get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method is not None and method not in BECOMES_PLAIN:
        raise NotExportableError(
            f"the weights of {source} are quantised by {method}, and an export starts from plain ones (it rounds them itself)."
        )


def _fields(path: Path) -> dict[str, Any]:
    found = read_json(path, "configuration") if path.exists() else {}
    return found if isinstance(found, dict) else {}
