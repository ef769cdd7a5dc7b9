"""Texts that a model generates to train on: their states are those of a pass over them, no test text is trained on, and an
interrupted run ends where an undisturbed one does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import adi
from adi.decoding.teacher_forcing import KnownText, forced_pass
from adi.training import generate_data as module
from adi.training.generate_data import (
    GenerateOptions,
    PromptTemplate,
    generate_dataset,
    generate_shards,
    share_of_own,
    tokens_in,
)
from adi.training.shards import read_shard, texts_in
from adi.training.texts import datastore_of, is_held_out, prompt_of
from support import Stop

OPTIONS = GenerateOptions(tokens=60, max_new_tokens=8, seed=3)
PROMPTS = [(5, 6, 7 + i) for i in range(40)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TEXTS", 4)
    monkeypatch.setattr(module, "SIDE_BY_SIDE", 6)
    monkeypatch.setattr(module, "LONGEST_PROMPT", 6)


def generated(model: adi.Model, prompts: Sequence[tuple[int, ...]], folder: Path, options: GenerateOptions) -> list[Path]:
    """All shards, those to train on first."""
    train, held = generate_shards(model, prompts, folder, options)
    return [*train, *held]


def test_recorded_states_are_those_of_a_pass_over_the_text(tiny_model: adi.Model, tmp_path: Path) -> None:
    backbone, prompt = tiny_model.backbone, tuple(tiny_model.encode("the fox"))
    paths = generated(tiny_model, [prompt], tmp_path, OPTIONS)
    assert OPTIONS.tokens <= tokens_in(paths) < OPTIONS.tokens + 4 * OPTIONS.max_new_tokens
    template, own = PromptTemplate.of(tiny_model), 0
    for shard in map(read_shard, paths):
        assert shard.hidden_NED.shape[1] == 0, "nobody asked for states at exits"
        seen = list(forced_pass(backbone, [KnownText(text.ids) for text in shard.texts]))
        deep_ND = torch.cat([one.deep_ND for one in seen])
        torch.testing.assert_close(shard.deep_ND.float(), deep_ND, atol=2e-2, rtol=2e-3)
        torch.testing.assert_close(shard.total_N, backbone.logits(deep_ND).logsumexp(-1), atol=5e-3, rtol=0)
        assert (shard.token_N == backbone.logits(deep_ND).argmax(-1)).float().mean() > 0.98, "but for half precision"
        for text in shard.texts:
            if prompt_of(text) != prompt:
                own += 1
                assert text.ids[: len(template.opening)] == template.opening
                assert prompt_of(text)[-len(template.between) :] == template.between
                assert text.first < len(template.opening) + 6 + len(template.between)
            assert 1 <= len(text.ids) - text.first <= OPTIONS.max_new_tokens
    assert own > 0, "the model wrote prompts too"


@pytest.mark.parametrize("own_prompts", [0.0, 0.5])
def test_no_prompt_and_no_greedy_text_stands_on_both_sides(tiny_model: adi.Model, tmp_path: Path, own_prompts: float) -> None:
    """Prompts come round several times, most answers are greedy, and yet no text tested on was trained on."""
    options = replace(OPTIONS, tokens=800, own_prompts=own_prompts)
    paths = generate_dataset([tiny_model], PROMPTS, tmp_path, options)
    train, held = (texts_in(side) for side in paths)
    assert len(train) > 80
    assert 0.02 * len(train) < len(held) < 0.25 * len(train)
    assert not set(map(prompt_of, train)) & set(map(prompt_of, held))
    assert not {text.ids for text in train} & {text.ids for text in held}
    assert all(is_held_out(prompt_of(text)) for text in held)
    assert datastore_of(train).lengths_M.sum() == sum(len(text.ids) - max(0, text.first - 1) for text in train)
    given = [prompt_of(text) for text in (*train, *held) if prompt_of(text) in PROMPTS]
    assert len(given) > len(set(given)), "or there was nothing to keep apart"


def test_the_side_of_a_prompt_is_the_same_for_every_engine_seed_and_length(
    tiny_model: adi.Model, llama: adi.Model, tmp_path: Path
) -> None:
    options = replace(OPTIONS, tokens=500, own_prompts=0.0)
    train, held = generate_dataset([tiny_model, llama], PROMPTS, tmp_path, options)
    assert len({path.parent for path in train}) == 2, "each engine has its share"
    other = generate_dataset([tiny_model], PROMPTS, tmp_path, replace(options, tokens=250, seed=8, max_new_tokens=5))
    assert not {prompt_of(t) for t in texts_in([*train, *other[0]])} & {prompt_of(t) for t in texts_in([*held, *other[1]])}
    for folder in {path.parent for path in train}:
        assert tokens_in(folder.glob("*.safetensors")) < 500, "half of it and a shard at most"


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tiny_model: adi.Model, tmp_path: Path) -> None:
    options = replace(OPTIONS, tokens=200, own_prompts=0.5)
    whole = generated(tiny_model, PROMPTS, tmp_path / "whole", options)

    def stop(done: int, total: int, what: str) -> None:
        assert (total, what) == (200, "generating text, fp32")
        if done > 120:
            raise Stop

    with pytest.raises(Stop):
        generate_shards(tiny_model, PROMPTS, tmp_path / "cut", options, stop)
    groups = len(list((tmp_path / "cut").glob("group-*")))
    assert groups > 0
    (tmp_path / "cut" / f"train-{groups:05d}-9.safetensors").write_text("of a group that was cut short")
    resumed = generated(tiny_model, PROMPTS, tmp_path / "cut", options)
    assert [path.name for path in resumed] == [path.name for path in whole]
    assert [path.read_bytes() for path in resumed] == [path.read_bytes() for path in whole]
    longer = generated(tiny_model, PROMPTS, tmp_path / "cut", replace(options, tokens=300))
    assert set(longer) > set(resumed)
    assert generated(tiny_model, PROMPTS, tmp_path / "cut", options) == longer, "there is nothing left to do"


def greedy_share(model: adi.Model, paths: Sequence[Path]) -> tuple[int, int]:
    """How many answers are the greedy ones, and how many there are."""
    greedy = []
    for text in texts_in(paths):
        answer = adi.generate(model, prompt_of(text), adi.FullDepth(), max_new_tokens=8).token_ids
        greedy.append(answer[: len(text.ids) - text.first - 1] == text.ids[text.first + 1 :])
    return sum(greedy), len(greedy)


def test_most_answers_are_greedy_but_none_twice(tiny_model: adi.Model, tmp_path: Path) -> None:
    once = generated(tiny_model, PROMPTS, tmp_path / "a", replace(OPTIONS, tokens=10**6, own_prompts=0.0, repeat=False))
    greedy, count = greedy_share(tiny_model, once)
    assert count == len(PROMPTS), "all of them once, and then there is no more"
    assert 0.35 * count < greedy < 0.9 * count
    few = PROMPTS[:4]
    again = generated(tiny_model, few, tmp_path / "b", replace(OPTIONS, tokens=250, own_prompts=0.0))
    greedy, count = greedy_share(tiny_model, again)
    assert greedy <= len(few) < count


def test_every_prompt_is_given_before_any_is_given_again(tiny_model: adi.Model, tmp_path: Path) -> None:
    paths = generated(tiny_model, PROMPTS[:8], tmp_path, replace(OPTIONS, tokens=8, max_new_tokens=1, own_prompts=0.0))
    given = [prompt_of(text) for text in texts_in(paths)]
    assert sorted(given) == sorted(PROMPTS[:8])


def test_without_a_template_the_model_needs_prompts(llama: adi.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        generate_shards(llama, [], tmp_path, OPTIONS)
    with pytest.raises(ValueError, match=r"own_prompts is 0.* and there are no prompts"):
        generate_shards(llama, [], tmp_path, replace(OPTIONS, own_prompts=0.0))


def test_a_model_without_a_template_goes_on_with_its_own_first_words(
    tiny_hf: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_WORDS", 5)
    begun = copy.deepcopy(tiny_tokenizer)
    begun.chat_template = None
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    base = adi.load(tiny_hf, tokenizer=begun)
    assert base.tokenizer is not None
    assert base.tokenizer.encode("") == (1,)
    assert share_of_own(base) == module.OWN_WORDS
    prompts, kinds = [(1, 7, 8), (1, 9)], set()
    for text in texts_in(generated(base, prompts, tmp_path, replace(OPTIONS, own_prompts=share_of_own(base)))):
        kinds.add(own := prompt_of(text) not in prompts)
        assert text.ids[0] == 1
        assert not own or len(prompt_of(text)) <= 6
        assert not base.eos_ids & set(prompt_of(text))
    assert kinds == {True, False}


def test_a_model_that_cannot_begin_a_text_is_given_all_prompts(tiny_hf: Any, tiny_tokenizer: Any) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    assert share_of_own(adi.load(tiny_hf, tokenizer=bare)) == 0.0
    assert share_of_own(adi.load(tiny_hf, tokenizer=tiny_tokenizer)) == module.OWN_PROMPTS
