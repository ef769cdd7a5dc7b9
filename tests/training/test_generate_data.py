"""Texts that a model writes by itself: what is noted of them is what a pass over them gives, and a stopped run goes on."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import adi
from adi.model.backbone import Rows
from adi.training import generate_data as module
from adi.training.answers import is_held_out
from adi.training.dataset import data_from_talk
from adi.training.drafter_shards import DrafterShard, read_drafter_shard
from adi.training.generate_data import GenerateOptions, Template, share_of_own, talk, tokens_in
from adi.training.train_drafter import PROMPT_SHARE, opening, taken

OPTIONS = GenerateOptions(tokens=60, max_new_tokens=8, side_by_side=5, seed=3)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_SEQUENCES", 4)
    monkeypatch.setattr(module, "LONGEST_PROMPT", 6)
    monkeypatch.setattr(module, "HEAD_ROWS", 3)


def both(sides: tuple[list[Path], list[Path]]) -> list[Path]:
    """All shards, those to train on first."""
    return [*sides[0], *sides[1]]


def texts(tracks: DrafterShard) -> list[DrafterShard]:
    counts = tracks.sequence_N.unique_consecutive(return_counts=True)[1].tolist()
    parts = {name: getattr(tracks, name).split(counts) for name in DrafterShard.__dataclass_fields__}
    return [DrafterShard(**{name: part[i] for name, part in parts.items()}) for i in range(len(counts))]


def test_what_is_noted_is_what_a_pass_over_the_text_gives(tiny_model: adi.Model, tmp_path: Path) -> None:
    prompt = list(tiny_model.encode("the fox"))
    backbone = tiny_model.backbone
    paths = both(talk(tiny_model, [prompt], tmp_path, OPTIONS))
    assert OPTIONS.tokens <= tokens_in(paths) < OPTIONS.tokens + 4 * 8
    template, own = Template.of(tiny_model), 0
    for text in [one for path in paths for one in texts(read_drafter_shard(path))]:
        ids = tuple(text.ids_N.tolist())
        (states,) = backbone.forward([Rows(backbone.new_cache(), 0, ids, None)], 0, backbone.spec.layers)
        logits_TV = backbone.logits(states.hidden_TD)
        torch.testing.assert_close(text.deep_ND.float(), states.hidden_TD, atol=2e-2, rtol=2e-3)
        torch.testing.assert_close(text.total_N, logits_TV.logsumexp(-1), atol=1e-4, rtol=0)
        assert torch.equal(text.token_N, logits_TV.argmax(-1).int())
        start = int(text.answer_N.int().argmax()) + 1
        if list(ids[: len(prompt)]) != prompt or start != len(prompt):
            own += 1
            assert ids[: len(template.opening)] == template.opening
            assert ids[start - len(template.between) : start] == template.between
            assert start <= len(template.opening) + 6 + len(template.between)
        assert len(ids) - start < OPTIONS.max_new_tokens
        assert text.answer_N.tolist() == [at >= start - 1 for at in range(len(ids))]
    assert own > 0, "the model wrote prompts too"


def test_a_stopped_talk_goes_on_behind_its_last_shard(tiny_model: adi.Model, tmp_path: Path) -> None:
    first = both(talk(tiny_model, [], tmp_path, OPTIONS))
    kept = [path.read_bytes() for path in first]
    assert both(talk(tiny_model, [], tmp_path, OPTIONS)) == first, "there is nothing left to do"
    (tmp_path / f"train-{len(list(tmp_path.glob('group-*'))):05d}-9.safetensors").write_text("of a group cut short")
    longer = both(talk(tiny_model, [], tmp_path, GenerateOptions(**{**OPTIONS.__dict__, "tokens": 100})))
    assert set(longer) > set(first)
    assert [path.read_bytes() for path in first] == kept
    assert all(path.read_bytes() not in kept for path in set(longer) - set(first)), "other dice than at the beginning"


def test_half_the_answers_or_more_are_greedy(tiny_model: adi.Model, tmp_path: Path) -> None:
    options = GenerateOptions(tokens=250, max_new_tokens=8, side_by_side=5, own_prompts=0.0)
    greedy = total = 0
    for path in both(talk(tiny_model, [[5, 6, 7], [9, 9]], tmp_path, options)):
        for text in texts(read_drafter_shard(path)):
            start = int(text.answer_N.int().argmax()) + 1
            said = text.ids_N[start:]
            total += 1
            greedy += bool((said == text.token_N[start - 1 : -1]).all())
    assert 0.35 * total < greedy < total


@pytest.mark.parametrize("own_prompts", [0.0, 0.5])
def test_no_prompt_and_no_greedy_text_stands_on_both_sides(tiny_model: adi.Model, tmp_path: Path, own_prompts: float) -> None:
    """Prompts come round several times, most answers are greedy, and yet no text tested on was trained on."""
    prompts = [[5, 6, 7 + i] for i in range(40)]
    options = GenerateOptions(tokens=1200, max_new_tokens=8, side_by_side=8, own_prompts=own_prompts)
    data = data_from_talk([tiny_model], prompts, tmp_path, options, lambda *_: None)
    train, held = ([a for p in paths for a in texts_in(p)] for paths in (data.shards, data.checks))
    assert len(train) > 100
    assert 0.02 * len(train) < len(held) < 0.25 * len(train)
    assert not {ids[:start] for ids, start in train} & {ids[:start] for ids, start in held}
    assert not {ids for ids, _ in train} & {ids for ids, _ in held}
    assert all(is_held_out(ids[:start]) for ids, start in held)
    stored = [tuple(part) for part in np.split(data.spoken.ids_N, np.cumsum(data.spoken.lengths_M)[:-1])]
    assert sorted(stored) == sorted(ids[max(0, start - 2) :] for ids, start in train), "the datastore knows no test text"
    given = [ids[:start] for ids, start in (*train, *held) if list(ids[:start]) in prompts]
    assert len(given) > len(set(given)), "or there was nothing to keep apart"


def test_texts_made_with_the_old_split_are_refused(tiny_model: adi.Model, tmp_path: Path) -> None:
    (tmp_path / "talk-0123456789ab").mkdir()
    with pytest.raises(ValueError, match=r"made by an older adi.*delete that folder"):
        data_from_talk([tiny_model], [], tmp_path, OPTIONS, lambda *_: None)


def test_too_few_texts_to_hold_any_out_are_refused(tiny_model: adi.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too little"):
        data_from_talk([tiny_model], [], tmp_path, GenerateOptions(tokens=1, max_new_tokens=8, side_by_side=4), lambda *_: None)


def texts_in(path: Path) -> list[tuple[tuple[int, ...], int]]:
    """Each text of a shard, and where its answer begins."""
    return [(tuple(t.ids_N.tolist()), int(t.answer_N.int().argmax()) + 1) for t in texts(read_drafter_shard(path))]


def test_several_voices_share_the_talking(tiny_model: adi.Model, llama: adi.Model, tmp_path: Path) -> None:
    options = GenerateOptions(tokens=700, max_new_tokens=8, side_by_side=16, own_prompts=0.0)
    lessons = data_from_talk([tiny_model, llama], [[5, 6 + i] for i in range(30)], tmp_path, options, lambda *_: None)
    folders = {path.parent for path in lessons.shards}
    assert len(folders) == 2
    assert {path.parent for path in lessons.checks} == folders
    for folder in folders:
        assert tokens_in(sorted(folder.glob("*.safetensors"))) < 700, "half of it and a shard at most"


def test_without_a_template_the_model_needs_prompts(llama: adi.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        talk(llama, [], tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="own_prompts is 0 and there are no prompts"):
        talk(llama, [], tmp_path, GenerateOptions(tokens=10, own_prompts=0.0))


def test_what_all_texts_begin_with_is_found() -> None:
    ids = torch.tensor([1, 2, 3, 4, 1, 2, 9, 1, 2, 3])
    nothing = torch.zeros(10)
    tracks = DrafterShard(ids, nothing, nothing, nothing, torch.tensor([0] * 4 + [1] * 3 + [2] * 3), nothing)
    assert opening(tracks).tolist() == [True, True, False, False, True, True, False, True, True, False]
    alone = DrafterShard(ids[:4], nothing, nothing, nothing, torch.zeros(4), nothing)
    assert not opening(alone).any()


def test_all_of_an_answer_is_learned_from_and_a_share_of_its_prompt() -> None:
    count, nothing = 4000, torch.zeros(4000)
    answer_N = torch.arange(count) >= 3000
    tracks = DrafterShard(torch.arange(count), nothing, nothing, nothing, torch.zeros(count), answer_N)
    first, second = (taken(tracks, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert first[3000:].all()
    assert abs(first[:3000].float().mean() - PROMPT_SHARE) < 0.03
    assert not torch.equal(first, second), "another share every time"
    assert not (taken(two_alike(), torch.Generator().manual_seed(0)) & opening(two_alike())).any()


def two_alike() -> DrafterShard:
    """Two texts that begin alike, all of them answers."""
    nothing = torch.zeros(6)
    return DrafterShard(
        torch.tensor([1, 2, 3, 1, 2, 4]), nothing, nothing, nothing, torch.tensor([0] * 3 + [1] * 3), nothing == 0
    )


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
    wanted = dataclasses.replace(OPTIONS, own_prompts=share_of_own(base))
    prompts = [[1, 7, 8], [1, 9]]
    starts = set()
    for text in [one for path in both(talk(base, prompts, tmp_path, wanted)) for one in texts(read_drafter_shard(path))]:
        ids, start = text.ids_N.tolist(), int(text.answer_N.int().argmax()) + 1
        own = ids[:start] not in prompts
        starts.add(own)
        assert ids[0] == 1
        assert start <= 7 if own else start == len(ids[:start])
        assert not base.eos_ids & set(ids[:start])
    assert starts == {True, False}


def test_a_model_that_cannot_begin_a_text_is_given_all_prompts(tiny_hf: Any, tiny_tokenizer: Any) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    assert share_of_own(adi.load(tiny_hf, tokenizer=bare)) == 0.0
    assert share_of_own(adi.load(tiny_hf, tokenizer=tiny_tokenizer)) == module.OWN_PROMPTS


def test_every_prompt_is_given_before_any_is_given_again(tiny_model: adi.Model, tmp_path: Path) -> None:
    prompts = [[5, 6, 7 + i] for i in range(6)]
    options = GenerateOptions(tokens=1, max_new_tokens=1, side_by_side=6, own_prompts=0.0)
    paths = both(talk(tiny_model, prompts, tmp_path, options))
    given = [tuple(text.ids_N.tolist()[:3]) for path in paths for text in texts(read_drafter_shard(path))]
    assert len(set(given)) == len(given) >= 4
