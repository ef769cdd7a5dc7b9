"""Several texts of one prompt: those of a batch of it, bit for bit, and the prompt is read once where there is room."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import adi
from adi.decoding.scheduler import Scheduler
from adi.errors import MemoryFullError, UsageError
from conftest import exits_with_drafter, random_exits

PROMPT = "the quick brown fox jumps over the lazy dog and then"
HOT: dict[str, Any] = {"temperature": 1.5, "seed": 5, "max_new_tokens": 24, "stop_at_eos": False}


def policies(model: adi.Model) -> list[adi.Policy]:
    exits = random_exits(model, (2, 4), adi.Threshold("entropy", 5.0))
    return [
        *(adi.FullDepth(), adi.Verified(), adi.Lookup(), adi.Verified(exits_with_drafter(model))),
        *(adi.Verified(exits, draft_tokens=3), adi.Static(exits, 2, 3), adi.Reflex(exits, thresholds=5.0)),
    ]


def read(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts read from now on, as a list of their passes' lengths."""
    forward, lengths = type(model.backbone).forward, list[int]()

    def counted(self: Any, rows: Any, lo: int, hi: int, **more: Any) -> Any:
        lengths.extend(len(r.ids) for r in rows if r.start == 0 and lo == 0)
        return forward(self, rows, lo, hi, **more)

    monkeypatch.setattr(type(model.backbone), "forward", counted)
    return lengths


# B11
@pytest.mark.parametrize("n", [1, 2, 5])
def test_n_texts_are_those_of_a_batch_and_the_prompt_is_read_once(
    tiny_model: adi.Model, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = len(tiny_model.encode(PROMPT))
    for policy in policies(tiny_model):
        wanted = adi.generate_batch(tiny_model, [PROMPT] * n, policy, **HOT)
        with monkeypatch.context() as patch:
            prompts = read(tiny_model, patch)
            got = adi.generate(tiny_model, PROMPT, policy, n=np.int64(n), **HOT)
        assert [g.token_ids for g in got] == [g.token_ids for g in wanted], policy
        assert [(g.text, g.finish, g.sampling) for g in got] == [(g.text, g.finish, g.sampling) for g in wanted]
        assert prompts == [length]
    assert len({g.token_ids for g in wanted}) == n, "each has dice of its own"


# B11
@pytest.mark.parametrize("family", ["gemma3", "lfm2", "gpt2", "qwen3_sliding"])
def test_windows_and_convolutions_are_taken_over_too(family: str) -> None:
    from families import tiny

    model, prompt = adi.load(tiny(family)), list(range(3, 40))
    for policy in (adi.FullDepth(), adi.Verified()):
        got = adi.generate(model, prompt, policy, n=3, **HOT)
        assert [g.token_ids for g in got] == [g.token_ids for g in adi.generate_batch(model, [prompt] * 3, policy, **HOT)]


# B11
@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_compiled_engines_copy_blocks_and_begin_again_where_there_are_too_few(made: Any) -> None:
    from engines import IDS, engine

    backbone = engine(made, "llama")
    model, pool = adi.Model(backbone, None, frozenset()), backbone.pool
    for policy in (adi.FullDepth(), adi.Verified()):
        for length in (7, 32, 40):
            wanted = adi.generate_batch(model, [IDS[:length]] * 4, policy, **HOT)
            room, pool.budget_bytes = pool.budget_bytes, pool.blocks * pool.block_bytes
            for free in (3, 5, pool.blocks):
                with backbone.new_cache() as others:
                    pool.reserve([(others, 32 * (pool.blocks - free))])
                    got = adi.generate(model, IDS[:length], policy, n=4, **HOT)
                    assert [g.token_ids for g in got] == [g.token_ids for g in wanted]
                    assert pool.used == pool.blocks - free
            pool.budget_bytes = room


# B11
def test_options_of_the_prompt_and_the_text_are_those_of_a_batch(tiny_model: adi.Model) -> None:
    talk = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "dog"}]
    options: dict[str, Any] = {**HOT, "stop": "e", "special_tokens": True, "continue_final": False, "logprobs": 2}
    got, wanted = adi.generate(tiny_model, talk, n=3, **options), adi.generate_batch(tiny_model, [talk] * 3, **options)
    assert [(g.text, g.token_ids, g.prompt_ids) for g in got] == [(g.text, g.token_ids, g.prompt_ids) for g in wanted]
    assert adi.generate(tiny_model, iter([5, 6, 7]), n=2, max_new_tokens=3)[1].prompt_ids == (5, 6, 7)
    greedy = adi.generate(tiny_model, PROMPT, n=2, max_new_tokens=4)
    assert greedy[0].token_ids == greedy[1].token_ids == adi.generate(tiny_model, PROMPT, max_new_tokens=4).token_ids


# B11
def test_a_copy_that_finds_no_room_reads_the_prompt_itself(tiny_model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = adi.generate_batch(tiny_model, [PROMPT] * 3, **HOT)

    def full(*_: Any) -> Any:
        raise MemoryFullError("full")

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_model.backbone), "resume", full)
        prompts = read(tiny_model, patch)
        assert [g.token_ids for g in adi.generate(tiny_model, PROMPT, n=3, **HOT)] == [g.token_ids for g in wanted]
    assert len(prompts) == 3


# B11
def test_one_that_begins_when_the_first_has_ended_or_begins_again_gives_the_same(tiny_model: adi.Model) -> None:
    alone = [
        tuple(s.token for s in adi.stream(tiny_model, PROMPT, temperature=1.5, seed=i, max_new_tokens=9)) for i in (1, 2, 3)
    ]
    with adi.PrefixCache(tiny_model) as kept:
        first, second, third = (
            adi.Session(tiny_model, PROMPT, sampling=adi.Sampling(1.5, seed=seed), max_new_tokens=9, prefix_cache=kept)
            for seed in (1, 2, 3)
        )
        assert tuple(step.token for step in first.steps()) == alone[0]
        assert tuple(step.token for step in second.steps()) == alone[1]
        with Scheduler[adi.Session](tiny_model.backbone, prefix_cache=kept) as scheduler:
            scheduler.add(third)
            scheduler.step()
            third.close()
            third.restart()
            assert tuple(step.token for step in third.steps()) == alone[2]
    assert second.counters.reused == third.counters.reused == len(second.prompt_ids)


@pytest.mark.parametrize("n", [0, -1, "2", True, 1.5])
def test_n_is_a_whole_number(tiny_model: adi.Model, n: Any) -> None:
    with pytest.raises(UsageError, match=r"n is .*; it must be a whole number of at least 1"):
        adi.generate(tiny_model, PROMPT, n=n)


def test_an_unknown_option_is_said(tiny_model: adi.Model) -> None:
    for prompt in (PROMPT, [5, 6]):
        for raw in (False, True):
            with pytest.raises(TypeError, match="'max_tokens' is no option of generate"):
                adi.generate(tiny_model, prompt, max_tokens=5, raw=raw)
