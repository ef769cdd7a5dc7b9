"""Numbers of any library's kind are taken, and a value of a wrong type is named with what to give instead."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

import adi
from adi.arguments import real, whole
from adi.drafters.history import History
from adi.errors import AdiError, ModelError, UsageError
from adi.model.hub import gguf_file
from adi.risk.drift import DriftMonitor
from conftest import random_exits


# A22
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, torch.tensor])
def test_whole_numbers_of_every_library_are_numbers(tiny_model: adi.Model, kind: Any) -> None:
    wanted = adi.generate(tiny_model, "the fox", temperature=1, top_k=5, seed=3, max_new_tokens=4)
    got = adi.generate(tiny_model, "the fox", temperature=1, top_k=kind(5), seed=kind(3), max_new_tokens=kind(4))
    assert got.token_ids == wanted.token_ids
    assert got.sampling == wanted.sampling
    assert type(got.sampling["seed"]) is int
    exits = random_exits(tiny_model, (2, 4), adi.Threshold("entropy", 3.0))
    for policy in (
        adi.Verified(exits, draft_tokens=kind(3)),
        adi.Lookup(kind(4), kind(2)),
        adi.Static(exits, kind(2), kind(3)),
    ):
        assert adi.generate(tiny_model, "the fox", policy, max_new_tokens=kind(2), logprobs=kind(1)).token_ids
    assert adi.generate_batch(tiny_model, ["the fox"], most=kind(2), max_new_tokens=kind(2))
    assert adi.TuneOptions(tokens=kind(7), seed=kind(1)) == adi.TuneOptions(tokens=7, seed=1)
    assert adi.Always((kind(2),)) == adi.Always((2,))
    assert adi.Threshold("entropy", 1.0, min_depth=kind(2)).min_depth == 2


# A22
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_fractions_of_every_library_are_numbers(tiny_model: adi.Model, kind: Any) -> None:
    options = {"temperature": 0.5, "top_p": 0.75, "min_p": 0.125, "repetition_penalty": 1.25}
    assert adi.Sampling(**{name: kind(value) for name, value in options.items()}) == adi.Sampling(**options)
    exits = random_exits(tiny_model, (2, 4), adi.Threshold("entropy", 3.0))
    assert adi.Reflex(exits, thresholds=kind(0.5)).exit_trigger == adi.Threshold("entropy", 0.5)
    assert adi.TuneOptions(learning_rate=kind(0.5), own_prompts=kind(1)) == adi.TuneOptions(learning_rate=0.5, own_prompts=1.0)
    assert DriftMonitor(kind(0.25), kind(0.5)).level == 0.25
    assert type(adi.Sampling(temperature=kind(0.5)).temperature) is float


@pytest.mark.parametrize("value", [True, np.bool_(True), "3", None, 1.5, np.float32(3), -1, 9, np.array([3]), float("nan")])
def test_what_is_no_whole_number_of_the_range_is_named(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^rows is .*; it must be a whole number from 0 to 8\.$"):
        whole("rows", value, 0, 8)


@pytest.mark.parametrize("value", [True, np.bool_(True), "0.5", None, float("nan"), np.inf, 10**400, 2, 1j])
def test_what_is_no_number_of_the_range_is_named(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^share is .*; it must be a number from 0 to 1\.$"):
        real("share", value, "from 0 to 1", lambda s: 0 <= s <= 1)


# A22
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda _: adi.Verified("smollm2-135m"), r"exits is 'smollm2-135m', of type str; give adi.load_exits"),
        (lambda _: adi.Reflex("smollm2-135m", thresholds=0.3), "exits is 'smollm2-135m'"),
        (lambda _: adi.Static(Path("x")), "exits is of type PosixPath"),
        (
            lambda _: adi.Verified(history="past.db"),
            "history is 'past.db', of type str; give adi.drafters.history",
        ),
        (lambda m: adi.Verified(adi.bare_exits(m, (2,)), trigger="entropy"), "trigger is 'entropy'; give a rule such as"),
        (lambda m: adi.Verified(adi.bare_exits(m, (2,)), trigger=adi.Never), "trigger is <class .*; give a rule such as"),
        (lambda m: adi.generate(m, "hi", "full"), r"policy is 'full', of type str; give FullDepth\(\)"),
        (lambda m: adi.generate(m, "hi", adi.FullDepth), r"policy is <class .*, of type type; give FullDepth\(\)"),
        (lambda _: adi.generate("smollm2-135m", "hi"), "model is 'smollm2-135m', of type str; give what adi.load gives"),
        (lambda m: adi.generate(m, "hi", stop=5), r"stop strings are texts of at least one character, got \[5\]"),
        (lambda m: adi.generate(m, "hi", stop_token_ids="a"), "a token of stop_token_ids is 'a'; it must be a whole number"),
        (lambda m: adi.bare_exits(m, (2.5,)), "2.5"),
        (lambda m: adi.bare_exits("smollm2-135m"), "model is 'smollm2-135m'"),
        (lambda m: adi.load(threads=0), "threads is 0"),
        (lambda m: adi.load(precision=None), "precision None is not known"),
        (lambda m: adi.load(backend=["hf"]), r"backend \['hf'\] is not known; choose one of auto, hf, openvino"),
        (lambda m: adi.load(tokenizer={}), r"tokenizer is \{\}, of type dict; give a transformers tokenizer"),
        (lambda m: adi.load(tokenizer="nowhere"), "'nowhere' is not known"),
        (lambda m: adi.audit("nowhere", precisions=["fp32", "fp12"]), "precision 'fp12' is not known"),
        (lambda m: adi.audit("nowhere", precisions="fp32"), "precisions is 'fp32'; give a list"),
        (lambda m: adi.audit("nowhere", exits="none"), "there are no exits 'none'"),
        (lambda m: adi.audit("nowhere", draws="3"), "draws is '3'"),
    ],
)
def test_a_wrong_type_is_named_with_what_to_give(tiny_model: adi.Model, make: Any, complaint: str) -> None:
    with pytest.raises(AdiError, match=complaint):
        make(tiny_model)


# A22
def test_a_tokenizer_may_be_a_folder_a_file_or_one_of_the_tokenizers_library(
    tiny_hf: Any, tiny_tokenizer: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    wanted = adi.load(tiny_hf, tokenizer=tiny_tokenizer)
    for given in (tmp_path, str(tmp_path), tiny_folder, SimpleNamespace(tokenizer=tiny_tokenizer), wanted.tokenizer):
        assert adi.load(tiny_hf, tokenizer=given).encode("the fox") == wanted.encode("the fox")
    raw = wanted.encode("the fox", raw=True)
    for given in (tmp_path / "tokenizer.json", tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))):
        model = adi.load(tiny_hf, tokenizer=given)
        assert adi.generate(model, "the fox", raw=True, max_new_tokens=2).prompt_ids == raw
        with pytest.raises(ModelError, match="no chat template"):
            model.encode("the fox")


# A22
def test_a_gguf_file_may_shout(tmp_path: Path) -> None:
    (tmp_path / "X.GGUF").write_bytes(b"GGUF")
    assert gguf_file(str(tmp_path / "X.GGUF")) is not None
    with pytest.raises(ModelError, match=r"cannot read the GGUF file .*if it is cut off, fetch it again"):
        adi.load(str(tmp_path / "X.GGUF"), backend="hf")
    with pytest.raises(ModelError, match=r"no file or folder none\.GGUF"):
        adi.load("none.GGUF", backend="hf")


# A22
def test_a_precision_without_its_engine_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adi.model.load._load_path", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UsageError, match="precision 'int8' needs the openvino engine, which"):
        adi.load("x/y", precision="int8", device="cuda")


# A22
def test_no_stop_string_is_none_and_a_history_counts_in_any_library(tiny_model: adi.Model, tmp_path: Path) -> None:
    assert adi.generate(tiny_model, "the fox", stop=None, max_new_tokens=2).token_ids
    history = History.open(tmp_path / "h.db", fingerprint="f", vocabulary=300)
    history.learn(np.arange(9))
    history.prune(np.int64(0))
    with pytest.raises(UsageError, match="keep_tokens is -1"):
        history.prune(-1)


# A19
@pytest.mark.parametrize("failure", ["`tiktoken` is required to read a `tiktoken` file.", "Error parsing line b'\\x0e' in x"])
def test_a_tokenizer_of_sentencepiece_alone_names_its_extra(
    tiny_folder: Path, tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, found=find_spec: None if name == "sentencepiece" else found(name)
    )

    def unread(*_: Any, **__: Any) -> Any:
        raise ValueError(failure)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unread)
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for backend in ("hf", "openvino"):
        with pytest.raises(ModelError, match=r"needs an extra: pip install 'adi-lm\[sentencepiece\]'"):
            adi.load(tmp_path / "m", backend=backend)


# A19
def test_a_tokenizer_of_sentencepiece_alone_is_read_on_every_engine(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    pytest.importorskip("google.protobuf")
    shutil.copytree(tiny_folder, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*", "chat*", "special*"))
    with (tmp_path / "m" / "tokenizer.model").open("wb") as file:
        texts = iter(["the quick brown fox jumps over the lazy dog"] * 9)
        trainer.train(sentence_iterator=texts, model_writer=file, vocab_size=60, model_type="bpe", hard_vocab_limit=False)
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    models = [adi.load(tmp_path / "m", backend=backend, precision="fp32") for backend in ("hf", "openvino")]
    answers = {adi.generate(model, "the fox", raw=True, max_new_tokens=4).token_ids for model in models}
    assert len(answers) == 1
    assert models[0].tokenizer.decode(models[0].encode("the fox", raw=True)) == "the fox"
