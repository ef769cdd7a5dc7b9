"""What users are told: every refusal of the package names a value, and is a sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import adi
from adi import errors

SOURCE = Path(adi.__file__).parent
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.AdiError)}
WITHOUT_VALUE = {  # refusals that have no value to show: what is missing is all there is to say, or another message goes around
    *(
        "cli/cache.py",
        "cli/shared/options.py",
        "cli/training/tune.py",
        "decoding/policies.py",
        "decoding/processors.py",
        "files.py",
    ),
    *("measure/bench/peers.py", "measure/statistics.py", "model/openvino/engine.py", "model/openvino/export/graphs.py"),
    *("model/openvino/export/trace.py", "model/tokenizer.py"),
}


def refusals() -> Iterator[tuple[str, ast.expr]]:
    """Where the package raises an ``AdiError``, and its message."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            made = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id in KINDS and made.args:
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", made.args[0]


def constants(message: ast.expr) -> str:
    """What of a message is written in the code, with "{}" for each value."""
    if isinstance(message, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in message.values)
    return str(message.value) if isinstance(message, ast.Constant) else "{}"


def test_a_refusal_names_the_value() -> None:
    bare = [place for place, message in refusals() if "{}" not in constants(message)]
    assert {place.partition(":")[0] for place in bare} <= WITHOUT_VALUE, bare
    assert len(bare) <= len(WITHOUT_VALUE) + 1, "fewer, not more"


def test_a_refusal_is_a_sentence() -> None:
    """It begins small, or with a name, and says one thing; a message that goes into another one has no full stop."""
    for place, message in refusals():
        said = constants(message)
        assert said == said.strip(), place
        assert not said.endswith("!"), place
        assert "Error:" not in said, place
        assert not said[:1].isupper() or said.split()[0] in ("Reflex", "OpenVINO"), place
