"""What people type: options are judged before anything is read or exported; messages, tools and templates come from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adi
from support import adi_

BARE = ["--exits", "bare:2,4"]
EARLY: dict[str, tuple[list[str], str]] = {
    "mode": (["run", "hi", "--mode", "fast"], "'fast' is not one of"),
    "mode of chat": (["chat", "--mode", "fast"], "'fast' is not one of"),
    "tokens": (["run", "hi", "-n", "-1"], "'--max-new-tokens' / '-n': got '-1'; input should be greater than or equal to 0."),
    "no number": (["run", "hi", "--top-k", "3.5"], "'--top-k': got '3.5'; input should be a valid integer"),
    "temperature": (["trace", "hi", "-t", "-1"], "temperature is -1.0; it must be a number 0 (greedy) or more"),
    "top-k": (["chat", "--top-k", "5"], "top_k=5 means nothing at temperature 0"),
    "stop": (["run", "hi", "--stop", ""], "--stop is ''; give a text"),
    "useless": (["run", "hi", "--mode", "full", "--exits", "x"], "--exits means nothing in full mode"),
    "exits": (["run", "hi", "--exits", "nothing"], "there are no exits 'nothing'"),
    "exits of chat": (["chat", "--exits", "nothing"], "there are no exits 'nothing'"),
    "depths": (["run", "hi", "--exits", "bare:a"], "whole numbers with commas, such as"),
    "trigger": (["run", "hi", *BARE, "--trigger", "{}"], "the trigger: object missing"),
    "risk": (["run", "hi", "--mode", "reflex", "--risk", "7"], "7 was never certified for these exits"),
    "risk of bare": (["run", "hi", *BARE, "--mode", "reflex", "--risk", "0.1"], "was never certified for these exits"),
    "history": (["run", "hi", "--history", "/proc/no/h.db"], "cannot write /proc/no/h.db"),
    "trace": (["run", "hi", "--trace", "/proc/no/t.json"], "cannot write /proc/no/t.json"),
    "messages": (["run", "--messages", "/none.json"], "cannot read the messages /none.json"),
    "two prompts": (
        ["run", "hi", "--messages", "/none.json"],
        "give a prompt, --messages or --ids, not both 'hi' and /none.json",
    ),
    "tools": (["run", "hi", "--tools", "/none.json"], "cannot read the tools /none.json"),
    "template": (["chat", "--chat-template", "/none.jinja"], "cannot read the chat template /none.jinja"),
    "template option": (["run", "hi", "--template-option", "x"], "--template-option is NAME=VALUE, such as"),
    "backend": (["run", "hi", "--backend", "cuda9"], "backend 'cuda9' is not known; choose one of auto, hf, openvino"),
    "precision": (["inspect", "--precision", "fp12"], "precision 'fp12' is not known; choose one of"),
    "inspect": (["inspect", "--limit", "0"], "'--limit': got '0'; input should be greater than or equal to 1."),
    "triggers": (["triggers", "--exits", "nothing"], "there are no exits 'nothing'"),
    "save": (["triggers", "--save", "/proc/no"], "cannot write /proc/no"),
    "bench": (["bench", "--exits", "nothing"], "there are no exits 'nothing'"),
    "bench backend": (["bench", "--backend", "cuda9"], "backend 'cuda9' is not known"),
    "bench precision": (
        ["bench", "--backend", "hf", "--precision", "int8"],
        "precision 'int8' is not known; choose",
    ),
    "bench risk": (["bench", "--modes", "reflex", "--risk", "0.5"], "0.5 was never certified"),
    "bench batch": (["bench", "--batch", "1,x", "--limit", "2"], "--batch is numbers of texts with commas"),
    "audit": (["audit", "--precision", "fp32,fp12"], "precision 'fp12' is not known"),
    "audit exits": (["audit", "--exits", "nothing"], "there are no exits 'nothing'"),
    "audit draws": (["audit", "--draws", "0"], "'--draws': got '0'"),
    "quality": (["quality", "--precision", "fp12"], "--precision 'fp12' is not known"),
    "calibrate": (["calibrate", "m", "--out", "x", "--risk", "2"], "a risk level is 2.0; it must be a number between 0 and 1"),
    "calibrate delta": (["calibrate", "m", "--out", "x", "--delta", "2"], "delta is 2.0; it must be a number between 0 and 1"),
    "calibrate bare": (["calibrate", "m", "--out", "x", "--exits", "bare"], "--exits bare: bare exits have no file"),
    "calibrate out": (["calibrate", "m", "--out", "/proc/no"], "cannot write /proc/no"),
    "tune": (["tune", "m", "--out", "x", "--epochs", "0"], "epochs is 0; it must be a whole number of at least 1"),
    "tune depths": (["tune", "m", "--out", "x", "--depths", "a"], "whole numbers with commas"),
    "tune keep": (["tune", "m", "--out", "x", "--keep", "nothing"], "there are no exits 'nothing'"),
    "tune text": (["tune", "m", "--out", "x", "--text", "/none.txt"], "cannot read the text /none.txt"),
    "tune talk": (["tune", "m", "--out", "x", "--talk-precision", "fp12"], "precision 'fp12' is not known"),
    "tune warm": (["tune", "m", "--out", "x", "--warm-start"], "warm_start is True; it needs exits that have a drafter"),
    "tune out": (["tune", "m", "--out", "/proc/no/x"], "cannot write /proc/no/x"),
    "tune judged": (
        ["tune", "m", "--out", "x", "--judge-only", "--keep", "smollm2-135m", "--text", "t"],
        "--text t means nothing with --judge-only",
    ),
    "tune own": (["tune", "m", "--out", "x", "--own-prompts", "0.5"], "--own-prompts 0.5 is for conversations"),
    "tune kept": (
        ["tune", "m", "--out", "x", "--keep", "smollm2-135m", "--drafter-epochs", "0"],
        "of kept exits only the drafter is trained",
    ),
    "tune nothing": (["tune", "m", "--out", "x", "--talk-precision", ","], "--talk-precision is empty"),
    "habituate": (
        ["habituate", "m", "--prompts", "workloads", "--out", "x", "--train-minutes", "5"],
        "--train-minutes 5 is for --train-model",
    ),
    "habituate nothing": (
        ["habituate", "m", "--prompts", "workloads", "--out", "x", "--precision", ","],
        "--precision is empty",
    ),
    "serve": (["serve", "m", "--replicas", "2"], "--replicas 2 is for a Ray cluster"),
    "fit": (["triggers", "--fit-limit", "3"], "--fit-limit 3 is for --fit-probe"),
    "logprobs": (["run", "hi", "--logprobs", "2"], "--logprobs 2 is for --json"),
    "calibrate crc": (
        ["calibrate", "m", "--out", "x", "--method", "crc", "--delta", "0.1"],
        "--delta 0.1 means nothing with --method crc",
    ),
    "plot": (["plot", "."], ". is a folder; give a trace"),
    "exposures": (["study", "exposure", "--out", "x", "--most-exposures", "100"], "it must be a power of 2"),
    "solve": (["solve", "products", "--time", "0"], "--time is 0; it must be a whole number of at least 1"),
}


# A22, and section 3
@pytest.mark.parametrize("name", list(EARLY))
def test_options_are_judged_before_anything_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> Any:
        pytest.fail("a model was asked for")

    for place in ("_load_openvino", "_load_path", "_wrap"):
        monkeypatch.setattr(f"adi.model.load.{place}", read)
    monkeypatch.setattr("adi.measure.bench.run._Bench", read)
    args, complaint = EARLY[name]
    done = adi_(*args)
    assert done.exit_code == 2, done.output
    assert complaint in " ".join(done.output.split())
    assert "Traceback" not in done.output


# A17, B3
def test_messages_come_from_a_file_or_standard_input(tiny_folder: Path, tiny_model: adi.Model, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "the fox"}]}, {"role": "assistant", "content": "dog"}]
    run = ["run", "--model", tiny_folder, "--mode", "full", "-n", 4, "--json", "--messages"]
    wanted = adi.generate(tiny_model, talk, adi.FullDepth(), max_new_tokens=4).text
    (tmp_path / "m.json").write_text(json.dumps({"model": "x", "messages": talk}))
    assert json.loads(adi_(*run, tmp_path / "m.json", "--trace", tmp_path / "t.json").stdout)["text"] == wanted
    assert json.loads(adi_(*run, "-", text=json.dumps(talk)).stdout)["text"] == wanted
    assert json.loads(adi.read_trace(tmp_path / "t.json").prompt) == talk


# A17
@pytest.mark.parametrize(
    ("text", "complaint"),
    [("[", "are not JSON"), ("[]", "must be a JSON list of objects"), ("[5]", "list of objects"), ('{"a": 1}', "are None")],
)
def test_a_file_of_no_messages_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(text)
    done = adi_("run", "--messages", tmp_path / "m.json")
    assert done.exit_code == 2
    assert complaint in done.stderr


# B4
def test_tools_and_template_options_reach_the_template(tiny_folder: Path, tiny_model: adi.Model, tmp_path: Path) -> None:
    template = (
        "{{ tools | tojson }}{{ messages[0].content }}{{ 'fox' if thinking is false else 'dog' }}{{ times * 2 }}{{ name }}"
    )
    (tmp_path / "c.jinja").write_text(template)
    (tmp_path / "t.json").write_text('[{"name": "x"}]')
    run = ["run", "hi", "--model", tiny_folder, "--mode", "full", "-n", 4, "--json", "--chat-template", tmp_path / "c.jinja"]
    options = ["--tools", tmp_path / "t.json", *(f"--template-option={o}" for o in ("thinking=False", "times=3", "name=Ann"))]
    done = adi_(*run, *options)
    assert done.exit_code == 0, done.output
    wanted = adi.generate(tiny_model, '[{"name": "x"}]hifox6Ann', adi.FullDepth(), raw=True, max_new_tokens=4)
    assert json.loads(done.stdout)["token_ids"] == list(wanted.token_ids)
    refused = adi_("run", "hi", "--model", tiny_folder, "--template-option", "enable_thinking=false")
    assert (refused.exit_code, "sets 'enable_thinking', which" in refused.stderr) == (2, True)
    chat = adi_("chat", "--model", tiny_folder, "-n", 2, "--chat-template", tmp_path / "c.jinja", *options, text="hi\n/bye\n")
    assert chat.exit_code == 0, chat.output


def test_a_text_for_a_model_that_reads_none_is_refused_before_it_is_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "cache"))
    refused = adi_("run", "hi", "--model", "products")
    assert (refused.exit_code, "products has no tokenizer" in refused.stderr) == (2, True)
    assert not (tmp_path / "cache").exists()
