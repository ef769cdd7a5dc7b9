"""The command line on a tiny model, in the process and through its real front door."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import adi
from adi.decoding.session import Session
from support import adi_

ALWAYS = ["--exits", "bare:2,4", "--threshold", "0.0"]
DOCUMENT = {
    *("text", "token_ids", "mode", "model", "backend", "precision", "tokens", "rounds", "drafted", "accepted"),
    *("mean_depth", "depth_histogram", "block_rows", "seconds", "tokens_per_second"),
}


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder)]


def test_run_prints_the_text_and_the_closing_lines(model: list[str], tiny_model: adi.Model) -> None:
    done = adi_("run", "hello dog", *model, *ALWAYS, "-n", 12, "--compare")
    assert done.exit_code == 0, done.output
    full = adi.generate(tiny_model, "hello dog", adi.FullDepth(), max_new_tokens=12)
    assert done.stdout.startswith(full.text)
    for part in (
        "identical: yes",
        "drafts accepted",
        "mean depth",
        "block-rows",
        "tokens/s against full depth",
        "tokens by depth",
    ):
        assert part in done.stdout.replace("\n", " ")


def test_json_is_one_document(model: list[str], tiny_model: adi.Model) -> None:
    done = adi_("run", "hello dog", *model, *ALWAYS, "-n", 12, "--compare", "--json")
    document = json.loads(done.stdout)
    assert set(document) >= DOCUMENT | {"full", "identical", "speedup"}
    assert set(document["full"]) >= DOCUMENT
    full = adi.generate(tiny_model, "hello dog", adi.FullDepth(), max_new_tokens=12)
    assert document["identical"] is True
    assert document["row_invariant"] is adi.load(model[1]).backbone.spec.row_invariant
    assert document["token_ids"] == document["full"]["token_ids"] == list(full.token_ids)
    assert document["speedup"] == pytest.approx(document["tokens_per_second"] / document["full"]["tokens_per_second"], rel=1e-6)
    assert sum(document["depth_histogram"].values()) == document["tokens"] == len(document["token_ids"])


def test_run_and_chat_draw(model: list[str], tiny_model: adi.Model) -> None:
    hot = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01", "--repetition-penalty", "1.2"]
    done = adi_("run", "hello dog", *model, *ALWAYS, "-n", 12, "--backend", "hf", "--compare", "--json", *hot, "--seed", 7)
    document = json.loads(done.stdout)
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}
    assert document["sampling"] == options
    assert document["token_ids"] == list(
        adi.generate(tiny_model, "hello dog", adi.FullDepth(), max_new_tokens=12, **options).token_ids
    )
    assert document["identical"] is True, "full depth draws the same from the same seed"
    unseeded = adi_("run", "hello dog", *model, *ALWAYS, "-n", 6, "-t", "1.5", "--compare")
    seed = int(unseeded.stdout.split("--seed ")[1].split()[0])
    again = adi_("run", "hello dog", *model, *ALWAYS, "-n", 6, "-t", "1.5", "--seed", seed)
    assert "identical: yes" in unseeded.stdout
    assert again.stdout.splitlines()[0] == unseeded.stdout.splitlines()[0]
    refused = adi_("run", "hello dog", *model, "--top-k", 5)
    assert (refused.exit_code, "top_k=5 means nothing at temperature 0" in refused.stderr) == (2, True)
    talks = [adi_("chat", *model, *ALWAYS, "-n", 5, "-t", "2", "--seed", 3, text="hello\n/bye\n") for _ in range(2)]
    assert talks[0].exit_code == 0, talks[0].output
    assert talks[0].stdout == talks[1].stdout


def test_run_reads_standard_input(model: list[str], tiny_model: adi.Model) -> None:
    document = json.loads(adi_("run", "-", *model, "--mode", "full", "-n", 4, "--json", text="the fox").stdout)
    assert document["text"] == adi.generate(tiny_model, "the fox", adi.FullDepth(), max_new_tokens=4).text


def test_reflex_says_that_it_is_uncalibrated(model: list[str]) -> None:
    done = adi_("run", "hello", *model, *ALWAYS, "--mode", "reflex", "-n", 6)
    assert "uncalibrated" in done.stdout
    assert (
        json.loads(adi_("run", "hello", *model, *ALWAYS, "--mode", "reflex", "-n", 6, "--json").stdout)["calibrated"] is False
    )


@pytest.mark.parametrize(
    ("found", "mode", "notes"),
    [(False, "verified", 1), (False, "lookup", 1), (False, "full", 0), (True, "verified", 0), (None, "verified", 0)],
)
def test_rows_that_vary_are_reported(
    found: bool | None, mode: str, notes: int, tiny_hf: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    varying: Any = adi.load(tiny_hf, tokenizer=tiny_tokenizer)
    varying.backbone.spec = replace(varying.backbone.spec, row_invariant=found)
    monkeypatch.setattr("adi.cli.shared.options.EngineOptions.load", lambda *_: varying)
    drafting = ALWAYS if mode == "verified" else []
    for more in ([], ["--compare"], ["--json"]):
        done = adi_("run", "hello dog", "--mode", mode, *drafting, "-n", 4, *more)
        assert done.exit_code == 0, done.output
        assert done.stderr.count("except where two tokens are as good as tied") == notes
        assert "tied" not in done.stdout


def test_a_trace_becomes_a_page(model: list[str], tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    assert adi_("run", "hello", *model, *ALWAYS, "-n", 6, "--trace", trace).exit_code == 0
    assert adi.read_trace(trace).steps[0].looks
    assert adi_("trace", "hello", "--out", tmp_path / "u.json", *model, *ALWAYS, "-n", 6).exit_code == 0
    assert adi_("plot", trace).exit_code == 0
    assert "<html" in (tmp_path / "t.html").read_text()
    assert adi_("plot", trace, "--out", trace).exit_code == 2


def test_chat_keeps_the_conversation(model: list[str], tiny_model: adi.Model) -> None:
    done = adi_("chat", *model, *ALWAYS, "-n", 5, text="hello\n/depth\nand the fox\n/reset\n/what\n/bye\n")
    assert done.exit_code == 0, done.output
    first = adi.generate(tiny_model, "hello", adi.FullDepth(), max_new_tokens=5).text
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    second = adi.generate(
        tiny_model, [*talk, {"role": "user", "content": "and the fox"}], adi.FullDepth(), max_new_tokens=5
    ).text
    assert first in done.stdout
    assert second in done.stdout
    assert "unknown command /what" in done.stdout


def test_an_interruption_ends_the_answer_and_not_the_conversation(
    model: list[str], tiny_model: adi.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Session._forward, []

    def interrupted(self: Session, request: Any) -> Any:
        calls.append(request)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, request)

    monkeypatch.setattr(Session, "_forward", interrupted)
    done = adi_("chat", *model, "--mode", "full", "-n", 6, text="hello\n/depth\nand the fox\n/bye\n")
    assert done.exit_code == 0, done.output
    assert "3 tokens in 3 rounds" in done.stdout, "what had come before the interruption is kept"
    monkeypatch.undo()
    kept = "".join(step.text for step in list(adi.stream(tiny_model, "hello", adi.FullDepth(), max_new_tokens=6))[:3])
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": kept}]
    second = adi.generate(
        tiny_model, [*talk, {"role": "user", "content": "and the fox"}], adi.FullDepth(), max_new_tokens=6
    ).text
    assert second in done.stdout


def test_inspect_prints_tables(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = ["--prompts", tmp_path / "p.jsonl"]
    prompts[1].write_text("\n".join(json.dumps({"prompt": f"the fox number {i}"}) for i in range(6)))
    done = adi_("inspect", tiny_folder, *prompts, "--limit", 2, "-n", 6)
    assert done.exit_code == 0, done.output
    assert "Speed-up ceiling" in done.stdout
    found = json.loads(adi_("inspect", tiny_folder, *prompts, "--limit", 1, "-n", 4, "--json").stdout)
    assert found["spec"]["layers"] == 6


def test_tune_makes_exits_that_run(tiny_folder: Path, model: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"the fox number {i}"}) for i in range(60)))
    out = tmp_path / "exits"
    options = ["--tokens", 400, "--max-new-tokens", 12, "--epochs", 1, "--rank", 4, "--shortlist", 50, "--depths", "2,4"]
    done = adi_("tune", tiny_folder, "--out", out, "--prompts", prompts, *options)
    assert done.exit_code == 0, done.output
    assert adi.load_exits(out).depths == (2, 4)
    assert (out / "work" / "log.txt").read_text()
    assert json.loads(adi_("run", "hello", *model, "--exits", out, "-n", 8, "--compare", "--json").stdout)["identical"]


ERRORS: dict[str, tuple[list[str], str]] = {
    "unknown model": (["run", "hi", "--model", "gpt-17"], "'gpt-17' is not known; choose 'smollm2-135m'"),
    "missing folder": (["run", "hi", "--model", "./nowhere"], "no file or folder ./nowhere"),
    "unknown mode": (["run", "hi", "--model", "{model}", "--mode", "fast"], "'fast' is not one of"),
    "no exits": (["run", "hi", "--model", "{model}", "--draft-tokens", "3"], "adi tune"),
    "unknown exits": (["run", "hi", "--model", "{model}", "--exits", "nothing"], "there are no exits 'nothing'"),
    "foreign exits": (["run", "hi", "--model", "{model}", "--exits", "smollm2-135m"], "belong to smollm2-135m"),
    "useless options": (
        ["run", "hi", "--model", "{model}", "--mode", "full", "--exits", "x"],
        "--exits means nothing in full mode",
    ),
    "unwritable": (["run", "hi", "--model", "{model}", "--mode", "full", "--trace", "/proc/no/t.json"], "cannot write"),
    "unwritable out": (["tune", "{model}", "--out", "/proc/no/x"], "No such file"),
    "odd depths": (["run", "hi", "--model", "{model}", "--exits", "bare:a"], "whole numbers with commas"),
    "too deep": (["run", "hi", "--model", "{model}", "--exits", "bare:6"], "choose among 1, 2, 3, 4, 5"),
    "no threshold": (["run", "hi", "--model", "{model}", "--exits", "bare", "--mode", "reflex"], "--threshold"),
    "both": (["run", "hi", "--model", "{model}", "--exits", "bare", "--threshold", "1", "--trigger", "{{}}"], "not both"),
    "two rules": (
        ["run", "hi", "--model", "{model}", "--exits", "bare", "--mode", "reflex", "--threshold", "1", "--risk", "0.1"],
        "Give one of them",
    ),
    "risk in full": (
        ["run", "hi", "--model", "{model}", "--mode", "full", "--risk", "0.1"],
        "--risk means nothing in full mode",
    ),
    "never certified": (
        ["run", "hi", "--model", "{model}", "--exits", "bare", "--mode", "reflex", "--risk", "0.1"],
        "was never certified for these exits",
    ),
    "bare to certify": (["calibrate", "{model}", "--exits", "bare", "--out", "{model}/x"], "bare exits have no file"),
    "bad trigger": (
        ["run", "hi", "--model", "{model}", "--exits", "bare", "--trigger", "{{}}"],
        "the trigger: object missing",
    ),
    "no tokens": (["run", "hi", "--model", "{model}", "--mode", "full", "-n", "-1"], "Invalid value for '--max-new-tokens'"),
    "context": (["run", "hi", "--model", "{model}", "--mode", "full", "-n", "600"], "context is 512 tokens"),
    "precision": (["run", "hi", "--model", "{model}", "--precision", "fp12"], "choose one of auto, fp32"),
    "device": (["run", "hi", "--model", "{model}", "--mode", "full", "--device", "abacus"], "device 'abacus' cannot be used"),
    "backend": (["run", "hi", "--model", "{model}", "--backend", "cuda9"], "choose one of auto, hf, openvino"),
    "empty prompt": (["run", "", "--model", "{model}", "--mode", "full", "--raw"], "the prompt is empty"),
    "no trace": (["plot", "{model}/none.json"], "cannot read the trace"),
    "no prompts": (["tune", "{model}", "--out", "{model}/x", "--prompts", "none.jsonl"], "cannot read the prompts"),
    "out is a file": (["tune", "{model}", "--out", "{model}/config.json"], "is a file"),
    "limit": (["inspect", "{model}", "--limit", "0"], "Invalid value for '--limit'"),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_mistakes_get_a_sentence_and_exit_code_2(name: str, tiny_folder: Path) -> None:
    args, complaint = ERRORS[name]
    done = adi_(*(a.format(model=tiny_folder) for a in args))
    assert done.exit_code == 2, done.output
    assert complaint in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_damaged_models_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00junk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    for file in tiny_folder.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 200 if file.suffix == ".safetensors" else None])
    for name, complaint in (("junk.gguf", "cannot read the GGUF file"), ("empty", "no config.json"), ("cut", "cannot load")):
        done = adi_("run", "hi", "--model", tmp_path / name, "--mode", "full")
        assert done.exit_code == 2, done.output
        assert complaint in " ".join(done.output.split())


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.3." not in name}
    save_file(kept, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    done = adi_("run", "hi", "--model", tmp_path / "m", "--mode", "full")
    assert done.exit_code == 2
    assert "lacks 9 weights, among them model.layers.3." in " ".join(done.output.split())


def test_a_damaged_tokenizer_is_refused_and_a_missing_one_is_not(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    assert adi_("run", "hi", "--model", tmp_path / "m", "--mode", "full").exit_code == 2
    for file in (tmp_path / "m").glob("*token*"):
        file.unlink()
    assert adi.load(tmp_path / "m").tokenizer is None


def test_interruption_is_exit_code_130(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adi.decoding.session.Session._forward", interrupt)
    done = adi_("run", "hi", *model, "--mode", "full")
    assert done.exit_code == 130
    assert "stopped" in done.output


def test_every_precision_has_the_same_exits(tiny_folder: Path, tmp_path: Path) -> None:
    exits = adi.bare_exits(adi.load(tiny_folder), (2,))
    for precision in ("bf16", "fp16", "fp32"):
        model = adi.load(tiny_folder, precision=precision)
        assert model.backbone.spec.precision == precision
        exits.check(model.backbone)


def test_the_real_front_door(tiny_folder: Path) -> None:
    run = [sys.executable, "-m", "adi"]
    for args, code, words in (
        (["run", "hi", "--frob"], 2, "No such option: --frob"),
        (["frob"], 2, "No such command"),
        (["run", "hi", "--model", "nope"], 2, "error: model 'nope' is not known"),
        (["--version"], 0, f"adi {adi.__version__}"),
    ):
        done = subprocess.run([*run, *args], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
