"""lm-evaluation-harness: the class ``adi`` and the server behind ``local-completions`` give what its own ``hf`` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import adi
from adi.errors import UsageError
from adi.lm_eval import AdiLM

PAIRS = [("the quick brown", " fox jumps"), ("", "the dog"), ("12 plus 30", " is 42"), ("é 日本", " é")]
PROMPTS = ["the quick brown fox", "over the lazy dog and"]


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> Any:
    return HFLM(pretrained=str(tiny_folder), device="cpu", dtype="float32", batch_size=1, max_length=256)


@pytest.fixture(scope="module")
def ours(tiny_model: adi.Model) -> Any:
    return AdiLM(tiny_model, mode="lookup", max_length=256)


def same(ours: list[Any], theirs: list[Any]) -> None:
    assert [log for log, _ in ours] == pytest.approx([log for log, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_log_likelihoods(ours: Any, theirs: Any) -> None:
    asked = instances("loglikelihood", PAIRS)
    same(ours.loglikelihood(asked), theirs.loglikelihood(asked))
    rolling = instances("loglikelihood_rolling", [("the quick brown fox jumps over the lazy dog " * 30,)])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=0.05)


def test_texts(ours: Any, theirs: Any) -> None:
    asked = instances("generate_until", [(p, {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}) for p in PROMPTS])
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    odd = {"until": [], "do_sample": True, "temperature": 1.0, "typical_p": 0.5}
    with pytest.raises(UsageError, match="typical_p"):
        ours.generate_until(instances("generate_until", [("x", odd)]))


def test_the_server_behind_local_completions(tiny_model: adi.Model, tiny_folder: Path, theirs: Any) -> None:
    pytest.importorskip("fastapi")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from serving import serving

    with serving(tiny_model, adi.Lookup()) as running:
        client = LocalCompletionsAPI(
            base_url=f"{running.url}/v1/completions", model="tiny", tokenizer=str(tiny_folder), tokenizer_backend="huggingface",
            batch_size=2, max_length=256, num_concurrent=1, max_retries=1,
        )  # fmt: skip
        asked = instances("loglikelihood", [pair for pair in PAIRS if pair[0]])
        same(client.loglikelihood(asked), theirs.loglikelihood(asked))
        texts = instances("generate_until", [(p, {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}) for p in PROMPTS])
        assert client.generate_until(texts) == theirs.generate_until(texts)
