"""Sampling's values and maths: transformers' own processors, slow twins, and what cannot be meant."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import adi
from adi.decoding.sampler import LEADING, distribution, draw, top_p, verify_draft
from adi.decoding.sampling import Sampling, prompt_seed
from conftest import random_exits
from laws import law_after

OPTIONS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.sampled_from([1.0, 0.943, 0.61, 0.13]),  # no sum of a few equal shares
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([None, 1.0, 1.3, 0.7]),
)
DENSITY = st.lists(st.integers(0, 6), min_size=5, max_size=5).filter(any)


def theirs(logits_V: torch.Tensor, text: list[int], s: Sampling) -> torch.Tensor:
    """transformers' processors in the order in which its ``generate`` applies them."""
    scores, ids = logits_V[None], torch.tensor([text])
    if text and s.repetition_penalty is not None:
        scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores)
    scores = scores.double()
    processors: list[Any] = [TemperatureLogitsWarper(float(s.temperature))]
    processors += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    processors += [TopPLogitsWarper(s.top_p), MinPLogitsWarper(s.min_p)]
    for processor in processors:
        scores = processor(ids, scores)
    return scores.softmax(-1)[0]


def drawn_from(logits_V: torch.Tensor, text: list[int], s: Sampling) -> torch.Tensor:
    return law_after(logits_V, text, s) if text else distribution(logits_V, s)


@given(OPTIONS, st.integers(0, 10**6), st.sampled_from([1, 2, 37, 3000]), st.lists(st.integers(0, 0), max_size=1))
def test_the_distribution_is_transformers_own(s: Sampling, seed: int, vocabulary: int, empty: list[int]) -> None:
    dice = torch.Generator().manual_seed(seed)
    logits_V = 4 * torch.randn(vocabulary, generator=dice)
    text = [] if empty else torch.randint(vocabulary, (9,), generator=dice).tolist()
    got = drawn_from(logits_V, text, s)
    assert torch.allclose(got, theirs(logits_V, text, s), atol=1e-12)
    assert torch.equal(got == 0, theirs(logits_V, text, s) == 0)


def slow(logits: list[float], text: list[int], s: Sampling) -> list[float]:
    """One token at a time, as the docstring of ``Sampling`` says it."""
    penalty = s.repetition_penalty or 1.0
    scores = [x if i not in text else x * penalty if x < 0 else x / penalty for i, x in enumerate(logits)]
    scores = [(x - max(scores)) / s.temperature for x in scores]
    if s.top_k is not None:
        least = sorted(scores, reverse=True)[: s.top_k][-1]
        scores = [x if x >= least else -math.inf for x in scores]
    weights = [math.exp(x) for x in scores]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if s.top_p < 1:
        kept, before = set(), 0.0
        for i in order:
            if before < s.top_p:
                kept.add(i)
            before += p[i]
        p = [x if i in kept else 0.0 for i, x in enumerate(p)]
    p = [x if x >= s.min_p * max(p) else 0.0 for x in p]
    return [x / sum(p) for x in p]


@given(
    OPTIONS,
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.5]), min_size=1, max_size=9),
    st.lists(st.integers(0, 8), max_size=4),
)
def test_the_distribution_is_its_slow_twin_ties_and_all(s: Sampling, logits: list[float], text: list[int]) -> None:
    text = [t for t in text if t < len(logits)]
    assert drawn_from(torch.tensor(logits), text, s).tolist() == pytest.approx(slow(logits, text, s), abs=1e-6)


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    p_V = torch.full((5 * LEADING,), 1 / (5 * LEADING), dtype=torch.float64)
    p_V[7] *= 3
    p_V /= p_V.sum()
    kept = top_p(p_V, 0.5)
    count = int((kept > 0).sum())
    assert abs(count - 2.5 * LEADING) < 3
    assert kept[7] > 0
    assert set(kept.nonzero()[:, 0].tolist()) == {*range(count)}, "of equals the first"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.floats(0, 1, exclude_max=True))
def test_draw_lays_the_weights_end_to_end(weights: list[int], number: float) -> None:
    at, place = Fraction(number) * sum(weights), 0
    while at >= weights[place]:
        at, place = at - weights[place], place + 1
    got = draw(torch.tensor(weights, dtype=torch.float64), number)
    assert got == place or min(at, weights[place] - at) < 1e-9
    assert weights[got] > 0


def test_draw_never_leaves_the_weights() -> None:
    last = math.nextafter(1.0, 0.0)
    assert draw(torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64), last) == 2
    assert draw(torch.tensor([0.0, 0.0, 1e-300], dtype=torch.float64), 0.0) == 2
    assert draw(torch.tensor([1.0]), last) == 0


@given(DENSITY, DENSITY)
def test_a_verify_draft_draft_is_distributed_as_full_depth_says(p: list[int], q: list[int]) -> None:
    """All of the draft's law and all numbers, in exact fractions for what is wanted and by cells for what is done."""
    p_, q_ = ([Fraction(x, sum(d)) for x in d] for d in (p, q))
    p_V, q_V = (torch.tensor([float(x) for x in d], dtype=torch.float64) for d in (p_, q_))
    law = [Fraction(0)] * 5
    for d in range(5):
        if q_[d] == 0:
            continue
        keep = min(Fraction(1), p_[d] / q_[d])
        law[d] += q_[d] * keep
        rest = [max(a - b, Fraction(0)) for a, b in zip(p_, q_, strict=True)]
        for x in range(5) if keep < 1 else ():
            law[x] += q_[d] * (1 - keep) * rest[x] / sum(rest)
        # the numbers that keep the draft, then those that draw from the residual, each checked in the middle of its cell
        edges, names = [Fraction(0), keep], [d]
        for x in range(5) if keep < 1 else ():
            edges.append(edges[-1] + (1 - keep) * rest[x] / sum(rest))
            names.append(x)
        for a, b, name in zip(edges, edges[1:], names, strict=False):
            if b > a:
                assert verify_draft(p_V, q_V, d, float((a + b) / 2)) == name
    assert law == p_, "the rule itself, in exact arithmetic (Leviathan et al. 2023)"


@given(DENSITY, st.integers(0, 4))
def test_one_draw_is_the_rule_for_a_point_mass(p: list[int], draft: int) -> None:
    """Keep d with p(d), else draw from p without d, renormalised: the chances of a single draw kept if it is d."""
    p_ = [Fraction(x, sum(p)) for x in p]
    textbook = [Fraction(0)] * 5
    textbook[draft] = p_[draft]
    if p_[draft] < 1:
        rest = [0 if x == draft else p_[x] for x in range(5)]
        for x in range(5):
            textbook[x] += (1 - p_[draft]) * Fraction(rest[x]) / sum(rest)
    assert textbook == p_
    point = torch.nn.functional.one_hot(torch.tensor(draft), 5).double()
    p_V = torch.tensor([float(x) for x in p_], dtype=torch.float64)
    cells = 997  # numbers spread evenly: both ways give every token as often, up to the cells that an edge cuts
    for say in (lambda u: draw(p_V, u), lambda u: verify_draft(p_V, point, draft, u)):
        counts = [0] * 5
        for i in range(cells):
            counts[say((i + 0.5) / cells)] += 1
        assert all(abs(c / cells - float(x)) < 2.5 / cells for c, x in zip(counts, p_, strict=True))


def test_edges_of_arithmetic() -> None:
    hot = Sampling(temperature=1.0)
    assert distribution(torch.tensor([3.0]), Sampling(1.0, top_k=1, top_p=0.1, min_p=1.0)).tolist() == [1.0]
    assert distribution(torch.zeros(4), hot).tolist() == [0.25] * 4
    assert distribution(torch.tensor([0.0, -math.inf]), hot).tolist() == [1.0, 0.0]
    assert distribution(torch.tensor([1.0, 1e30, 0.0]), Sampling(temperature=5e-324)).tolist() == [0.0, 1.0, 0.0]
    assert distribution(torch.tensor([1.0, 2.0, 2.0]), Sampling()).tolist() == [0.0, 1.0, 0.0]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"hold no distribution: the largest is (nan|inf)"):
            distribution(torch.tensor([0.0, bad]), hot)
    with pytest.raises(ValueError, match="cannot have been drawn"):
        verify_draft(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), 1, 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": 1, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1, "top_k": 2.0}, "top_k is 2.0"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0"),
        ({"temperature": 1, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1, "min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"top_k": 5, "top_p": 0.9}, "top_k=5, top_p=0.9 means nothing at temperature 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], words: str, llama: adi.Model) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**options)
    for verb in (adi.generate, adi.stream):
        with pytest.raises(ValueError, match=words):
            verb(llama, [1], **options)
    with pytest.raises(ValueError, match=words):
        adi.generate_batch(llama, [[1]], adi.FullDepth(), **options)


def test_seeds() -> None:
    assert Sampling().plain
    assert not Sampling(repetition_penalty=1.2).plain
    assert Sampling(1.0).settled() != Sampling(1.0).settled()
    assert Sampling(1.0, seed=3).settled() == Sampling(1.0, seed=3)
    assert len({prompt_seed(s, i) for s in range(20) for i in range(20)}) == 400
    assert Sampling(1.0, seed=3).of_prompt(2).seed == prompt_seed(3, 2)
    assert Sampling(**Sampling(0.5, 3, 0.9, 0.1, 1.2, 7).to_json()) == Sampling(0.5, 3, 0.9, 0.1, 1.2, 7)


HOT: dict[str, Any] = {"temperature": 1.5, "top_k": 60, "top_p": 0.98, "repetition_penalty": 1.2}
PROMPTS = [[1, 2, 3], [5], [(7 * i) % 128 for i in range(40)]]


def policies(model: adi.Model) -> list[Any]:
    exits = adi.bare_exits(model, (2, 4))
    eager = adi.AnyOf((adi.Threshold("stability", 0.93), adi.Threshold("top_probability", 0.03)))
    return [adi.Verified(exits, adi.Always((2,)), draft_tokens=3), adi.Verified(exits, eager), adi.Verified(), adi.Lookup()]


def test_full_depth_and_verified_say_the_same_from_the_same_seed(llama: adi.Model) -> None:
    texts = set()
    for seed in range(2):
        for prompt in PROMPTS[:2]:
            before = torch.random.get_rng_state()
            full = adi.generate(llama, prompt, adi.FullDepth(), max_new_tokens=24, seed=seed, **HOT)
            assert torch.equal(torch.random.get_rng_state(), before), "the caller's dice are not touched"
            again = adi.generate(llama, prompt, adi.FullDepth(), max_new_tokens=24, seed=seed, **HOT)
            assert again.token_ids == full.token_ids
            texts.add(full.token_ids)
            for policy in policies(llama):
                got = [adi.generate(llama, prompt, policy, max_new_tokens=24, seed=seed, **HOT) for _ in range(2)]
                assert got[0].token_ids == got[1].token_ids == full.token_ids
            assert full.sampling == Sampling(**HOT, seed=seed).to_json()
    assert len(texts) == 4
    assert adi.generate(llama, [1], adi.FullDepth(), max_new_tokens=2).sampling is None


def test_an_unseeded_text_can_be_drawn_again(llama: adi.Model) -> None:
    one, two = (adi.generate(llama, [1, 2], adi.FullDepth(), max_new_tokens=24, temperature=2.0) for _ in range(2))
    assert one.token_ids != two.token_ids
    assert one.sampling is not None
    assert adi.generate(llama, [1, 2], adi.FullDepth(), max_new_tokens=24, **one.sampling).token_ids == one.token_ids
    assert (
        tuple(s.token for s in adi.stream(llama, [1, 2], adi.FullDepth(), max_new_tokens=24, **one.sampling)) == one.token_ids
    )


def test_a_batch_draws_what_each_prompt_draws_alone(llama: adi.Model) -> None:
    prompts = [*PROMPTS, PROMPTS[0]]
    for policy in (adi.FullDepth(), *policies(llama)):
        together = adi.generate_batch(llama, prompts, policy, max_new_tokens=12, most=3, seed=5, **HOT)
        alone = [
            adi.generate(llama, p, policy, max_new_tokens=12, seed=prompt_seed(5, i), **HOT) for i, p in enumerate(prompts)
        ]
        assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert together[0].token_ids != together[3].token_ids, "the same prompt twice is drawn twice"
    unseeded = adi.generate_batch(llama, [[1], [1]], adi.FullDepth(), max_new_tokens=12, temperature=2.0)
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_greedy_with_a_penalty_is_transformers(tiny_model: adi.Model, tiny_hf: Any) -> None:
    ids = tiny_model.encode("the lazy dog")
    with torch.no_grad():
        out = tiny_hf.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, repetition_penalty=1.4, pad_token_id=0)
    exits = adi.bare_exits(tiny_model, (2, 4))
    for policy in (adi.FullDepth(), adi.Verified(exits, adi.Always((2,)), draft_tokens=4)):
        got = adi.generate(tiny_model, ids, policy, max_new_tokens=30, repetition_penalty=1.4)
        assert list(got.token_ids) == out[0, len(ids) :].tolist()


def test_reflex_draws_from_the_exit_that_decides(llama: adi.Model) -> None:
    """Of a shortlist head only tokens of the shortlist; with a sharp temperature, its likeliest one."""
    exits = random_exits(llama, (2, 4), adi.Never())
    assert exits.heads is not None
    short = set(exits.heads.ids_S.tolist())
    policy = adi.Reflex(exits, trigger=adi.Always((2,)))
    got = adi.generate(llama, [1, 2, 3], policy, max_new_tokens=40, stop_at_eos=False, temperature=1.0, seed=1)
    early = [s for s in got.steps if s.level == "exit"]
    assert len(early) == 39
    assert {s.token for s in early} <= short
    assert len({s.token for s in early}) > 10
    greedy = adi.generate(llama, [1, 2, 3], policy, max_new_tokens=40, stop_at_eos=False)
    cold = adi.generate(llama, [1, 2, 3], policy, max_new_tokens=40, stop_at_eos=False, temperature=1e-6, seed=1)
    assert cold.token_ids == greedy.token_ids


def test_looks_and_signals_are_there_when_sampling(llama: adi.Model) -> None:
    policy = policies(llama)[0]
    got = adi.generate(llama, [1, 2, 3], policy, max_new_tokens=12, logprobs=3, seed=1, **HOT)
    assert all(step.looks[-1].depth == 6 and len(step.looks[-1].candidates) in (3, 4) for step in got.steps)
