"""What every result says about where it comes from."""

from __future__ import annotations

import multiprocessing
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adi.machine import processor, vectors
from adi.prompts import PromptItem, prompts_hash

PACKAGES = (
    *("adi-lm", "torch", "transformers", "openvino", "nncf", "openvino-genai", "openvino-tokenizers"),
    *("llama-cpp-python", "economize", "gguf"),
)


def provenance(command: str, items: Sequence[PromptItem]) -> dict[str, Any]:
    """The command, the versions of what takes part, the machine, and which prompts."""
    where = [platform.machine(), f"{multiprocessing.cpu_count()} cores"]
    return {
        "command": command,
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "python": platform.python_version(),
        "processor": processor(),
        "machine": ", ".join(filter(None, [*where, vectors(), platform.system()])),
        "prompts": len(items),
        "prompts_hash": prompts_hash(items),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
