"""Shards and the texts in them: what stands in a shard, which are kept, and what follows from the texts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.decoding.teacher_forcing import KnownText
from adi.exits.heads import shortlist
from adi.model.arrays import normalise
from adi.training.shards import (
    SHARD_TEXTS,
    Teacher,
    choose_shortlist,
    in_halves,
    read_shard,
    soft_cap_of,
    texts_in,
    write_forced_shards,
)
from adi.training.texts import first_of, interleave, is_held_out, windows_of
from families import tiny
from support import Stop


def test_splits_are_stable_and_of_the_right_size() -> None:
    prompts = [(i, 7, i % 3) for i in range(4000)]
    assert 0.05 < sum(map(is_held_out, prompts)) / 4000 < 0.11
    assert all(is_held_out(prompt, 1.0) for prompt in prompts)
    assert not any(is_held_out(prompt, 0.0) for prompt in prompts)
    assert [is_held_out(list(prompt)) for prompt in prompts] == [is_held_out(prompt) for prompt in prompts]


def test_prompt_groups_are_shared_out_evenly() -> None:
    assert interleave([["a", "b", "c"], ["x"], ["a", "y"]]) == ["a", "x", "b", "y", "c"]


def test_text_files_are_cut_into_windows(tiny_model: adi.Model, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox and the lazy dog, 12 plus 30. " * 400)
    windows = windows_of(tiny_model, tmp_path / "book.txt")
    assert tiny_model.tokenizer is not None
    ids = tiny_model.tokenizer.encode((tmp_path / "book.txt").read_text())
    assert windows[1].ids == ids[256:511], "what follows the last token of a window is in no row"
    assert all(window.first == 0 for window in windows)
    assert sum(len(window.ids) for window in first_of(windows, 300)) == 510


def test_a_shard_holds_states_and_the_full_models_output(tiny_model: adi.Model, tmp_path: Path) -> None:
    ids, ids_S = tuple(range(20, 40)), torch.tensor([1, 22, 30, 35])
    texts = [KnownText(ids, 8), KnownText((5, 6), 1)]
    (path,) = write_forced_shards(tiny_model.backbone, texts, tmp_path, (2, 5))
    shard = read_shard(path)
    assert shard.texts == texts == texts_in([path])
    hf: Any = tiny_model.backbone.model  # type: ignore[attr-defined]
    with torch.no_grad():
        out = hf(torch.tensor([ids]), output_hidden_states=True)
    logs = out.logits[0].log_softmax(-1)
    for place, depth in enumerate((2, 5)):
        torch.testing.assert_close(shard.hidden_NED[:20, place].float(), out.hidden_states[depth][0], atol=2e-3, rtol=2e-3)
    assert shard.token_N[:20].tolist() == logs.argmax(-1).tolist()
    assert shard.answer_N.tolist() == [False] * 8 + [True] * 12 + [False, True]
    readout = tiny_model.backbone.readout()
    logs_NS, tail_N = Teacher(readout, shortlist(readout, ids_S)).logs(shard.deep_ND[:20], shard.total_N[:20])
    torch.testing.assert_close(logs_NS, logs[:, ids_S], atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(tail_N.exp(), 1 - logs[:, ids_S].exp().sum(-1), atol=1e-3, rtol=0)


def test_the_teacher_knows_of_soft_caps(tmp_path: Path) -> None:
    """Gemma 2 bends its logits; the plain head over the total would give probabilities above one."""
    loud = copy.deepcopy(tiny("gemma2"))
    with torch.no_grad():
        loud.lm_head.weight *= 20
    gemma2 = adi.load(loud)
    (path,) = write_forced_shards(gemma2.backbone, [KnownText(tuple(range(20, 40)))], tmp_path)
    shard, readout = read_shard(path), gemma2.backbone.readout()
    among = shortlist(readout, torch.arange(gemma2.backbone.spec.vocabulary - 3))
    logits_NV = gemma2.backbone.logits(shard.deep_ND.float())
    plain = Teacher(readout, among)
    teacher = plain.fitted(shard.deep_ND, logits_NV[:, among.ids_S])
    assert teacher.soft_cap == pytest.approx(30, rel=0.01)
    wanted = logits_NV.log_softmax(-1)[:, among.ids_S]
    torch.testing.assert_close(teacher.logs(shard.deep_ND, shard.total_N)[0], wanted, atol=5e-2, rtol=5e-3)
    assert (plain.logs(shard.deep_ND, shard.total_N)[0] - wanted).abs().max() > 10


def test_soft_caps_are_found() -> None:
    assert soft_cap_of(50.0, 30 * float(torch.tensor(50 / 30).tanh())) == pytest.approx(30, rel=1e-3)
    assert soft_cap_of(12.0, 12.01) is None
    assert soft_cap_of(-3.0, -5.0) is None


def test_the_shortlist_is_what_the_model_predicts_most_often(sharp: adi.Model, tmp_path: Path) -> None:
    texts = [KnownText(tuple(range(20 + i, 40 + i)), 8) for i in range(3)]
    paths = write_forced_shards(sharp.backbone, texts, tmp_path)
    shard = read_shard(paths[0])
    counts = torch.bincount(shard.token_N[shard.answer_N], minlength=304)
    chosen = choose_shortlist(paths, 304, 5)
    assert chosen.tolist() == sorted(sorted(range(304), key=lambda token: (-int(counts[token]), token))[:5])
    assert choose_shortlist(paths, 304, 500).tolist() == list(range(304))


def test_finished_shards_are_kept_and_others_deleted(sharp: adi.Model, tmp_path: Path) -> None:
    texts = [KnownText((20 + i % 50, 21, 22 + i % 7, 23), 1) for i in range(2 * SHARD_TEXTS + 5)]

    def stop(done: int, of: int, what: str) -> None:
        assert (of, what) == (len(texts), "reading states")
        if done > SHARD_TEXTS + 3:
            raise Stop

    with pytest.raises(Stop):
        write_forced_shards(sharp.backbone, texts, tmp_path, progress=stop)
    (kept,) = tmp_path.iterdir()
    then = kept.stat().st_mtime_ns
    calls: list[int] = []
    paths = write_forced_shards(sharp.backbone, texts, tmp_path, progress=lambda done, of, what: calls.append(done))
    assert (paths[0], kept.stat().st_mtime_ns) == (kept, then)
    assert calls == sorted(calls)
    assert set(calls) == set(range(SHARD_TEXTS, len(texts) + 1)), "after every text"
    assert sorted(tmp_path.iterdir()) == sorted(paths), "nothing half-written stays"
    assert texts_in(paths) == texts
    for others, depths in (([KnownText(texts[0].ids, 2), *texts[1:]], ()), (texts, (2,)), (texts, (2, 4))):
        again = write_forced_shards(sharp.backbone, others, tmp_path, depths)
        assert not set(again[:1]) & set(paths), "other texts or depths, another shard"
        assert sorted(tmp_path.iterdir()) == sorted(again)
        assert read_shard(again[0]).hidden_NED.shape[1] == len(depths)


def test_a_row_too_large_for_halves_is_scaled_as_a_whole() -> None:
    hidden_TD = torch.tensor([[1.0, -2.0, 3.0], [2e5, 50.0, -1e3]])
    kept_TD = in_halves(hidden_TD)
    assert kept_TD.dtype == torch.float16
    assert torch.equal(kept_TD[0].float(), hidden_TD[0])
    normed = [normalise(rows.float(), "rms", 1e-6) for rows in (kept_TD, hidden_TD)]
    torch.testing.assert_close(*normed, rtol=2e-3, atol=1e-6)
