"""The folder tree is the architecture: values flow right, imports point left, and importing adi costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import adi
from adi.cli.app import COMMANDS, asked_for

SOURCE = Path(adi.__file__).parent
# A module imports what stands in an earlier line, or in its own entry. "adi" itself is only the lazy front door.
ORDER = """
errors
arguments clusters files machine progress
cache
schema
prompts tasks
model.ouro model.sparse
model.arrays model.stored model.looped
model.backbone
model.prefix_cache model.prompt model.messages model.fast_tokenizer model.generation_config model.hub
model.tokenizer
model.hf
model.openvino
model.load
exits
drafters
risk
artifact
decoding
attached lm_eval
training measure.statistics measure.provenance measure.pages measure.trace
measure.trace_page
measure.trigger_study measure.calibration measure.bench
measure
measure.audit
serve
cli
__main__
"""
RANK = {name: rank for rank, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


def home(module: str) -> str | None:
    """The longest entry of ``ORDER`` that a module belongs to; None for packages that hold nothing but their docstring."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in RANK), None)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "adi":
            package = node.module.removeprefix("adi").lstrip(".")
            inner = {alias.name for alias in node.names if (SOURCE / package.replace(".", "/") / f"{alias.name}.py").exists()}
            yield from (f"{package}.{name}".lstrip(".") for name in inner)
            if len(inner) < len(node.names):
                yield package
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("adi.") for alias in node.names if alias.name.startswith("adi."))


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found.append((name, path))
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_left(name: str, path: Path) -> None:
    here = home(name)
    if here is None:
        assert not list(imports(path)), f"adi.{name} is in no line of the order, and imports something"
        return
    for target in imports(path):
        if not target:
            assert here == "cli", f"adi.{name} imports the front door; import the module that has what it needs"
            continue
        there = home(target)
        assert there is not None, f"adi.{name} imports adi.{target}, which is in no line of the order"
        assert here == there or RANK[there] < RANK[here], f"adi.{name} imports adi.{target}, which stands to its right"


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions count too: a circle that only works at run time is one all the same."""
    names = {name for name, _ in modules()}

    def module_of(target: str) -> str:
        while target and target not in names:
            target = target.rpartition(".")[0]
        return target

    graph = {name: {there for t in imports(path) if (there := module_of(t)) and there != name} for name, path in modules()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def _fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_adi_loads_no_torch() -> None:
    heavy = ("torch", "transformers", "numpy", "scipy", "openvino", "typer")
    assert _fresh(f"import adi, sys; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_openvino_reports_to_nobody() -> None:
    """Its telemetry forks the process several times for each conversion, and sends what it can to an address on the network."""
    pytest.importorskip("openvino")
    code = "import adi, openvino; from openvino.tools.ovc import telemetry_utils; print(telemetry_utils.tm.__name__)"
    assert _fresh(code).strip() == "openvino.tools.ovc.telemetry_stub"


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['adi', 'run', '--help']\n"
        "from adi.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('loaded', [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert _fresh(code).splitlines()[-1] == "loaded []"


def test_a_command_reads_its_own_options_only() -> None:
    code = (
        "import sys; sys.argv = ['adi', 'run', '--help']\n"
        "from adi.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('loaded', sorted(m for m in sys.modules if m in ('adi.cli.run', 'adi.cli.training.tune', 'adi.cli.bench')))"
    )
    assert _fresh(code).splitlines()[-1] == "loaded ['adi.cli.run']"
    assert asked_for(["run", "hello"]) == ("run",)
    for line in ([], ["--help"], ["rn"], ["--version", "run"]):
        assert asked_for(line) == tuple(COMMANDS)


def test_every_public_name_is_there() -> None:
    for name in adi.__all__:
        assert getattr(adi, name) is not None
        assert (getattr(adi, name).__doc__ or "").strip() or name == "Policy", f"adi.{name} has no docstring"
    assert set(adi.__all__) <= set(dir(adi))
    with pytest.raises(AttributeError, match="generate_everything"):
        adi.generate_everything  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    seen = ast.parse(Path(adi.__file__).with_suffix(".pyi").read_text()).body
    assert {alias.asname for line in seen if isinstance(line, ast.ImportFrom) for alias in line.names} == set(adi.__all__)


def test_files_stay_short() -> None:
    long = {str(p.relative_to(SOURCE)): n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert not long, f"over 500 lines: {long}"


def test_no_module_hides_a_public_name() -> None:
    assert not [name for name in adi.__all__ if (SOURCE / name).exists() or (SOURCE / f"{name}.py").exists()]
