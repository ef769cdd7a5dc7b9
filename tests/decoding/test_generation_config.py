"""The model's generation config is obeyed where it changes greedy text, on both engines and whoever drafts; so are penalties,
bad words and biases given as options, and a caller's own logits processors."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

import adi
from adi.decoding.processors import fields_for
from adi.decoding.sampling import Sampling
from adi.errors import ModelError, NoDistributionError, UsageError

IDS, TOKENS = [5, 6, 7, 8, 5, 6], 30
END = 204  # the token that ends an answer


@pytest.fixture(scope="module")
def network(tiny_hf: Any) -> Any:
    made = copy.deepcopy(tiny_hf)
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module", params=["hf", "openvino"])
def model(request: pytest.FixtureRequest, network: Any, tiny_folder: Path) -> adi.Model:
    """The network on either engine, without a generation config."""
    if request.param == "hf":
        return adi.load(network).plain()
    pytest.importorskip("openvino")
    loaded = adi.load(tiny_folder, backend="openvino", precision="fp32")
    return replace(loaded.plain(), eos_ids=frozenset(), tokenizer=None)


@pytest.fixture(scope="module")
def free(network: Any) -> list[int]:
    """What the model says with an empty generation config."""
    return theirs(network, {}, IDS)


def theirs(network: Any, generation: dict[str, Any], ids: list[int], **options: Any) -> list[int]:
    with torch.no_grad():
        config = t.GenerationConfig(**generation, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        mask = torch.ones(1, len(ids))
        return network.generate(torch.tensor([ids]), config, attention_mask=mask, **options)[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def modes(model: adi.Model) -> list[adi.Policy]:
    eager = adi.Verified(adi.bare_exits(model, (2, 4)), adi.Always((2,)), draft_tokens=4)
    return [adi.FullDepth(), adi.Verified(), eager, adi.Lookup()]


def changes(free: list[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Generation configs and prompts for which each changes the text."""
    first, second = free[1], free[2]
    yield {"repetition_penalty": 1.4}, IDS
    yield {"encoder_repetition_penalty": 1.6}, IDS
    yield {"no_repeat_ngram_size": 2}, IDS * 2
    yield {"encoder_no_repeat_ngram_size": 1}, list(range(1, 120))
    yield {"suppress_tokens": [free[0], first]}, IDS
    yield {"begin_suppress_tokens": [free[0]]}, IDS
    yield {"bad_words_ids": [[free[0]], [first, second]]}, IDS
    yield {"sequence_bias": [[[first, second], -9.0], [[9], 0.4]]}, IDS
    yield {"forced_eos_token_id": 9}, IDS
    yield {"forced_bos_token_id": 9}, [5]
    yield {"min_new_tokens": 12, "eos_token_id": [free[5], free[6]]}, IDS
    yield {"min_length": 20, "eos_token_id": free[5]}, IDS
    yield {"exponential_decay_length_penalty": [4, 1.2], "eos_token_id": END}, IDS
    yield {"watermarking_config": {"bias": 3.0}}, IDS
    yield {"renormalize_logits": True, "remove_invalid_values": True, "suppress_tokens": [free[3]]}, IDS
    yield {"repetition_penalty": 1.2, "sequence_bias": {(9,): 0.3}, "no_repeat_ngram_size": 3, "suppress_tokens": [first]}, IDS


# A5
def test_the_generation_config_is_obeyed_as_transformers_obeys_it(model: adi.Model, free: list[int], network: Any) -> None:
    policies = [policy for policy in modes(model) if policy != adi.Verified()]  # which streams below
    assert len(policies) == 3
    for generation, ids in changes(free):
        wanted = theirs(network, generation, ids)
        assert wanted != theirs(network, {}, ids), generation
        ends = generation.get("eos_token_id", [])
        own = replace(model, generation=generation, eos_ids=frozenset(ends if isinstance(ends, list) else [ends]))
        for policy in policies:
            got = adi.generate(own, ids, policy, max_new_tokens=TOKENS)
            assert list(got.token_ids) == wanted, (generation, policy)
        assert [s.token for s in adi.stream(own, ids, max_new_tokens=TOKENS)] == wanted
        batch = adi.generate_batch(own, [ids, IDS[:2], ids], max_new_tokens=TOKENS)
        assert [list(one.token_ids) for one in batch[::2]] == [wanted] * 2


# A5
def test_the_generation_config_of_a_model_in_memory_counts_as_it_is_by_now(network: Any) -> None:
    made = copy.deepcopy(network)
    loaded = adi.load(made)
    plain = adi.generate(loaded, IDS, max_new_tokens=TOKENS).token_ids
    made.generation_config.repetition_penalty = 1.4
    with torch.no_grad():
        wanted = made.generate(torch.tensor([IDS]), max_new_tokens=TOKENS, do_sample=False)[0, len(IDS) :].tolist()
    assert list(adi.generate(loaded, IDS, max_new_tokens=TOKENS).token_ids) == wanted != list(plain)
    off = adi.load(made, generation_config={"repetition_penalty": None})
    assert adi.generate(off, IDS, max_new_tokens=TOKENS).token_ids == plain
    assert adi.generate(loaded, IDS, max_new_tokens=TOKENS, repetition_penalty=1.0).token_ids == plain
    assert made.generation_config.repetition_penalty == 1.4


# A5
def test_a_generation_config_that_samples_or_says_how_to_is_greedy_all_the_same(free: list[int], network: Any) -> None:
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_length": 12, "num_beams": 1}
    got = adi.generate(replace(adi.load(network), generation=sampled), IDS, max_new_tokens=TOKENS)
    assert list(got.token_ids) == free
    assert got.sampling is None


# A5
@pytest.mark.parametrize(
    "generation",
    [
        {"num_beams": 4},
        {"num_beam_groups": 2},
        {"penalty_alpha": 0.6},
        {"guidance_scale": 1.5},
        {"dola_layers": "low"},
        {"force_words_ids": [[[4]]]},
        {"token_healing": True},
        {"cache_implementation": "quantized"},
    ],
    ids=lambda generation: next(iter(generation)),
)
def test_a_generation_config_that_cannot_be_meant_is_refused_by_name_at_load(generation: dict[str, Any], network: Any) -> None:
    made = copy.deepcopy(network)
    vars(made.generation_config).update(generation)
    ((name, value),) = generation.items()
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM sets {name}=.*generation_config=\{{'{name}': None\}}"):
        adi.load(made)
    adi.load(made, generation_config={name: None})
    assert getattr(made.generation_config, name) == value


def test_what_adi_does_not_read_of_a_generation_config_is_refused_where_it_is_given(network: Any) -> None:
    with pytest.raises(UsageError, match=r"generation_config holds 'reptition_penalty', which adi does not read; it reads bad"):
        adi.load(network, generation_config={"reptition_penalty": 1.1})
    with pytest.raises(ModelError, match=r"cannot read \{'repetition_penalty': -1.0\}.*strictly positive"):
        adi.generate(adi.load(network, generation_config={"repetition_penalty": -1.0}), IDS)


# A5
def test_stop_strings_of_a_generation_config_end_the_text(tiny_model: adi.Model) -> None:
    text = adi.generate(tiny_model, "hello", max_new_tokens=30, stop_at_eos=False).text
    stops = replace(tiny_model, generation={"stop_strings": text[9:12]})
    got = adi.generate(stops, "hello", max_new_tokens=30)
    assert (got.text, got.finish) == (text[: text.index(text[9:12])], "stop")
    assert adi.generate(stops, "hello", max_new_tokens=30, stop_at_eos=False).text == text


# B6
def test_penalties_bad_words_and_biases_are_options(model: adi.Model, free: list[int], network: Any) -> None:
    same: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"bad_words": [[free[0]], [free[1], free[2]]]}, {"bad_words_ids": [[free[0]], [free[1], free[2]]]}),
        ({"logit_bias": {str(free[0]): -100, 9: 0.4}}, {"sequence_bias": {(free[0],): -100.0, (9,): 0.4}}),
    ]
    for options, generation in same:
        wanted = theirs(network, generation, IDS)
        assert wanted != free
        for policy in modes(model):
            got = adi.generate(model, IDS, policy, max_new_tokens=TOKENS, **options)
            assert list(got.token_ids) == wanted, options
            assert got.sampling is not None
            assert adi.generate(model, IDS, policy, max_new_tokens=TOKENS, **got.sampling).token_ids == got.token_ids
    ending = replace(model, eos_ids=frozenset({free[5]}))
    assert len(adi.generate(ending, IDS, max_new_tokens=TOKENS).token_ids) <= 6
    assert len(adi.generate(ending, IDS, max_new_tokens=TOKENS, min_new_tokens=9).token_ids) > 9
    assert list(adi.generate(ending, IDS, max_new_tokens=TOKENS, min_new_tokens=12).token_ids) == theirs(
        network, {"min_new_tokens": 12, "eos_token_id": free[5]}, IDS
    )


class Counted(t.LogitsProcessor):
    """Frequency and presence penalties, token by token."""

    def __init__(self, often: float, ever: float) -> None:
        self.often, self.ever = often, ever

    def __call__(self, ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        for token in ids[0, len(IDS) :].unique():
            count = int((ids[0, len(IDS) :] == token).sum())
            scores[0, token] -= self.often * count + self.ever
        return scores


# B6
def test_frequency_and_presence_penalties_are_those_of_the_openai_api(model: adi.Model, free: list[int], network: Any) -> None:
    for often, ever in ((0.125, 0.0), (0.0, 0.25), (0.125, 0.25), (-0.25, 0.0)):
        wanted = theirs(network, {}, IDS, logits_processor=t.LogitsProcessorList([Counted(often, ever)]))
        for policy in modes(model):
            options: Any = {"frequency_penalty": often, "presence_penalty": ever, "max_new_tokens": TOKENS}
            assert list(adi.generate(model, IDS, policy, **options).token_ids) == wanted
        assert wanted != free


# B2, A5
def test_logits_processors_of_a_caller_are_applied_after_the_models_own(
    model: adi.Model, free: list[int], network: Any
) -> None:
    def even(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Only even tokens, and none twice in a row; in place, as callers may."""
        assert ids.shape[0] == 1
        assert scores.dtype == torch.float32
        scores[:, 1::2] = -torch.inf
        scores[0, ids[0, -1]] = -torch.inf
        return scores

    own = [even, SuppressTokensLogitsProcessor([free[0], free[1]])]
    for generation in ({}, {"repetition_penalty": 1.3}):
        wanted = theirs(network, generation, IDS, logits_processor=t.LogitsProcessorList(own))
        penalised = replace(model, generation=generation)
        for policy in modes(model):
            got = adi.generate(penalised, IDS, policy, max_new_tokens=TOKENS, logits_processor=own)
            assert list(got.token_ids) == wanted
        assert [s.token for s in adi.stream(penalised, IDS, max_new_tokens=TOKENS, logits_processor=own)] == wanted
        batch = adi.generate_batch(penalised, [IDS, IDS], max_new_tokens=TOKENS, logits_processor=own)
        assert [list(one.token_ids) for one in batch] == [wanted] * 2
    drawn = [
        adi.generate(model, IDS, policy, max_new_tokens=TOKENS, logits_processor=own, temperature=1.0, seed=3).token_ids
        for policy in modes(model)
    ]
    assert len(set(drawn)) == 1
    assert not any(token % 2 for token in drawn[0])


def test_a_logits_processor_that_gives_no_scores_or_leaves_no_token_is_named(llama: adi.Model) -> None:
    for wrong, words in (
        (lambda ids, s: s[0], r"gave a tensor \[128\]; it must give scores, \[1, 128\]"),
        (lambda ids, s: 3, "gave int"),
    ):
        with pytest.raises(UsageError, match=words):
            adi.generate(llama, IDS, logits_processor=[wrong])
    with pytest.raises(NoDistributionError, match="after 6 tokens no token is left to choose"):
        adi.generate(llama, IDS, logits_processor=[lambda ids, s: torch.full_like(s, -torch.inf)])
    with pytest.raises(ZeroDivisionError):
        adi.generate(llama, IDS, logits_processor=[lambda ids, s: 1 / 0])


def test_reflex_penalises_what_an_exit_says_and_a_certificate_of_plain_text_is_refused(llama: adi.Model) -> None:
    from conftest import random_exits
    from support import certificate

    exits = random_exits(llama, (2,), adi.Never())
    reflex = adi.Reflex(exits, trigger=adi.Always((2,)))
    plain = adi.generate(llama, IDS, reflex, max_new_tokens=TOKENS).token_ids
    banned = adi.generate(llama, IDS, reflex, max_new_tokens=TOKENS, bad_words=[[i] for i in {*plain[:9]}]).token_ids
    assert not {*banned} & {*plain[:9]}
    certified = adi.Reflex(replace(exits, certificates=(certificate(fingerprint=llama.backbone.spec.fingerprint),)), risk=0.02)
    for options in ({"presence_penalty": 0.5}, {"logits_processor": [lambda ids, s: s]}):
        with pytest.raises(ValueError, match="speaks of the model's plain greedy text"):
            adi.generate(llama, IDS, certified, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"generation config too: adi.load\("):
        adi.generate(replace(llama, generation={"repetition_penalty": 1.1}), IDS, certified)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"min_new_tokens": 2.5}, "min_new_tokens is 2.5"),
        ({"frequency_penalty": "much"}, "frequency_penalty is 'much'"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"bad_words": "word"}, "bad_words is 'word'"),
        ({"bad_words": [""]}, "bad_words is"),
        ({"bad_words": [[500]]}, "a token of bad_words is 500"),
        ({"bad_words": ["word"]}, "no tokenizer; give bad_words as token ids"),
        ({"logit_bias": {128: 1.0}}, "a token of logit_bias is 128; .* from 0 to 127"),
        ({"logit_bias": {1: "up"}}, "logit_bias of 1 is 'up'"),
        ({"min_new_tokens": 40, "max_new_tokens": 30}, "min_new_tokens is 40, more than max_new_tokens, 30"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str, llama: adi.Model) -> None:
    with pytest.raises(ValueError, match=words):
        adi.generate(llama, IDS, **options)


def test_bad_words_are_texts_too_at_the_beginning_after_a_space_and_special_tokens(tiny_model: adi.Model) -> None:
    assert tiny_model.tokenizer is not None
    words = fields_for(tiny_model, Sampling(bad_words=["dog", " dog", "<|user|>", [7]]))["bad_words_ids"]
    spelled = [tiny_model.tokenizer.encode(text) for text in ("dog", " dog")]
    assert spelled[0] != spelled[1]
    assert [tuple(ids) for ids in words[:4]] == spelled * 2
    assert words[4] == [tiny_model.tokenizer.hf.convert_tokens_to_ids("<|user|>")]
    assert words[-1] == [7]
    free = adi.generate(tiny_model, "hello", max_new_tokens=9, stop_at_eos=False)
    piece = next(step.text for step in free.steps if step.text.strip() and step.text.isascii())
    got = adi.generate(tiny_model, "hello", max_new_tokens=9, stop_at_eos=False, bad_words=[piece.strip()])
    assert got.token_ids != free.token_ids


def test_plain_decoding_on_the_compiled_engine_needs_neither_torch_nor_transformers(tiny_folder: Path) -> None:
    pytest.importorskip("openvino")
    adi.load(tiny_folder, backend="openvino", precision="fp32")
    code = f"""
import sys, adi
model = adi.load({str(tiny_folder)!r}, backend="openvino", precision="fp32")
adi.generate(model, [5, 6, 7], max_new_tokens=5, stop="x", stop_token_ids=[9])
adi.generate(model, [5, 6, 7], max_new_tokens=5, repetition_penalty=1.0)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
