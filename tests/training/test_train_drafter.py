"""Training of drafters: unrolled steps against a loop, the full model's word, a fit that helps, and runs that resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.drafters.datastore import Datastore
from adi.drafters.network import Drafter, advance, fresh_drafter, predict
from adi.exits.heads import Shortlist, shortlist
from adi.exits.signals import Prediction
from adi.training import answers as answers_module
from adi.training import drafter_shards as tracks_module
from adi.training import tune as tune_module
from adi.training.answers import Answer
from adi.training.dataset import said_in
from adi.training.drafter_shards import MOST_POSITIONS, read_drafter_shard, write_drafter_shards
from adi.training.train_drafter import (
    DraftOptions,
    Teacher,
    Text,
    Unrolled,
    as_halves,
    fit_drafter,
    judge,
    loss_of,
    read_text,
    unroll,
)
from adi.training.tune import judge_drafter, tune
from conftest import random_drafter, random_exits
from support import embedding

QUIET: Any = lambda *_: None  # noqa: E731
PROMPTS = [f"{animal} number {n} jumps over the {n % 7} dogs" for animal in ("fox", "cat", "bird") for n in range(24)]


class Stop(Exception):  # noqa: N818
    """Stands for Ctrl-C."""


def own_text(model: adi.Model, prompt: str, length: int) -> Answer:
    got = adi.generate(model, prompt, adi.FullDepth(), max_new_tokens=length, stop_at_eos=False)
    return Answer(prompt, (*got.prompt_ids, *got.token_ids), len(got.prompt_ids), True, False)


@pytest.fixture(scope="module")
def shards(sharp: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards of 24 texts, the last one smaller."""
    texts = [own_text(sharp, prompt, 12) for prompt in PROMPTS[:60]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracks_module, "SHARD_SEQUENCES", 24)
        return write_drafter_shards(sharp.backbone, texts, tmp_path_factory.mktemp("tracks"), QUIET)


def among_of(model: adi.Model, size: int = 64) -> Shortlist:
    ids = torch.randperm(model.backbone.spec.vocabulary, generator=torch.Generator().manual_seed(4))[:size]
    return shortlist(model.backbone.readout(), ids.sort().values)


@pytest.fixture
def short(sharp: adi.Model, tmp_path: Path) -> Text:
    """Texts of 9, 1, 2 and 5 tokens end to end."""
    ids = [tuple(range(20, 29)), (7,), (8, 9), (30, 31, 30, 31, 32)]
    answers = [Answer("p", text, min(3, len(text)), True, False) for text in ids]
    (path,) = write_drafter_shards(sharp.backbone, answers, tmp_path / "t", QUIET)
    return read_text(path, sharp.backbone.readout(), embedding(sharp))


def test_unrolled_steps_are_what_a_loop_gives_position_by_position(sharp: adi.Model, short: Text) -> None:
    readout, among = sharp.backbone.readout(), among_of(sharp)
    net = replace(random_drafter(sharp), ids_S=among.ids_S)
    sequence, count = short.tracks.sequence_N.tolist(), len(short.x_ND)
    wanted: dict[tuple[int, int], torch.Tensor] = {}
    for start in range(count):
        if start == 0 or sequence[start - 1] != sequence[start]:
            continue
        state = short.state_ND[start - 1 : start]
        for step in range(1, 5):
            at = start + step - 1
            if at >= count or sequence[at] != sequence[start]:
                break
            state = advance(net, readout, short.x_ND[at : at + 1], state)
            wanted[step, start] = state
    got = set()
    for done in unroll(net, readout, among, short, torch.arange(count), 4):
        said = predict(net, among, done.state_RD)
        torch.testing.assert_close(done.said.log_probs_TS, said.log_probs_TS)
        for row, (start, at) in enumerate(zip(done.start_R.tolist(), done.at_R.tolist(), strict=True)):
            assert at == start + done.step - 1
            got.add((done.step, start))
            torch.testing.assert_close(done.state_RD[row : row + 1], wanted[done.step, start], atol=1e-5, rtol=1e-4)
    assert got == set(wanted)
    assert {start for step, start in got if step == 1} == {*range(1, 9), 11, *range(13, 17)}, "never a text's first token"


def test_texts_do_not_leak_into_each_other(sharp: adi.Model, short: Text) -> None:
    readout, among = sharp.backbone.readout(), among_of(sharp)
    net = replace(random_drafter(sharp), ids_S=among.ids_S)
    other = short.tracks.sequence_N != 3
    changed = replace(
        short,
        x_ND=torch.where(other[:, None], 9.0, short.x_ND),
        state_ND=torch.where(other[:, None], -3.0, short.state_ND),
    )
    for a, b in zip(*(list(unroll(net, readout, among, t, torch.arange(17), 3)) for t in (short, changed)), strict=True):
        last = short.tracks.sequence_N[a.start_R] == 3
        assert last.any()
        assert torch.equal(a.state_RD[last], b.state_RD[last])


def test_tracks_and_the_teacher_are_the_full_models(sharp: adi.Model, short: Text) -> None:
    among, hf = among_of(sharp), sharp.backbone.model  # type: ignore[attr-defined]
    with torch.no_grad():
        parts = [hf(short.tracks.ids_N[short.tracks.sequence_N == n].long()[None]).logits[0] for n in range(4)]
    logs_NV = torch.cat(parts).log_softmax(-1)
    inside_RS, rest_R = Teacher.of(among, short, 0, 17).at(torch.arange(17))
    torch.testing.assert_close(inside_RS.sum(-1) + rest_R, torch.ones(17), atol=1e-4, rtol=0)
    torch.testing.assert_close(inside_RS.log(), logs_NV[:, among.ids_S], atol=3e-2, rtol=1e-2)
    later = Teacher.of(among, short, 5, 99).at(torch.tensor([16, 5]))  # as far as the text goes
    for mine, theirs in zip(later, (inside_RS[[16, 5]], rest_R[[16, 5]]), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(short.tracks.token_N.long(), logs_NV.argmax(-1))
    assert torch.equal(short.tracks.answer_N, torch.tensor([0, 0, *[1] * 7, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool))
    torch.testing.assert_close(short.x_ND, embedding(sharp)(short.tracks.ids_N.tolist()))


def test_the_loss_is_least_for_the_full_models_own_word(sharp: adi.Model, short: Text) -> None:
    among, at = among_of(sharp), torch.arange(1, 9)
    teacher = Teacher.of(among, short, 0, 17)
    logs, tail = (part.log() for part in teacher.at(at))
    net = replace(random_drafter(sharp), ids_S=among.ids_S)
    (first,) = unroll(net, sharp.backbone.readout(), among, short, at, 1)
    perfect = replace(first, state_RD=short.state_ND[at], said=Prediction(logs, first.said.ids_S, tail, first.said.tail_size))
    entropy = -(logs.exp() * logs).sum(-1) - tail.exp() * tail
    assert float(loss_of(short, teacher, perfect)) == pytest.approx(float(entropy.mean()), abs=1e-4)
    second = replace(perfect, step=2)
    assert float(loss_of(short, teacher, second)) == pytest.approx(0.8 * float(entropy.mean()), abs=1e-4)
    assert loss_of(short, teacher, perfect) < loss_of(short, teacher, first)
    nobody = Unrolled(
        1, at[:0], at[:0], first.state_RD[:0], Prediction(logs[:0], first.said.ids_S, tail[:0], first.said.tail_size)
    )
    assert float(loss_of(short, teacher, nobody)) == 0, "a span may hold no position to draft from"


def fitted(model: adi.Model, shards: list[Path], checkpoint: Path, progress: Any = QUIET, **changes: Any) -> Drafter:
    options = DraftOptions(**{"hidden": 32, "epochs": 4, "positions": 16, "learning_rate": 3e-3, **changes})
    readout = model.backbone.readout()
    return fit_drafter(readout, among_of(model, 200), embedding(model), shards, checkpoint, options, progress)


def test_training_helps(sharp: adi.Model, shards: list[Path], tmp_path: Path) -> None:
    readout, among, losses = sharp.backbone.readout(), among_of(sharp, 200), list[float]()
    net = fitted(sharp, shards, tmp_path / "c.pt", lambda done, of, loss: losses.append(loss))
    assert len(losses) == 4 * len(shards)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    raw = fresh_drafter(readout, among.ids_S, 32, torch.Generator().manual_seed(0))
    trained, untrained = (judge(as_halves(n), readout, among, embedding(sharp), shards) for n in (net, raw))
    assert trained["positions"] == untrained["positions"] > 500
    assert trained["agreement_by_step"][0] > untrained["agreement_by_step"][0] + 0.05
    assert trained["accepted_in_a_row"] > untrained["accepted_in_a_row"]
    assert all(0 <= share <= 1 for share in (*trained["agreement_by_step"], *trained["acceptance"].values()))


def test_a_warm_start_goes_on_from_what_was_learned(sharp: adi.Model, shards: list[Path], tmp_path: Path) -> None:
    readout, among = sharp.backbone.readout(), among_of(sharp, 200)
    before = fitted(sharp, shards, tmp_path / "a.pt")
    first, cold = list[float](), list[float]()
    options = DraftOptions(hidden=32, epochs=1, positions=16, learning_rate=1e-3)
    embed = embedding(sharp)
    after = fit_drafter(
        readout, among, embed, shards, tmp_path / "b.pt", options, lambda d, t, loss: first.append(loss), None, before
    )
    fit_drafter(readout, among, embed, shards, tmp_path / "c.pt", options, lambda d, t, loss: cold.append(loss))
    assert first[0] < 0.9 * cold[0]
    assert not torch.equal(after.mix_DE, before.mix_DE)
    assert not before.mix_DE.requires_grad, "what it began with stays as it was"


def test_the_judges_count_is_that_of_drafting_one_by_one(sharp: adi.Model, shards: list[Path]) -> None:
    readout, among = sharp.backbone.readout(), among_of(sharp, 200)
    net = fresh_drafter(readout, among.ids_S, 32, torch.Generator().manual_seed(0))
    text = read_text(shards[-1], readout, embedding(sharp))
    sequence, answer = text.tracks.sequence_N.tolist(), text.tracks.answer_N.tolist()
    right, asked = [0] * 5, [0] * 5
    for start in range(1, len(sequence)):
        if sequence[start - 1] != sequence[start] or not answer[start]:
            continue
        state = text.state_ND[start - 1 : start]
        for step in range(5):
            at = start + step
            if at >= len(sequence) or sequence[at] != sequence[start]:
                break
            state = advance(net, readout, text.x_ND[at : at + 1], state)
            asked[step] += 1
            if int(among.ids_S[predict(net, among, state).log_probs_TS.argmax()]) != int(text.tracks.token_N[at]):
                break
            right[step] += 1
    got = judge(net, readout, among, embedding(sharp), shards[-1:])
    assert got["positions"] == asked[0]
    assert got["agreement_by_step"] == pytest.approx([r / max(1, a) for r, a in zip(right, asked, strict=True)])
    assert got["accepted_in_a_row"] == pytest.approx(sum(right) / asked[0])


@pytest.mark.parametrize("after", [1, 4, 5])
def test_an_interrupted_fit_ends_where_an_undisturbed_one_does(
    sharp: adi.Model, shards: list[Path], tmp_path: Path, after: int
) -> None:
    def interrupt(done: int, of: int, loss: float) -> None:
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        fitted(sharp, shards, tmp_path / "cut.pt", interrupt, epochs=2)
    told: list[int] = []
    resumed = fitted(sharp, shards, tmp_path / "cut.pt", lambda done, of, loss: told.append(done), epochs=2)
    whole = fitted(sharp, shards, tmp_path / "whole.pt", epochs=2)
    assert told == list(range(after + 1, 2 * len(shards) + 1))
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name])
        assert not tensor.requires_grad
    assert not whole.shift_D.any(), "an RMS norm has no shift"


def test_finished_shards_are_kept(sharp: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Answer("p", (20 + i % 50, 21, 22 + i % 7, 23), 2, True, False) for i in range(150)]
    forward, passes = sharp.backbone.forward, list[int]()

    def counted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        passes.append(1)
        return forward(rows, lo, hi, **options)

    def stop(done: int, of: int) -> None:
        assert of == 150
        if done == 128:
            raise Stop

    monkeypatch.setattr(sharp.backbone, "forward", counted)
    with pytest.raises(Stop):
        write_drafter_shards(sharp.backbone, texts, tmp_path, stop)
    assert len(passes) == 128
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    told: list[int] = []
    paths = write_drafter_shards(sharp.backbone, texts, tmp_path, lambda done, of: told.append(done))
    assert (len(passes), told, len(paths)) == (150, [64, 128, 150], 3)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert sorted(tmp_path.iterdir()) == sorted(paths), "nothing half-written stays"
    assert read_drafter_shard(paths[2]).ids_N.tolist() == [i for a in texts[128:] for i in a.ids]
    other = write_drafter_shards(sharp.backbone, [replace(texts[0], start=1), *texts[1:64]], tmp_path, QUIET)
    assert other[0] not in paths, "other texts, another shard"


def test_long_texts_are_cut(tiny_hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks_module, "MOST_POSITIONS", 50)
    (path,) = write_drafter_shards(adi.load(tiny_hf).backbone, [Answer("p", (5,) * 90, 4, True, False)], tmp_path, QUIET)
    assert len(read_drafter_shard(path).ids_N) == 50 < MOST_POSITIONS


def test_tune_gives_a_drafter_to_exits_that_are_kept(sharp: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_matmul_seconds", lambda device, dtype: 1.0)
    options = adi.TuneOptions(tokens=900, max_new_tokens=12, shortlist=64, drafter_epochs=2, depths=(2, 4))
    mine = random_exits(sharp, (2, 4), adi.Threshold("entropy", 3.0))
    monkeypatch.setattr(tune_module, "_heads", lambda *_: pytest.fail("heads are kept"))
    got = tune(sharp, tmp_path / "a", [PROMPTS], options, keep=mine, made_by={"command": "a test"})
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

    def interrupt(stage: str, done: int, total: int, note: str) -> None:
        if stage == "drafter":
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
    with pytest.raises(ValueError, match="warm start needs"):
        tune(sharp, tmp_path / "b", [PROMPTS], replace(options, warm_start=True), keep=mine)
    again = tune(sharp, tmp_path / "a", [PROMPTS], replace(options, warm_start=True, drafter_epochs=1), keep=saved)
    assert again.drafter is not None
    assert not torch.equal(again.drafter.mix_DE, saved.drafter.tensors()["mix_DE"])
    assert saved.answers is not None
    assert again.answers is not None
    kept = saved.answers.ids_N.tolist()
    assert again.answers.ids_N.tolist()[: len(kept)] == kept < again.answers.ids_N.tolist(), "what was said is still known"
    assert again.made_by["drafter"]["began_with"] == saved.made_by["drafter"]


def test_a_drafter_is_judged_again_on_fresh_text_and_nothing_else_changes(sharp: adi.Model, tmp_path: Path) -> None:
    mine = replace(random_exits(sharp, (2, 4), adi.Threshold("entropy", 3.0)), drafter=random_drafter(sharp))
    mine = replace(mine, report={"note": "kept", "drafter": {"positions": 7, "answer_tokens": 900, "acceptance": {"3": 0.5}}})
    options = adi.TuneOptions(talk_tokens=300, max_new_tokens=8, seed=5)
    stages: set[str] = set()
    note = lambda stage, done, total, text: stages.add(stage)  # noqa: E731
    got = judge_drafter(sharp, tmp_path / "a", [], options, keep=mine, made_by={"command": "judge"}, progress=note)
    report = got.report["drafter"]
    assert got.report["note"] == "kept"
    assert report["answer_tokens"] == 900, "what it was trained on"
    assert report["positions"] > 100
    assert report["by_precision"]["fp32"]["positions"] == report["positions"]
    assert got.made_by["judged"]["command"] == "judge"
    assert stages == {"talk", "judge"}
    assert adi.load_exits(tmp_path / "a").report == got.report
    (folder,) = (tmp_path / "a" / "work").iterdir()
    assert not list(folder.glob("train-*")), "all of it is test text"
    known = Datastore.of([a.ids[max(0, a.start - 2) :] for a in said_in(sorted(folder.glob("held-*")), True)])
    again = judge_drafter(sharp, tmp_path / "a", [], options, keep=replace(mine, answers=known))
    assert again.report["drafter"]["positions"] == 0, "training saw all of them"
    for kept, tokens in ((random_exits(sharp, (2, 4), adi.Never()), 300), (mine, 0)):
        with pytest.raises(ValueError, match="judging needs exits with a drafter"):
            judge_drafter(sharp, tmp_path / "b", [], replace(options, talk_tokens=tokens), keep=kept)
