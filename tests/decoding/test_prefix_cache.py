"""What is taken over from earlier texts is what would be computed, bit for bit; memory that it takes comes back."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adi
from adi.decoding.frontier import Frontier
from adi.decoding.passes.sharing import Pace
from adi.decoding.scheduler import Scheduler
from adi.errors import UsageError
from engines import engine
from families import VOCABULARY, tiny

LONG: dict[str, Any] = {"stop_at_eos": False}
IDS = tuple(torch.randint(3, VOCABULARY - 1, (700,), generator=torch.Generator().manual_seed(7)).tolist())


@pytest.fixture(scope="module", params=["hf", "fp32", "int8", "int4"])
def model(request: pytest.FixtureRequest, made: Any) -> adi.Model:
    if request.param == "hf":
        return adi.load(tiny("llama"))
    pytest.importorskip("openvino")
    return adi.Model(engine(made, "llama", request.param), None, frozenset())


def logits(model: adi.Model, ids: tuple[int, ...], kept: adi.PrefixCache | None) -> tuple[torch.Tensor, int]:
    """Of the last token of a prompt; and how many positions were taken over."""
    frontier = Frontier(model.backbone)
    if kept is not None:
        frontier.reuse(kept, ids)
    frontier.read(ids)
    frontier.advance(model.backbone.spec.layers)
    assert frontier.last is not None
    found = model.backbone.logits(frontier.last[-1:]).clone()
    frontier.close()
    return found, frontier.reused


def used(model: adi.Model) -> int:
    pool = getattr(model.backbone, "pool", None)
    return 0 if pool is None else pool.used


def test_turns_of_a_chat_have_the_bits_of_prompts_that_are_read_anew(model: adi.Model) -> None:
    talk, before = IDS[:150], used(model)
    with adi.PrefixCache(model) as kept:
        for turn in range(4):
            for policy in (adi.FullDepth(), adi.Verified()):
                wanted = adi.generate(model, talk, policy, max_new_tokens=20, **LONG)
                got = adi.generate(model, talk, policy, max_new_tokens=20, prefix_cache=kept, **LONG)
                assert got.token_ids == wanted.token_ids
                fresh, reused = logits(model, talk, None)[0], logits(model, talk, kept)
                assert torch.equal(reused[0], fresh)
            if turn:
                chunk = model.backbone.spec.chunk
                assert got.counters.reused >= len(talk) - chunk
            talk = (*talk, *got.token_ids, *IDS[200 + 40 * turn : 240 + 40 * turn])
        assert kept.bytes > 0
    assert (kept.bytes, kept.tokens, used(model)) == (0, 0, before)


def test_a_turn_begins_behind_the_answer_before_it(model: adi.Model) -> None:
    """The answer is read again, as a prompt is, once it is there."""
    with adi.PrefixCache(model) as kept:
        first = adi.generate(model, IDS[:100], max_new_tokens=70, prefix_cache=kept, **LONG)
        text = (*IDS[:100], *first.token_ids, *IDS[300:330])
        second = adi.generate(model, text, max_new_tokens=4, prefix_cache=kept, **LONG)
        assert second.counters.reused == model.backbone.spec.whole(170)
        assert second.token_ids == adi.generate(model, text, max_new_tokens=4, **LONG).token_ids
    with adi.PrefixCache(model, answers=False) as kept:
        adi.generate(model, IDS[:100], max_new_tokens=70, prefix_cache=kept, **LONG)
        assert kept.tokens <= 101


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 260), st.integers(1, 80)), min_size=1, max_size=10),
    budget=st.sampled_from([0, 3, 6, 1000]),
)
def test_any_tree_of_prompts_has_the_bits_of_no_memory(
    model: adi.Model, texts: list[tuple[int, int, int]], budget: int
) -> None:
    """Each prompt goes on, from some place of an earlier one, with tokens of its own; memory may be for a few blocks only."""
    known, before = [IDS[:200]], used(model)
    block = max(1, logits_bytes(model))
    with adi.PrefixCache(model, budget * block) as kept:
        for parent, place, more in texts:
            text = (*known[parent % len(known)][:place], *IDS[300 + 7 * place % 300 :][:more])
            known.append(text)
            got, reused = logits(model, text, kept)
            assert torch.equal(got, logits(model, text, None)[0])
            assert reused <= len(text)
            assert kept.bytes <= budget * block
    assert used(model) == before


def logits_bytes(model: adi.Model) -> int:
    """What a block of 32 positions takes."""
    with adi.PrefixCache(model) as kept:
        logits(model, IDS[:64], kept)
        return kept.bytes // 2


def test_a_system_prompt_is_read_once_by_a_batch(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [(*IDS[:192], *IDS[200 + 20 * i : 210 + 20 * i]) for i in range(4)]
    wanted = [adi.generate(model, prompt, max_new_tokens=6, **LONG).token_ids for prompt in prompts]
    rows, forward = [], model.backbone.forward

    def counted(given: Any, lo: int, hi: int, **more: Any) -> Any:
        rows.extend(len(r.ids) for r in given if lo == 0 and r.prompt)
        return forward(given, lo, hi, **more)

    monkeypatch.setattr(model.backbone, "forward", counted)
    before = used(model)
    assert [g.token_ids for g in adi.generate_batch(model, prompts, max_new_tokens=6, **LONG)] == wanted
    assert sum(rows) == 192 + 4 * 10
    assert used(model) == before


@pytest.mark.parametrize("policy", [adi.FullDepth(), adi.Verified(), adi.Lookup()])
def test_sampled_texts_are_those_of_their_seeds(model: adi.Model, policy: adi.Policy) -> None:
    options: dict[str, Any] = {"temperature": 1.3, "max_new_tokens": 12, **LONG}
    with adi.PrefixCache(model) as kept:
        for seed in range(3):
            for length in (130, 90, 131):
                wanted = adi.generate(model, IDS[:length], policy, seed=seed, **options)
                got = adi.generate(model, IDS[:length], policy, seed=seed, prefix_cache=kept, **options)
                assert got.token_ids == wanted.token_ids


def test_a_stream_that_is_cut_off_leaves_its_prompt(model: adi.Model) -> None:
    before = used(model)
    with adi.PrefixCache(model) as kept:
        for tokens in range(4):
            stream = adi.stream(model, IDS[:150], adi.Verified(), max_new_tokens=30, prefix_cache=kept, **LONG)
            for _ in range(tokens):
                next(stream)
            stream.close()  # type: ignore[attr-defined]
        again = adi.generate(model, IDS[:150], max_new_tokens=30, prefix_cache=kept, **LONG)
        assert again.counters.reused == 150
        assert again.token_ids == adi.generate(model, IDS[:150], max_new_tokens=30, **LONG).token_ids
    assert used(model) == before


def test_kv_memory_that_is_wanted_is_given_back(made: Any) -> None:
    """First of texts that ended, those first that were used least lately; what runs is left alone."""
    pytest.importorskip("openvino")
    model = adi.Model(engine(made, "llama"), None, frozenset())
    pool: Any = model.backbone.pool  # type: ignore[attr-defined]
    room, pool.budget_bytes = pool.budget_bytes, 12 * pool.block_bytes
    try:
        with adi.PrefixCache(model) as kept:
            for start in (0, 100, 200, 300, 0):
                text = IDS[start : start + 100]
                got = adi.generate(model, text, max_new_tokens=20, prefix_cache=kept, **LONG)
                assert got.token_ids == adi.generate(model, text, max_new_tokens=20, **LONG).token_ids
                assert pool.used <= 12
            prompts = [IDS[start : start + 100] for start in (0, 100, 200, 300)]
            together = adi.generate_batch(model, prompts, max_new_tokens=20, prefix_cache=kept, **LONG)
            alone = [adi.generate(model, text, max_new_tokens=20, **LONG).token_ids for text in prompts]
            assert [g.token_ids for g in together] == alone
        assert pool.used == 0
    finally:
        pool.budget_bytes = room


def test_weights_that_were_changed_make_what_was_kept_useless() -> None:
    hf = copy.deepcopy(tiny("llama"))  # which others use, too
    model = adi.load(hf)
    with adi.PrefixCache(model) as kept:
        logits(model, IDS[:150], kept)
        with torch.no_grad():
            hf.model.layers[0].self_attn.k_proj.weight.mul_(3)
        got, reused = logits(model, IDS[:150], kept)
        assert reused == 0
        assert torch.equal(got, logits(model, IDS[:150], None)[0])


@pytest.mark.parametrize("family", ["lfm2", "gemma3", "qwen3_sliding", "gpt2"])
def test_what_cannot_be_taken_apart_is_read_anew(family: str) -> None:
    model = adi.load(tiny(family))
    context = model.backbone.spec.context or 200
    with adi.PrefixCache(model) as kept:
        for length in (100, 100, 110):
            text = IDS[: min(length, context - 10)]
            assert torch.equal(logits(model, text, kept)[0], logits(model, text, None)[0])
    gc.collect()


def test_another_models_memory_is_refused(llama: adi.Model, tiny_model: adi.Model) -> None:
    with pytest.raises(UsageError, match=r"prefix_cache was made of another model than .*adi\.PrefixCache\(model\)"):
        adi.generate(llama, [5, 6], prefix_cache=adi.PrefixCache(tiny_model))
    with pytest.raises(UsageError, match=r"prefix_cache is .*of type str"):
        adi.generate(llama, [5, 6], prefix_cache="yes")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="budget_bytes is -1"):
        adi.PrefixCache(llama, -1)


def test_a_long_prompt_goes_in_parts_beside_those_that_are_answered(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is as long as others can wait for, and nobody's next token comes without theirs."""
    pytest.importorskip("openvino")
    model = adi.Model(engine(made, "llama"), None, frozenset())
    passes, forward = [], model.backbone.forward

    def counted(given: Any, lo: int, hi: int, **more: Any) -> Any:
        passes.append([(r.prompt, len(r.ids)) for r in given])
        return forward(given, lo, hi, **more)

    wanted = [adi.generate(model, ids, adi.FullDepth(), max_new_tokens=60, **LONG).token_ids for ids in (IDS[:5], IDS[5:400])]
    monkeypatch.setattr(model.backbone, "forward", counted)
    monkeypatch.setattr(Pace, "rows", lambda *_: 20)
    with Scheduler[adi.Session](model.backbone) as scheduler:
        sessions = [adi.Session(model, ids, adi.FullDepth(), max_new_tokens=60, **LONG) for ids in (IDS[:5], IDS[5:400])]
        texts: dict[adi.Session, list[int]] = {session: [] for session in sessions}
        scheduler.add(sessions[0])
        scheduler.step()
        scheduler.add(sessions[1])
        for session, event in scheduler:
            if isinstance(event, adi.Step):
                texts[session].append(event.token)
    assert [tuple(texts[session]) for session in sessions] == wanted
    parts = [one for one in passes[1:] if (True, 20) in one]
    assert len(parts) >= 19
    assert all((False, 1) in one for one in parts), "a token of the first beside each part"


def test_a_batch_reads_its_prompts_first_in_whole_passes(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the first of its texts, so no pass is kept short for them."""
    pytest.importorskip("openvino")
    model = adi.Model(engine(made, "llama"), None, frozenset())
    prompts = [IDS[start : start + 45] for start in range(0, 320, 40)]
    wanted = [adi.generate(model, ids, adi.FullDepth(), max_new_tokens=9, **LONG).token_ids for ids in prompts]
    passes, forward = [], model.backbone.forward

    def counted(given: Any, lo: int, hi: int, **more: Any) -> Any:
        passes.append([(r.prompt, len(r.ids)) for r in given])
        return forward(given, lo, hi, **more)

    monkeypatch.setattr(model.backbone, "forward", counted)
    found = adi.generate_batch(model, prompts, adi.FullDepth(), max_new_tokens=9, **LONG)
    assert [one.token_ids for one in found] == wanted
    reading = [one for one in passes if any(prompt for prompt, _ in one)]
    assert len(reading) == 6, "eight prompts of 45 rows"
    assert all(sum(rows for _, rows in one) >= 63 for one in reading[:-1]), "no part is one row alone"
    assert all(all(prompt for prompt, _ in one) for one in reading[:-1])
    assert sum(len(one) for one in passes) - sum(prompt for one in passes for prompt, _ in one) == 8 * (9 - 1)


def test_parts_are_as_long_as_others_can_wait_for() -> None:
    pace = Pace()
    for _ in range(40):
        pace.seen(8.0, 0)
        rows = pace.rows()
        pace.seen(8.0 + 0.5 * rows, rows)
    assert 0.5 * pace.rows() <= 2 * 8.0
    assert pace.rows() == 24
    slow = Pace(1.0, 100.0)
    assert slow.rows() == 2


def test_parts_are_longer_beside_many_who_wait_for_longer_passes_anyway() -> None:
    """Though none of these was without a prompt beside so far."""
    assert Pace().rows(2) == 16
    assert Pace().rows(32) == 48, "a row of a prompt costs no more than one of those that are answered"
    pace = Pace()
    for _ in range(40):
        pace.seen(8.0, 0, 2)
        pace.seen(8.0 + 0.5 * 10, 10, 2)
    assert [pace.rows(others) for others in (1, 2, 16, 32)] == [24, 24, 45, 69]
    pace.seen(8.0 + 0.5 * 14 + 0.5 * 40, 40, 16)
    assert pace.rows(2) == 24, "more rows of others are no dearer rows of prompts"
