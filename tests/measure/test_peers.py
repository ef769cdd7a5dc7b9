"""The tools beside adi, where they are installed: the same tokens on a tiny model, or the reason why not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adi.errors import AdiError
from adi.measure.bench import peers
from adi.measure.bench.outcomes import Setting, Task
from adi.measure.bench.peers import LLAMA_DRAFT_TOKENS, PEERS, build_peer
from adi.measure.bench.systems import adi_runner
from adi.measure.bench.worker import failure

PROMPT = (5, 6, 7, 8, 9, 6, 7)


def needs(*modules: str) -> Any:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@pytest.fixture
def setting(tiny_folder: Path) -> Setting:
    return Setting(str(tiny_folder), None, None, 1, 0, context=256)


@pytest.fixture
def truth(setting: Setting) -> tuple[int, ...]:
    return adi_runner("full", "fp32", setting).run(Task(PROMPT, 12, frozenset())).token_ids


HF = ["hf:fp32", "hf-lookup:fp32", "hf-early-exit:fp32"]


@pytest.mark.parametrize("name", [*HF, pytest.param("economize", marks=needs("economize"))])
def test_torch_peers_say_what_full_depth_says(name: str, setting: Setting, truth: tuple[int, ...]) -> None:
    peer = build_peer(name, setting)
    got = peer.run(Task(PROMPT, 12, frozenset()))
    assert got.token_ids == truth
    assert 0 < got.ttft_seconds < got.seconds
    end = truth[5]
    ended = peer.run(Task(PROMPT, 12, frozenset({end})))
    assert ended.token_ids == truth[: truth.index(end) + 1], "the token that ends it is part of it, as everywhere"
    assert peer.details["about"]


@needs("openvino_genai", "openvino_tokenizers", "nncf")
@pytest.mark.parametrize("lookup", [False, True])
def test_genai_runs_an_exported_graph(
    lookup: bool, setting: Setting, truth: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    peer = peers.genai_peer("fp32", lookup, setting)
    got = peer.run(Task(PROMPT, 12, frozenset()))
    assert got.token_ids[:4] == truth[:4], "its own number formats, so not more than the beginning is asked"
    assert len(got.token_ids) == 12
    assert 0 < got.ttft_seconds < got.seconds
    end = got.token_ids[3]
    ended = peer.run(Task(PROMPT, 12, frozenset({end})))
    assert ended.token_ids == got.token_ids[: got.token_ids.index(end) + 1]
    (made,) = (tmp_path / "openvino-genai").iterdir()
    before = made.stat().st_mtime_ns
    peers.genai_peer("fp32", lookup, setting)
    assert made.stat().st_mtime_ns == before, "it is made once"


def test_files_that_are_no_gguf_are_refused_by_those_that_need_one(setting: Setting) -> None:
    with pytest.raises(ValueError, match=r"needs a \.gguf file"):
        peers.gguf_path(setting)


class FakeLlama:
    """Counts what it is asked; goes on with 1, 2, 3, ... after any prompt."""

    made: list[dict[str, Any]]

    def __init__(self, path: str, **options: Any) -> None:
        FakeLlama.made.append({"path": path, **options})
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def generate(self, tokens: list[int], **options: Any) -> Iterator[int]:
        assert options == {"temp": 0.0, "repeat_penalty": 1.0}, "greedy"
        yield from range(1, 100)


@pytest.mark.parametrize("lookup", [False, True])
def test_llama_is_asked_for_what_is_needed_and_no_more(
    lookup: bool, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, speculative = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_speculative")
    fake.Llama = FakeLlama  # type: ignore[attr-defined]
    speculative.LlamaPromptLookupDecoding = lambda num_pred_tokens: num_pred_tokens  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    monkeypatch.setattr(peers, "gguf_path", lambda _: tmp_path / "m.gguf")
    FakeLlama.made = []
    peer = peers.llama_peer(lookup, setting)
    (options,) = FakeLlama.made
    assert (options["n_threads"], options["n_threads_batch"], options["logits_all"]) == (1, 1, lookup)
    assert options["n_ctx"] >= setting.context
    assert options["draft_model"] == (LLAMA_DRAFT_TOKENS if lookup else None)
    assert peer.run(Task(PROMPT, 4, frozenset())).token_ids == (1, 2, 3, 4)
    assert peer.run(Task(PROMPT, 9, frozenset({3}))).token_ids == (1, 2, 3)


def test_errors_are_one_line_that_says_what_to_do() -> None:
    assert failure(ModuleNotFoundError("No", name="llama_cpp")) == "llama_cpp is not installed (pip install 'adi-lm[peers]')"
    assert failure(AdiError("needs\n it")) == "needs it"
    assert failure(RuntimeError("x")) == "RuntimeError: x"
    with pytest.raises(ValueError, match=r"'abacus' is not known; there are llama\.cpp"):
        build_peer("abacus", Setting("m", None, None, 1, 0))
    assert len(PEERS) == 15
