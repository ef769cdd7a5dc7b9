"""Training of drafters: unrolled steps against a loop, the full model's word, a fit that helps, and runs that resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.decoding.teacher_forcing import KnownText
from adi.drafters.network import Drafter, advance, fresh_drafter, predict
from adi.exits.heads import shortlist
from adi.exits.signals import Prediction
from adi.progress import no_progress
from adi.training.report import judge_drafter
from adi.training.shards import Shard, Teacher, texts_in, write_forced_shards
from adi.training.texts import datastore_of
from adi.training.train_drafter import (
    PROMPT_SHARE,
    DraftOptions,
    DraftText,
    SoftLabels,
    Unrolled,
    as_halves,
    draft_text,
    fit_drafter,
    loss_of,
    opening,
    taken,
    unroll,
)
from adi.training.trainer import PARTS
from adi.training.tune import remeasure, tune
from conftest import random_drafter, random_exits
from support import Stop

PROMPTS = [f"{animal} number {n} jumps over the {n % 7} dogs" for animal in ("fox", "cat", "bird") for n in range(24)]


def own_text(model: adi.Model, prompt: str, length: int) -> KnownText:
    got = adi.generate(model, prompt, adi.FullDepth(), max_new_tokens=length, stop_at_eos=False)
    return KnownText((*got.prompt_ids, *got.token_ids), len(got.prompt_ids) - 1)


@pytest.fixture(scope="module")
def shards(sharp: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards, the last one of fewer texts."""
    texts = [own_text(sharp, prompt, 12) for prompt in PROMPTS[:68]]
    return write_forced_shards(sharp.backbone, texts, tmp_path_factory.mktemp("shards"))


def teacher_of(model: adi.Model, size: int = 64) -> Teacher:
    ids = torch.randperm(model.backbone.spec.vocabulary, generator=torch.Generator().manual_seed(4))[:size]
    readout = model.backbone.readout()
    return Teacher(readout, shortlist(readout, ids.sort().values))


@pytest.fixture
def short(sharp: adi.Model, tmp_path: Path) -> DraftText:
    """Texts of 9, 1, 2 and 5 tokens end to end."""
    ids = [tuple(range(20, 29)), (7,), (8, 9), (30, 31, 30, 31, 32)]
    texts = [KnownText(text, min(2, len(text) - 1)) for text in ids]
    (path,) = write_forced_shards(sharp.backbone, texts, tmp_path / "t")
    return draft_text(path, teacher_of(sharp), sharp.backbone.embed)


def test_unrolled_steps_are_what_a_loop_gives_position_by_position(sharp: adi.Model, short: DraftText) -> None:
    teacher = teacher_of(sharp)
    net = replace(random_drafter(sharp), ids_S=teacher.among.ids_S)
    sequence, count = short.shard.text_N.tolist(), len(short.x_ND)
    wanted: dict[tuple[int, int], torch.Tensor] = {}
    for start in range(count):
        if start == 0 or sequence[start - 1] != sequence[start]:
            continue
        state = short.state_ND[start - 1 : start]
        for step in range(1, 5):
            at = start + step - 1
            if at >= count or sequence[at] != sequence[start]:
                break
            state = advance(net, teacher.readout, short.x_ND[at : at + 1], state)
            wanted[step, start] = state
    got = set()
    for done in unroll(net, teacher, short, torch.arange(count), 4):
        torch.testing.assert_close(done.draft.log_probs_TS, predict(net, teacher.among, done.state_RD).log_probs_TS)
        for row, (start, at) in enumerate(zip(done.start_R.tolist(), done.at_R.tolist(), strict=True)):
            assert at == start + done.step - 1
            got.add((done.step, start))
            torch.testing.assert_close(done.state_RD[row : row + 1], wanted[done.step, start], atol=1e-5, rtol=1e-4)
    assert got == set(wanted)
    assert {start for step, start in got if step == 1} == {*range(1, 9), 11, *range(13, 17)}, "never a text's first token"


def test_texts_do_not_leak_into_each_other(sharp: adi.Model, short: DraftText) -> None:
    teacher = teacher_of(sharp)
    net = replace(random_drafter(sharp), ids_S=teacher.among.ids_S)
    other = short.shard.text_N != 3
    changed = replace(
        short,
        x_ND=torch.where(other[:, None], 9.0, short.x_ND),
        state_ND=torch.where(other[:, None], -3.0, short.state_ND),
    )
    for a, b in zip(*(list(unroll(net, teacher, t, torch.arange(17), 3)) for t in (short, changed)), strict=True):
        last = short.shard.text_N[a.start_R] == 3
        assert last.any()
        assert torch.equal(a.state_RD[last], b.state_RD[last])


def test_tracks_and_the_teacher_are_the_full_models(sharp: adi.Model, short: DraftText) -> None:
    teacher, hf = teacher_of(sharp), sharp.backbone.model  # type: ignore[attr-defined]
    with torch.no_grad():
        parts = [hf(short.shard.ids_N[short.shard.text_N == n].long()[None]).logits[0] for n in range(4)]
    logs_NV = torch.cat(parts).log_softmax(-1)
    inside_RS, rest_R = SoftLabels.of(teacher, short, 0, 17).at(torch.arange(17))
    torch.testing.assert_close(inside_RS.sum(-1) + rest_R, torch.ones(17), atol=1e-4, rtol=0)
    torch.testing.assert_close(inside_RS.log(), logs_NV[:, teacher.among.ids_S], atol=3e-2, rtol=1e-2)
    later = SoftLabels.of(teacher, short, 5, 99).at(torch.tensor([16, 5]))  # as far as the text goes
    for mine, theirs in zip(later, (inside_RS[[16, 5]], rest_R[[16, 5]]), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(short.shard.token_N.long(), logs_NV.argmax(-1))
    assert torch.equal(short.shard.answer_N, torch.tensor([0, 0, *[1] * 7, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool))
    torch.testing.assert_close(short.x_ND, sharp.backbone.embed(short.shard.ids_N.tolist()).hidden_TD)


def test_the_loss_is_least_for_the_full_models_own_word(sharp: adi.Model, short: DraftText) -> None:
    teacher, at = teacher_of(sharp), torch.arange(1, 9)
    labels = SoftLabels.of(teacher, short, 0, 17)
    logs, tail = (part.log() for part in labels.at(at))
    net = replace(random_drafter(sharp), ids_S=teacher.among.ids_S)
    (first,) = unroll(net, teacher, short, at, 1)
    perfect = replace(first, state_RD=short.state_ND[at], draft=Prediction(logs, None, tail))
    entropy = -(logs.exp() * logs).sum(-1) - tail.exp() * tail
    assert float(loss_of(short, labels, perfect)) == pytest.approx(float(entropy.mean()), abs=1e-4)
    second = replace(perfect, step=2)
    assert float(loss_of(short, labels, second)) == pytest.approx(0.8 * float(entropy.mean()), abs=1e-4)
    assert loss_of(short, labels, perfect) < loss_of(short, labels, first)
    nobody = Unrolled(1, at[:0], at[:0], first.state_RD[:0], Prediction(logs[:0], None, tail[:0]))
    assert float(loss_of(short, labels, nobody)) == 0, "a span may hold no position to draft from"


def fitted(model: adi.Model, shards: list[Path], checkpoint: Path, progress: Any = no_progress, **changes: Any) -> Drafter:
    begin = changes.pop("begin", None)
    options = DraftOptions(**{"hidden": 32, "epochs": 4, "positions": 16, "learning_rate": 3e-3, **changes})
    return fit_drafter(teacher_of(model, 200), model.backbone.embed, shards, checkpoint, options, progress, begin=begin)


def losses_of(told: list[tuple[int, str]]) -> list[float]:
    """The mean loss of each shard, as progress gave it."""
    return [float(what.rpartition(" ")[2]) for done, what in told if done % PARTS == 0 and done]


def test_training_helps(sharp: adi.Model, shards: list[Path], tmp_path: Path) -> None:
    teacher, told = teacher_of(sharp, 200), list[tuple[int, str]]()
    net = fitted(sharp, shards, tmp_path / "c.pt", lambda done, of, what: told.append((done, what)))
    losses = losses_of(told)
    assert len(losses) >= 4 * len(shards)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    raw = fresh_drafter(teacher.readout, teacher.among.ids_S, 32, torch.Generator().manual_seed(0))
    trained, untrained = (judge_drafter(as_halves(n), teacher, sharp.backbone.embed, shards) for n in (net, raw))
    assert trained["positions"] == untrained["positions"] > 500
    assert trained["agreement_by_step"][0] > untrained["agreement_by_step"][0] + 0.05
    assert trained["accepted_in_a_row"] > untrained["accepted_in_a_row"]
    assert all(0 <= share <= 1 for share in (*trained["agreement_by_step"], *trained["acceptance"].values()))


def test_a_warm_start_goes_on_from_what_was_learned(sharp: adi.Model, shards: list[Path], tmp_path: Path) -> None:
    before = fitted(sharp, shards, tmp_path / "a.pt")
    warm, cold = list[tuple[int, str]](), list[tuple[int, str]]()
    changes: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-3}
    note = lambda done, of, what: warm.append((done, what))  # noqa: E731
    after = fitted(sharp, shards, tmp_path / "b.pt", note, begin=before, **changes)
    fitted(sharp, shards, tmp_path / "c.pt", lambda done, of, what: cold.append((done, what)), **changes)
    assert losses_of(warm)[0] < 0.9 * losses_of(cold)[0]
    assert not torch.equal(after.mix_DE, before.mix_DE)
    assert not before.mix_DE.requires_grad, "what it began with stays as it was"


def test_the_judges_count_is_that_of_drafting_one_by_one(sharp: adi.Model, shards: list[Path]) -> None:
    teacher = teacher_of(sharp, 200)
    net = fresh_drafter(teacher.readout, teacher.among.ids_S, 32, torch.Generator().manual_seed(0))
    text = draft_text(shards[-1], teacher, sharp.backbone.embed)
    sequence, answer = text.shard.text_N.tolist(), text.shard.answer_N.tolist()
    right, asked = [0] * 5, [0] * 5
    for start in range(1, len(sequence)):
        if sequence[start - 1] != sequence[start] or not answer[start]:
            continue
        state = text.state_ND[start - 1 : start]
        for step in range(5):
            at = start + step
            if at >= len(sequence) or sequence[at] != sequence[start]:
                break
            state = advance(net, teacher.readout, text.x_ND[at : at + 1], state)
            asked[step] += 1
            if int(teacher.among.ids_S[predict(net, teacher.among, state).log_probs_TS.argmax()]) != int(
                text.shard.token_N[at]
            ):
                break
            right[step] += 1
    got = judge_drafter(net, teacher, sharp.backbone.embed, shards[-1:])
    assert got["positions"] == asked[0]
    assert got["agreement_by_step"] == pytest.approx([r / max(1, a) for r, a in zip(right, asked, strict=True)])
    assert got["accepted_in_a_row"] == pytest.approx(sum(right) / asked[0])


@pytest.mark.parametrize("after", [1, 3.4, 4, 5])
def test_an_interrupted_fit_ends_where_an_undisturbed_one_does(
    sharp: adi.Model, shards: list[Path], tmp_path: Path, after: float
) -> None:
    def interrupt(done: int, of: int, what: str) -> None:
        assert of == 2 * len(shards) * PARTS
        if done >= after * PARTS:
            raise Stop

    with pytest.raises(Stop):
        fitted(sharp, shards, tmp_path / "cut.pt", interrupt, epochs=2)
    told: list[int] = []
    resumed = fitted(sharp, shards, tmp_path / "cut.pt", lambda done, of, what: told.append(done), epochs=2)
    whole = fitted(sharp, shards, tmp_path / "whole.pt", epochs=2)
    assert told[0] == int(after) * PARTS, "shards that were finished are not done again"
    assert len(told) > 10, "and within a shard it says where it is"
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name])
        assert not tensor.requires_grad
    assert not whole.shift_D.any(), "an RMS norm has no shift"


def test_tune_gives_a_drafter_to_exits_that_are_kept(sharp: adi.Model, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name / "work").mkdir(parents=True)
        (tmp_path / name / "work" / "drafter.dtype").write_text("float32")
    options = adi.TuneOptions(tokens=900, max_new_tokens=12, shortlist=64, drafter_epochs=2, depths=(2, 4))
    mine = random_exits(sharp, (2, 4), adi.Threshold("entropy", 3.0))
    stages: set[str] = set()
    note = lambda done, total, what: stages.add(what.partition(",")[0])  # noqa: E731
    got = tune(sharp, tmp_path / "a", [PROMPTS], options, keep=mine, made_by={"command": "a test"}, progress=note)
    assert stages == {"generating text", "training the drafter", "judging the drafter"}, "heads are kept"
    assert got.heads == mine.heads
    assert (got.depths, got.trigger) == (mine.depths, mine.trigger)
    assert got.report["note"] == "random"
    assert (got.made_by["command"], got.made_by["drafter"]["command"]) == ("none", "a test")
    saved = adi.load_exits(tmp_path / "a")
    assert saved.drafter is not None
    assert mine.heads is not None
    assert saved.drafter.ids_S.tolist() == mine.heads.ids_S.tolist(), "the shortlist is kept too"
    assert saved.report["drafter"]["positions"] > 0
    full = adi.generate(sharp, "the quick fox", adi.FullDepth(), max_new_tokens=30, stop_at_eos=False)
    assert adi.generate(sharp, "the quick fox", adi.Verified(saved), max_new_tokens=30, stop_at_eos=False).token_ids == (
        full.token_ids
    )

    def interrupt(done: int, total: int, what: str) -> None:
        if done and what.startswith("training the drafter"):
            raise Stop

    with pytest.raises(Stop):
        tune(sharp, tmp_path / "b", [PROMPTS], options, keep=mine, progress=interrupt)
    again = tune(sharp, tmp_path / "b", [PROMPTS], options, keep=mine)
    assert got.drafter is not None
    assert again.drafter is not None
    assert all(torch.equal(t, again.drafter.tensors()[n]) for n, t in got.drafter.tensors().items())
    foreign = replace(mine, base="another model")
    with pytest.raises(ValueError, match="belong to"):
        tune(sharp, tmp_path / "c", [PROMPTS], options, keep=foreign)
    with pytest.raises(ValueError, match="it needs exits that have a drafter"):
        tune(sharp, tmp_path / "b", [PROMPTS], replace(options, warm_start=True), keep=mine)
    again = tune(sharp, tmp_path / "a", [PROMPTS], replace(options, warm_start=True, drafter_epochs=1), keep=saved)
    assert again.drafter is not None
    assert not torch.equal(again.drafter.mix_DE, saved.drafter.tensors()["mix_DE"])
    assert saved.answers is not None
    assert again.answers is not None
    kept = saved.answers.ids_N.tolist()
    assert again.answers.ids_N.tolist()[: len(kept)] == kept < again.answers.ids_N.tolist(), "what was said is still known"
    assert again.made_by["drafter"]["began_with"] == saved.made_by["drafter"]


def test_a_drafter_is_measured_again_on_fresh_text_and_nothing_else_changes(sharp: adi.Model, tmp_path: Path) -> None:
    mine = replace(random_exits(sharp, (2, 4), adi.Threshold("entropy", 3.0)), drafter=random_drafter(sharp))
    mine = replace(mine, report={"note": "kept", "drafter": {"positions": 7, "answer_tokens": 900, "acceptance": {"3": 0.5}}})
    options = adi.TuneOptions(generate_tokens=300, max_new_tokens=8, own_prompts=0.0, seed=5)
    stages: set[str] = set()
    note = lambda done, total, what: stages.add(what.partition(",")[0])  # noqa: E731
    got = remeasure(sharp, tmp_path / "a", [PROMPTS], options, keep=mine, made_by={"command": "again"}, progress=note)
    report = got.report["drafter"]
    assert got.report["note"] == "kept"
    assert report["answer_tokens"] == 900, "what it was trained on"
    assert report["positions"] > 100
    assert report["by_precision"]["fp32"]["positions"] == report["positions"]
    assert got.made_by["measured"]["command"] == "again"
    assert stages == {"generating text", "judging the drafter"}
    assert adi.load_exits(tmp_path / "a").report == got.report
    (folder,) = (tmp_path / "a" / "work").iterdir()
    assert not list(folder.glob("train-*")), "all of it is test text"
    known = datastore_of(texts_in(sorted(folder.glob("held-*"))))
    again = remeasure(sharp, tmp_path / "a", [PROMPTS], options, keep=replace(mine, answers=known))
    assert again.report["drafter"]["positions"] == 0, "training saw all of them"
    for kept, tokens in ((random_exits(sharp, (2, 4), adi.Never()), 300), (mine, 0)):
        with pytest.raises(ValueError, match="measuring again needs exits with a drafter"):
            remeasure(sharp, tmp_path / "b", [], replace(options, generate_tokens=tokens), keep=kept)


def shard_of(ids_N: torch.Tensor, text_N: torch.Tensor, answer_N: torch.Tensor) -> Shard:
    nothing = torch.zeros(len(ids_N))
    return Shard(ids_N, text_N, answer_N, nothing, nothing, nothing, nothing)


def test_what_all_texts_begin_with_is_found() -> None:
    ids = torch.tensor([1, 2, 3, 4, 1, 2, 9, 1, 2, 3])
    shard = shard_of(ids, torch.tensor([0] * 4 + [1] * 3 + [2] * 3), ids > 0)
    assert opening(shard).tolist() == [True, True, False, False, True, True, False, True, True, False]
    assert not opening(shard_of(ids[:4], torch.zeros(4), ids[:4] > 0)).any()


def test_all_of_an_answer_is_learned_from_and_a_share_of_its_prompt() -> None:
    answer_N = torch.arange(4000) >= 3000
    shard = shard_of(torch.arange(4000), torch.zeros(4000), answer_N)
    first, second = (taken(shard, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert first[3000:].all()
    assert abs(first[:3000].float().mean() - PROMPT_SHARE) < 0.03
    assert not torch.equal(first, second), "another share every time"
    ids = torch.tensor([1, 2, 3, 1, 2, 4])
    alike = shard_of(ids, torch.tensor([0] * 3 + [1] * 3), ids > 0)
    assert not (taken(alike, torch.Generator().manual_seed(0)) & opening(alike)).any()
