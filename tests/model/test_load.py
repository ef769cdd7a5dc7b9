"""Loading: two threads at once, errors that are nobody's but ours, and what is said where an engine cannot be had."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import adi
from adi.errors import UsageError
from adi.model.hub import Shared, quiet_transformers
from adi.model.tokenizer import Tokenizer
from families import KV, C, tiny

openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")


def test_threads_that_read_special_tokens_differently_do_not_disturb_each_other(tiny_tokenizer: Any) -> None:
    tokenizer, rounds = Tokenizer(tiny_tokenizer), 300
    text = "the <|end|> fox " * 20
    wanted = {special: tokenizer.encode(text, special_tokens=special) for special in (False, True)}
    assert wanted[False] != wanted[True]

    def encode(special: bool) -> bool:
        return all(tokenizer.encode(text, special_tokens=special) == wanted[special] for _ in range(rounds))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(encode, [False, True, False, True]))


def test_quiet_is_put_back_by_the_last_thread_to_leave() -> None:
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    first, second = quiet_transformers(), quiet_transformers()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert hf_logging.get_verbosity() > before, "the second is still inside"
    second.__exit__()
    assert hf_logging.get_verbosity() == before


def test_a_shared_state_that_cannot_be_set_up_is_free_again() -> None:
    def broken() -> Any:
        raise OSError("no")

    shared = Shared(broken)
    for _ in range(2):
        with pytest.raises(OSError, match="no"), shared:
            pass


@openvino
def test_two_threads_may_load_with_an_empty_cache(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    stop = threading.Event()

    def load(precision: str) -> adi.Model:
        return adi.load(str(tiny_folder), backend="openvino", precision=precision)

    def talk() -> int:
        lines = 0
        while not stop.wait(0.01):
            print("from another thread")
            lines += 1
        return lines

    with ThreadPoolExecutor(4) as threads:
        talking = threads.submit(talk)
        models = list(threads.map(load, ["int8", "int8", "fp32"]))
        stop.set()
        lines = talking.result()
    assert capsys.readouterr().out == "from another thread\n" * lines, "an export prints nothing and swallows nothing"
    texts = {adi.generate(model, [5, 6, 7], adi.FullDepth(), max_new_tokens=8).token_ids for model in models[:2]}
    assert len(texts) == 1


def test_many_threads_that_read_a_model_leave_the_reader_as_it_was(tmp_path: Path) -> None:
    """transformers switches functions of the whole process while it reads, such as the one that ties weights."""
    tiny("gemma2").save_pretrained(tmp_path / "model")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: adi.load(str(tmp_path / "model"), backend="hf"), range(24)))
    assert adi.load(str(tmp_path / "model"), backend="hf").backbone.spec.backend == "hf", "its head is tied to its embedding"


@openvino
def test_a_bug_in_the_exporter_is_not_a_model_that_cannot_be_exported(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("a bug of ours")

    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    monkeypatch.setattr("adi.model.openvino.export.pipeline._graphs", broken)
    for backend in ("openvino", "auto"):
        with pytest.raises(TypeError, match="a bug of ours"):
            adi.load(str(tiny_folder), backend=backend)


@openvino
def test_full_memory_is_not_a_model_that_cannot_be_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    monkeypatch.setattr("adi.model.openvino.export.pipeline._check", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        adi.load(str(tiny_folder), backend="auto")
    monkeypatch.setattr("transformers.LlamaForCausalLM.to", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        adi.load(str(tiny_folder), backend="hf")


@openvino
def test_a_slower_engine_is_a_warning_or_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "cache"))
    tiny("gemma2").save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="Running on transformers' modules, more slowly: Gemma2ForCausalLM cannot be exported"):
        assert adi.load(str(tmp_path / "model")).backbone.spec.backend == "hf"
    notices: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adi.load(str(tmp_path / "model"), notice=notices.append)
    assert any("more slowly" in notice for notice in notices)


@openvino
def test_an_engine_that_runs_shorter_texts_alone_says_so_and_names_the_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "cache"))
    settings = {**C, **KV, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = t.Llama4TextConfig(**settings, pad_token_id=0, max_position_embeddings=256, attention_chunk_size=32)
    t.Llama4ForCausalLM(config).save_pretrained(tmp_path / "model")
    notices: list[str] = []
    model = adi.load(tmp_path / "model", precision="fp32", backend="openvino", notice=notices.append)
    assert any("texts of up to 32 tokens; backend='hf' runs its 256" in notice for notice in notices)
    ids = [*range(3, 23)]
    for prompt, new in ((ids, 13), (ids, 40), (ids * 2, 1)):
        with pytest.raises(UsageError, match=r"or take backend='hf' \(--backend hf\), which runs 256\.$"):
            adi.generate(model, prompt, max_new_tokens=new)
    notices.clear()
    whole = adi.load(tmp_path / "model", precision="fp32", backend="hf", notice=notices.append)
    assert not any("texts of up to" in notice for notice in notices)
    kept = adi.generate(model, ids, max_new_tokens=12, stop_at_eos=False).token_ids
    assert adi.generate(whole, ids, max_new_tokens=40, stop_at_eos=False).token_ids[:12] == kept
