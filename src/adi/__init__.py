"""adi: adaptive depth inference for decoder language models.

>>> import adi
>>> model = adi.load("smollm2-135m")
>>> exits = adi.load_exits("smollm2-135m")
>>> print(adi.generate(model, "Why is the sky blue?", policy=adi.Verified(exits)))

Importing this loads neither torch nor transformers; the first verb does.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# Or OpenVINO would report its import and each conversion to its makers, from forks of this process.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")  # names the public names and their modules
_HOME = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as", _STUB, re.MULTILINE)}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adi' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
