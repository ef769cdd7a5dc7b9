"""A policy is one class: a new one decodes everywhere; and the one that decodes by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

import adi
import adi.errors
from adi.decoding.policies import default_policy
from adi.decoding.requests import DraftToken, Request
from adi.decoding.speculate import Proposal, Proposing, Strategy
from conftest import exits_with_drafter

PROMPTS = [[1, 2, 3], [5], [7, 7, 7, 7]]


@dataclass
class Same:
    """Drafts the last token again."""

    accepted: int = 0

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        return Proposal(len(text) - 1, [DraftToken(text[-1], 0, level="memory")] * most)
        yield  # a generator all the same

    def on_verified(self, accepted: int) -> None:
        self.accepted += accepted


@dataclass(frozen=True)
class Echo(adi.Policy):
    """All that a policy needs."""

    drafts: int = 2
    mode: ClassVar[str] = "echo"

    def strategy(self, request: Request, model: adi.Model) -> Strategy:
        return Strategy(Same(), self.drafts)


def test_a_new_policy_is_one_class(llama: adi.Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "stop_at_eos": False}
    full = [adi.generate(llama, prompt, adi.FullDepth(), **options).token_ids for prompt in PROMPTS]
    for prompt, wanted in zip(PROMPTS, full, strict=True):
        text = adi.generate(llama, prompt, Echo(), logprobs=2, **options)
        assert text.token_ids == wanted
        assert (text.mode, text.summary().mode, text.summary().calibrated) == ("echo", "echo", True)
        assert text.counters.drafted > 0
        assert tuple(step.token for step in adi.stream(llama, prompt, Echo(5), **options)) == wanted
        trace = adi.trace_of(text, Echo(), "")
        assert (trace.mode, trace.depths, trace.trigger) == ("echo", (), None)
    assert [text.token_ids for text in adi.generate_batch(llama, PROMPTS, Echo(), **options)] == full
    sampled: dict[str, Any] = {**options, "temperature": 1.0, "seed": 4}
    assert (
        adi.generate(llama, [5], Echo(), **sampled).token_ids == adi.generate(llama, [5], adi.FullDepth(), **sampled).token_ids
    )


def test_what_is_no_policy_is_refused(llama: adi.Model) -> None:
    with pytest.raises(adi.errors.AdiError, match=r"policy is 'verified', of type str; give FullDepth\(\), Verified"):
        adi.generate(llama, [1], "verified")  # type: ignore[arg-type]


def test_decoding_is_verified_by_default(llama: adi.Model) -> None:
    model = replace(llama, notes={})
    assert default_policy(model) == adi.Verified()
    text = adi.generate(model, [1, 2, 3], max_new_tokens=20, stop_at_eos=False)
    assert text.mode == "verified"
    assert text.token_ids == adi.generate(llama, [1, 2, 3], adi.FullDepth(), max_new_tokens=20, stop_at_eos=False).token_ids
    assert adi.generate_batch(model, [[1, 2, 3]], max_new_tokens=20, stop_at_eos=False)[0].token_ids == text.token_ids
    assert tuple(s.token for s in adi.stream(model, [1, 2, 3], max_new_tokens=20, stop_at_eos=False)) == text.token_ids


def test_by_default_the_exits_shipped_for_these_weights_draft(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    exits = exits_with_drafter(llama)
    asked = []

    def found(fingerprint: str) -> adi.Exits:
        asked.append(fingerprint)
        return exits

    monkeypatch.setattr("adi.decoding.policies.shipped_for", found)
    model = replace(llama, notes={})
    assert default_policy(model).exits is exits
    assert default_policy(model) is default_policy(model)
    assert asked == [llama.backbone.spec.fingerprint], "looked for once"
