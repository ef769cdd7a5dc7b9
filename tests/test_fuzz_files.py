"""Traces, results, prompts, memories and checkpoints that somebody damaged or forged: a sentence, and no code that runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import adi
from adi.cli.app import app
from adi.cli.shared.options import likely_stops, read_trigger
from adi.decoding.drafting.cost_model import cost_model_of
from adi.drafters.history import History
from adi.measure.bench.outcomes import Outcome, Sweep, SweepPoint
from adi.measure.bench.report import bench_page, read_result
from adi.measure.bench.resume import ResumeFile
from adi.measure.bench.worker import System
from adi.measure.trace_page import trace_page
from adi.model.openvino.manifest import FORMAT, read_manifest
from adi.prompts import read_prompts
from adi.training.shards import read_shard
from adi.training.trainer import load_checkpoint, save_checkpoint
from damage import Bomb, bombs, changed, damaged, endless, nested, only_value_errors, workplace
from families import tiny

RESULT = Path(__file__).parent.parent / "docs" / "results" / "ladder.json"
ADAPTER = [torch.ones(3), torch.zeros(2, 2)]
_KEPT: dict[str, Any] = {}


def optimizer() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    parameters = [tensor.clone().requires_grad_() for tensor in ADAPTER]
    return parameters, torch.optim.AdamW(parameters)


def plotted(path: Path) -> str:
    return trace_page(adi.read_trace(path))


def restored(path: Path) -> object:
    found = ResumeFile(path.with_name(path.name.removesuffix(".partial")), _KEPT["terms"]).read()
    found.restore([System("a", None)])  # type: ignore[arg-type]
    return found.sweeps


def remembered(path: Path) -> object:
    history = History.open(path, fingerprint="tokens", vocabulary=50, create=False)
    return history.find([1, 2, 3], 4), history.info(), History.look(path).newest(3)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "trace": plotted,
    "benchmark": lambda path: bench_page(read_result(path)),
    "unfinished benchmark": restored,
    "prompts": read_prompts,
    "trigger": lambda path: read_trigger(str(path)),
    "history": remembered,
    "checkpoint": lambda path: load_checkpoint(path, *optimizer()),
    "shard": read_shard,
    "model.json": lambda path: read_manifest(path.parent),
}
JSONS = ("trace", "benchmark", "unfinished benchmark", "trigger", "model.json")


@pytest.fixture(scope="module", autouse=True)
def _keep(tiny_model: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One good file of each kind."""
    place = tmp_path_factory.mktemp("whole")
    policy = adi.Verified(adi.bare_exits(tiny_model, (2, 4)), adi.Threshold("top_probability", 0.0))
    told = adi.generate(tiny_model, "hello", policy, max_new_tokens=3, logprobs=2, stop_at_eos=False)
    adi.write_trace(adi.trace_of(told, policy, "hello"), place / "trace")
    shutil.copy(RESULT, place / "benchmark")
    (place / "prompts").write_text('{"prompt": "hello", "category": "a"}\n{"turns": ["a", "b"]}\n')
    (place / "trigger").write_text(json.dumps(adi.AllOf((adi.Threshold("margin", {2: 0.5}), adi.Never())).to_json()))
    history = History.open(place / "history", fingerprint="tokens", vocabulary=50)
    for ids in ((1, 2, 3, 4), (5, 6, 7), (1, 2, 3, 4)):
        history.learn(ids)
    save_checkpoint(place / "checkpoint", 3, *optimizer())
    shutil.copy(next(iter(SHIPPED.glob("*.safetensors"))), place / "shard")
    _KEPT.update(place=place, terms={"tokens": 3})
    attention = {"heads": 4, "kv_heads": 2, "key_width": 8, "value_width": 8, "scale": 0.5, "window": 0}
    stated = dict.fromkeys(("name", "family", "fingerprint", "precision", "readout"), "fp32")
    counts = {
        "layers": 1,
        "width": 32,
        "vocabulary": 64,
        "context": None,
        "stated_context": None,
        "has_mlp": True,
        "attentions": [attention],
        "holes": [1],
        "loop": None,
        "experts": False,
        "turns": None,
    }
    (place / "model.json").write_text(json.dumps({"format": FORMAT, **stated, **counts}))
    system = System("a", None, peak_bytes=5, outcomes={0: [Outcome((1, 2), 1.0, 0.5)]})  # type: ignore[arg-type]
    swept = Sweep(1, 2, 3.0, (SweepPoint(4, 5, 6.0, None),))
    ResumeFile(place / "unfinished benchmark", _KEPT["terms"]).save([system], {"a": swept})
    yield
    _KEPT.clear()


SHIPPED = Path(adi.__file__).parent / "data" / "exits" / "smollm2-135m"


def good(kind: str) -> Path:
    return _KEPT["place"] / {"unfinished benchmark": "unfinished benchmark.partial"}.get(kind, kind)


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "shard"])
def test_the_whole_files_are_read(kind: str) -> None:
    """Or the rest of this file would prove nothing."""
    assert LOADERS[kind](good(kind)) is not None


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "shard"])
@settings(max_examples=50)
@given(data=st.data())
def test_damaged_files(kind: str, data: st.DataObject) -> None:
    with workplace(good(kind)) as folder:
        content = good(kind).read_bytes()
        (folder / good(kind).name).write_bytes(data.draw(damaged(content[:20_000])) + content[20_000:])
        only_value_errors(lambda: LOADERS[kind](folder / good(kind).name))


@pytest.mark.parametrize("kind", JSONS)
@settings(max_examples=80)
@given(data=st.data())
def test_other_values_in_any_place(kind: str, data: st.DataObject) -> None:
    with workplace(good(kind)) as folder:
        value = data.draw(changed(json.loads(good(kind).read_text())))
        (folder / good(kind).name).write_text(json.dumps(value))
        only_value_errors(lambda: LOADERS[kind](folder / good(kind).name))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("text", ["", "[]", "{}", "null", nested(), nested('{"a":', "}"), "\x00\xff", "{" * 9])
def test_foreign_files(kind: str, text: str, tmp_path: Path) -> None:
    """Answers are what an interruption left, so of them the readable beginning counts: here nothing."""
    (tmp_path / good(kind).name).write_text(text)
    assert not only_value_errors(lambda: LOADERS[kind](tmp_path / good(kind).name))


@pytest.mark.parametrize("kind", [*JSONS, "prompts"])
def test_json_nested_almost_too_deeply(kind: str, tmp_path: Path) -> None:
    """So that the reader just takes it, and what handles the value meets the end of its stack."""
    text = good(kind).read_text()
    value = json.loads(text.partition("\n")[0] if kind == "prompts" else text)
    for depth in (200, 500, 800, 900, 940, 960, 980, 990, 2000):
        deep = "[" * depth + "]" * depth
        for key in value:
            text = json.dumps({**value, key: "@"})
            (tmp_path / good(kind).name).write_text(text.replace('"@"', deep) + "\n")
            only_value_errors(lambda: LOADERS[kind](tmp_path / good(kind).name))


@pytest.mark.parametrize("kind", [*JSONS, "prompts", "history"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    for make in (os.mkfifo, os.mkdir, endless):
        path = tmp_path / f"{make.__name__}.partial"
        make(path)
        with pytest.raises(ValueError, match=r"not a file|cannot (read|use)"):
            LOADERS[kind](path)


@pytest.mark.parametrize("kind", [*JSONS, "prompts", "history"])
def test_oversized_files_are_not_read(kind: str) -> None:
    with workplace(good(kind)) as folder:
        os.truncate(folder / good(kind).name, 5 << 30)  # a hole: takes no disk
        with pytest.raises(ValueError, match=r"MiB|bytes"):
            LOADERS[kind](folder / good(kind).name)


@pytest.mark.parametrize("kind", LOADERS)
def test_no_code_runs(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for content in bombs(marker, tmp_path / "bomb"):
        (tmp_path / good(kind).name).write_bytes(content)
        assert not only_value_errors(lambda: LOADERS[kind](tmp_path / good(kind).name))
    assert not marker.exists()


def test_a_model_folder_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a pickle in the place of weights, nor a program beside them that the configuration names; nobody is asked."""
    marker = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    tiny("llama").config.save_pretrained(tmp_path / "pickled")
    torch.save({"model.norm.weight": Bomb(marker)}, tmp_path / "pickled" / "pytorch_model.bin")
    shutil.copytree(tmp_path / "pickled", tmp_path / "program")
    (tmp_path / "program" / "pytorch_model.bin").unlink()
    tiny("llama").save_pretrained(tmp_path / "program")
    (tmp_path / "program" / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((tmp_path / "program" / "config.json").read_text())
    named = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.T", None]}
    (tmp_path / "program" / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": named}))
    for folder in ("pickled", "program"):
        with pytest.raises(ValueError, match="cannot load"):
            adi.load(str(tmp_path / folder), backend="hf")
    assert not marker.exists()


@settings(max_examples=10)
@given(content=st.one_of(st.binary(max_size=40), st.just(nested().encode())))
def test_a_damaged_cost_table_is_learned_anew(content: bytes) -> None:
    model = adi.load(tiny("llama")) if "model" not in _KEPT else _KEPT["model"]
    _KEPT["model"] = model
    with workplace() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADI_CACHE", str(folder))
        costs = cost_model_of(replace(model, notes={}))
        for _ in range(20):
            costs.passed(1, 0.5)
        costs.keep()
        (note,) = folder.rglob("*.json")
        note.write_bytes(content)
        assert cost_model_of(replace(model, notes={})).correction.unsure(1)


@settings(max_examples=40)
@given(data=st.data())
def test_a_hint_about_stops_is_never_an_error(data: st.DataObject) -> None:
    with workplace() as folder:
        value = data.draw(changed(json.loads((SHIPPED / "exits.json").read_text())))
        (folder / "exits.json").write_text(json.dumps(value))
        assert isinstance(likely_stops("any", "verified", str(folder), False), tuple)
    assert likely_stops("any", "verified", "a\x00" + "b" * 5000) == ()


@pytest.mark.parametrize(
    "command", [["plot"], ["run", "--exits"], ["run", "--trigger"], ["history"], ["tune", "--out", "o", "--prompts"]]
)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", nested().encode(), b'{"format": "adi-trace", "version": 1}'])
def test_the_command_line_says_so_in_a_sentence(
    command: list[str], content: bytes, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exits.json").write_bytes(content)
    (tmp_path / "file").write_bytes(content)
    model = {"run": ["--model", str(tiny_folder), "--backend", "hf"], "tune": [str(tiny_folder)]}.get(command[0], [])
    given_ = str(tmp_path if command[-1] == "--exits" else tmp_path / "file")
    done = CliRunner().invoke(app, [*command, given_, *model])
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "error:" in done.output.lower()
    assert "Traceback" not in done.output
