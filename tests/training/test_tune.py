"""Training on a tiny model: answers, features, heads; interruptions lose nothing; agreement rises."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.exits.heads import merged
from adi.model.arrays import normalise
from adi.training import answers as answers_module
from adi.training import generate_data as talk_module
from adi.training.answers import Answer, collect, interleave, is_greedy, is_held_out, read_answers
from adi.training.report import loosest_threshold
from adi.training.shards import choose_shortlist, in_halves, read_shard, write_shards
from adi.training.tune import TuneOptions, tune

PROMPTS = [f"{animal} number {n} jumps over the {n % 7} dogs" for animal in ("fox", "cat", "bird") for n in range(24)]
OPTIONS = adi.TuneOptions(depths=(2, 4, 5), tokens=900, max_new_tokens=24, shortlist=64, rank=8, epochs=12, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tuned(sharp: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[adi.Exits, Path]:
    out = tmp_path_factory.mktemp("tuned")
    return tune(sharp, out, [PROMPTS], OPTIONS, made_by={"command": "a test"}), out


def test_trained_heads_beat_the_bare_head_on_held_out_text(tuned: tuple[adi.Exits, Path]) -> None:
    rows = tuned[0].report["depths"]
    assert all(row["agreement"] > row["bare_agreement"] for row in rows), rows
    assert sum(row["agreement"] - row["bare_agreement"] for row in rows) > 0.1 * len(rows), rows


def test_training_is_what_helps_and_not_the_shortlist(sharp: adi.Model, tuned: tuple[adi.Exits, Path], tmp_path: Path) -> None:
    """The same shortlist under adapters that were hardly trained agrees less, and diverges more."""
    brief = tune(sharp, tmp_path, [PROMPTS], adi.TuneOptions(**{**OPTIONS.__dict__, "epochs": 1, "learning_rate": 1e-9}))
    for long, short in zip(tuned[0].report["depths"], brief.report["depths"], strict=True):
        assert long["divergence"] < 0.8 * short["divergence"]
    total = [sum(row["agreement"] for row in e.report["depths"]) for e in (tuned[0], brief)]
    assert total[0] > total[1] + 0.1


def test_tuned_exits_are_saved_and_verified_output_stays_exact(sharp: adi.Model, tuned: tuple[adi.Exits, Path]) -> None:
    exits = adi.load_exits(tuned[1])
    assert exits.made_by["command"] == "a test"
    assert exits.made_by["options"]["seed"] == 0
    full = adi.generate(sharp, "the quick fox", adi.FullDepth(), max_new_tokens=40, stop_at_eos=False)
    for trigger in (None, adi.Threshold("top_probability", 0.0)):
        got = adi.generate(sharp, "the quick fox", adi.Verified(exits, trigger), max_new_tokens=40, stop_at_eos=False)
        assert got.token_ids == full.token_ids
    assert got.counters.accepted > 0


class Stop(Exception):  # noqa: N818
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("stage", ["answers", "features", "heads"])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    tiny_model: adi.Model, tuned: tuple[adi.Exits, Path], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "_matmul_seconds", lambda device, dtype: 1.0)
    calls: list[str] = []

    def interrupt(at: str, done: int, total: int, note: str) -> None:
        calls.append(at)
        if at == stage and calls.count(at) == 2:
            raise Stop

    quick = adi.TuneOptions(**{**OPTIONS.__dict__, "epochs": 2})
    with pytest.raises(Stop):
        tune(tiny_model, tmp_path / "a", [PROMPTS], quick, progress=interrupt)
    kept = len(read_answers(tmp_path / "a" / "work" / "answers.jsonl"))
    assert kept > 0
    assert not (tmp_path / "a" / "exits.json").exists()
    resumed = tune(tiny_model, tmp_path / "a", [PROMPTS], quick)
    whole = tune(tiny_model, tmp_path / "b", [PROMPTS], quick)
    assert resumed.report == whole.report
    assert resumed.heads is not None
    assert whole.heads is not None
    for depth in quick.depths or ():
        for name, tensor in resumed.heads.adapters[depth].tensors().items():
            assert torch.equal(tensor, whole.heads.adapters[depth].tensors()[name])


def _collect(model: adi.Model, path: Path, tokens: int = 10**6, **more: Any) -> list[Answer]:
    hf: Any = model.backbone.model  # type: ignore[attr-defined]
    encode = lambda text: list(model.encode(text))  # noqa: E731
    return collect(hf, encode, model.eos_ids, MANY, path, tokens=tokens, max_new_tokens=6, batch=4, **more)


MANY = [f"{animal} number {n} jumps" for animal in ("fox", "cat", "bird", "dog") for n in range(40)]


def test_answers_resumed_are_the_answers_of_one_sitting(tiny_model: adi.Model, tmp_path: Path) -> None:
    whole = _collect(tiny_model, tmp_path / "whole")
    assert len(whole) == len(MANY)
    assert any(not a.greedy for a in whole)
    for after in (2, 9, 21):
        told: list[int] = []

        def stop(done: int, total: int, told: list[int] = told, after: int = after) -> None:
            told.append(done)
            if len(told) == after:
                raise Stop

        path = tmp_path / f"cut{after}"
        with pytest.raises(Stop):
            _collect(tiny_model, path, progress=stop)
        path.write_bytes(path.read_bytes()[:-7])  # and the last line was cut as well
        assert _collect(tiny_model, path) == whole
    budget = sum(a.tokens for a in whole) // 3
    some = _collect(tiny_model, tmp_path / "whole", tokens=budget)
    assert budget <= sum(a.tokens for a in some) < budget + 4 * 6


def test_answering_leaves_the_callers_dice_alone(tiny_model: adi.Model, tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    _collect(tiny_model, tmp_path / "a", tokens=100)
    assert torch.equal(torch.rand(3), wanted)


def test_a_used_folder_trains_on_what_was_asked(
    sharp: adi.Model, tiny_model: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "_matmul_seconds", lambda device, dtype: 1.0)
    quick = adi.TuneOptions(depths=(3,), tokens=10**6, max_new_tokens=8, shortlist=40, rank=4, epochs=1)
    used = tmp_path / "used"
    first = tune(sharp, used, [PROMPTS[:40]], quick)
    other = tune(sharp, used, [PROMPTS[20:]], quick)
    assert other.made_by["answers"] != first.made_by["answers"], "other prompts, other answers"
    again, fresh = (tune(tiny_model, folder, [PROMPTS[20:]], quick) for folder in (used, tmp_path / "fresh"))
    assert again.made_by["answers"] == fresh.made_by["answers"], "another model answers for itself"
    assert again.heads is not None
    assert fresh.heads is not None
    assert torch.equal(again.heads.adapters[3].up_DR, fresh.heads.adapters[3].up_DR)


def test_a_trained_head_merges_into_an_ordinary_checkpoint(sharp: adi.Model, tuned: tuple[adi.Exits, Path]) -> None:
    heads = tuned[0].heads
    assert heads is not None
    adapter = heads.adapters[4]
    assert not adapter.shift_D.any(), "an RMS norm has no shift to put it in"
    assert adapter.up_DR.any()
    early = copy.deepcopy(sharp.backbone.model)  # type: ignore[attr-defined]
    early.model.layers = early.model.layers[:4]
    early.config.num_hidden_layers = 4
    with torch.no_grad():
        early.model.norm.weight.copy_(adapter.gain_D)
        early.lm_head.weight.copy_(merged(adapter, sharp.backbone.readout()))
        ids = torch.tensor([sharp.encode("the quick fox")])
        logits = early(ids).logits[0]
        hidden_TD = sharp.backbone.model(ids, output_hidden_states=True).hidden_states[4][0]  # type: ignore[attr-defined]
    said = tuned[0].reader(sharp.backbone)(4, hidden_TD)
    difference = said.log_probs_TS - logits[:, heads.ids_S]
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-3, rtol=0)


def test_a_cut_last_line_of_answers_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    line = json.dumps(
        {"prompt": "a\u2028b", "ids": [1, 2, 3], "start": 1, "greedy": True, "held_out": False}, ensure_ascii=False
    )
    path.write_text(f"{line}\n{line}\n{line[:20]}")
    assert read_answers(path) == [Answer("a\u2028b", (1, 2, 3), 1, True, False)] * 2
    assert read_answers(tmp_path / "none.jsonl") == []


def test_answers_are_the_models_own_greedy_text(tiny_model: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_matmul_seconds", lambda device, dtype: 1.0)
    greedy = [p for p in PROMPTS if is_greedy(p)][:6]
    hf: Any = tiny_model.backbone.model  # type: ignore[attr-defined]
    got = collect(
        hf, lambda p: list(tiny_model.encode(p)), tiny_model.eos_ids, greedy, tmp_path / "a", tokens=10**6, max_new_tokens=10
    )
    for answer in got:
        assert (
            answer.ids[answer.start :] == adi.generate(tiny_model, answer.prompt, adi.FullDepth(), max_new_tokens=10).token_ids
        )


def test_splits_are_stable_and_of_the_right_size() -> None:
    prompts = [f"prompt {i}" for i in range(4000)]
    assert 0.05 < sum(map(is_held_out, prompts)) / 4000 < 0.11
    assert all(is_greedy(p) for p in prompts if is_held_out(p))
    assert 0.4 < sum(map(is_greedy, prompts)) / 4000 < 0.7


def test_prompt_groups_are_shared_out_evenly() -> None:
    assert interleave([["a", "b", "c"], ["x"], ["a", "y"]]) == ["a", "x", "b", "y", "c"]


def test_the_shortlist_is_what_is_said_most_often() -> None:
    said = [Answer("p", (9, 9, 5, 5, 5, 7), 2, True, False), Answer("q", (1, 8, 8, 8, 8), 1, True, True)]
    assert choose_shortlist(said, 10, 2).tolist() == [5, 7], "prompts and held-out answers do not count"
    assert choose_shortlist(said, 10, 5).tolist() == [0, 1, 2, 5, 7]
    assert len(choose_shortlist(said, 10, 50)) == 10


def test_features_are_states_and_the_full_models_word(tiny_model: adi.Model, tmp_path: Path) -> None:
    ids, ids_S = tuple(range(20, 40)), torch.tensor([1, 22, 30, 35])
    answer = Answer("p", ids, 8, True, False)
    (path,) = write_shards(tiny_model.backbone, [answer], (2, 5), ids_S, tmp_path, lambda d, t: None)
    shard = read_shard(path)
    hf: Any = tiny_model.backbone.model  # type: ignore[attr-defined]
    with torch.no_grad():
        out = hf(torch.tensor([ids]), output_hidden_states=True)
    logs = out.logits[0, 7:-1].log_softmax(-1)
    torch.testing.assert_close(shard.hidden_NED[:, 0].float(), out.hidden_states[2][0, 7:-1], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(shard.hidden_NED[:, 1].float(), out.hidden_states[5][0, 7:-1], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(shard.teacher_NS.float(), logs[:, ids_S], atol=5e-3, rtol=2e-3)
    torch.testing.assert_close(shard.tail_N.exp(), 1 - logs[:, ids_S].exp().sum(-1))
    assert shard.token_N.tolist() == logs.argmax(-1).tolist()


def test_shards_of_other_settings_are_not_reused(tiny_model: adi.Model, tmp_path: Path) -> None:
    answer = Answer("p", tuple(range(20, 40)), 8, True, False)
    for depths, size in (((2, 5), 4), ((2,), 4), ((2,), 6)):
        (path,) = write_shards(tiny_model.backbone, [answer], depths, torch.arange(size), tmp_path, lambda d, t: None)
        shard = read_shard(path)
        assert shard.hidden_NED.shape[1] == len(depths)
        assert shard.teacher_NS.shape[1] == size


def test_text_files_are_cut_into_windows(tiny_model: adi.Model, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("the quick brown fox and the lazy dog, 12 plus 30. " * 400)
    exits = tune(tiny_model, tmp_path / "out", [], adi.TuneOptions(depths=(3,), shortlist=40, rank=4, epochs=1), texts=[text])
    assert exits.report["training_tokens"] > 3000


def test_the_loosest_threshold_keeps_its_promise() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(4000, generator=generator) * 3
    right = torch.rand(4000, generator=generator) < (1 - entropy / 3)
    threshold = loosest_threshold(entropy, right, 4000, 0.85)
    assert threshold is not None
    fired = entropy <= threshold + 1e-4
    assert right[fired].float().mean() >= 0.849
    assert loosest_threshold(entropy, torch.zeros(4000, dtype=torch.bool), 4000, 0.85) is None
    assert loosest_threshold(entropy[:20], torch.ones(20, dtype=torch.bool), 4000) is None, "too rare to look for"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depths": (2, 6)}, "6 layers"),
        ({"depths": (2, 2)}, "not possible"),
        ({"tokens": 0}, "tokens is 0"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny_model: adi.Model, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        tune(tiny_model, tmp_path, [PROMPTS], adi.TuneOptions(**{**OPTIONS.__dict__, **changes}))


def test_too_few_prompts_are_refused_before_any_work(tiny_model: adi.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        tune(tiny_model, tmp_path / "a", [["one prompt"]], OPTIONS, progress=lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="groups"):
        tune(tiny_model, tmp_path / "a", PROMPTS, OPTIONS)
    assert not (tmp_path / "a").exists()


def test_a_row_too_large_for_halves_is_scaled_as_a_whole() -> None:
    hidden_TD = torch.tensor([[1.0, -2.0, 3.0], [2e5, 50.0, -1e3]])
    kept_TD = in_halves(hidden_TD)
    assert kept_TD.dtype == torch.float16
    assert torch.equal(kept_TD[0].float(), hidden_TD[0])
    normed = [normalise(rows.float(), "rms", 1e-6) for rows in (kept_TD, hidden_TD)]
    torch.testing.assert_close(*normed, rtol=2e-3, atol=1e-6)


def test_with_talk_heads_and_drafter_learn_from_it_and_nothing_is_answered(
    tiny_model: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk_module, "SHARD_SEQUENCES", 8)
    options = TuneOptions(
        depths=(2, 4), tokens=100, talk_tokens=300, max_new_tokens=8, shortlist=64, rank=4, epochs=1, drafter_epochs=1
    )
    exits = tune(tiny_model, tmp_path, [[f"the fox {i}" for i in range(40)]], options)
    assert not (tmp_path / "work" / "answers.jsonl").exists()
    assert exits.heads is not None
    assert exits.drafter is not None
    assert 100 <= exits.report["training_tokens"] < 110, "the heads are shown the first texts only"
    assert 200 < exits.report["drafter"]["answer_tokens"] < 400
    assert exits.report["held_out"]["rows"] > 0
