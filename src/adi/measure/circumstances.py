"""What every result says about where it comes from."""

from __future__ import annotations

import multiprocessing
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adi.prompts import PromptItem, prompts_hash

PACKAGES = (
    *("adi-lm", "torch", "transformers", "openvino", "nncf", "openvino-genai", "openvino-tokenizers"),
    *("llama-cpp-python", "economize", "gguf"),
)


def circumstances(command: str, items: Sequence[PromptItem]) -> dict[str, Any]:
    """The command, the versions of what takes part, the machine, and which prompts."""
    return {
        "command": command,
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "python": platform.python_version(),
        "processor": _processor(),
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores, {platform.system()}",
        "prompts": len(items),
        "prompts_hash": prompts_hash(items),
    }


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
