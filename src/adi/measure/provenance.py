"""What every result says about where it comes from."""

from __future__ import annotations

import hashlib
import multiprocessing
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
        "versions": dict(_versions()),
        "python": platform.python_version(),
        "processor": processor(),
        "machine": ", ".join(filter(None, [*where, vectors(), platform.system()])),
        "prompts": len(items),
        "prompts_hash": prompts_hash(items),
    }


def files_hash(*places: Path) -> str:
    """What tells files and folders of the same names apart: when their files were written, and how long they are."""
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file()]
    facts = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            yield package, version(package)
