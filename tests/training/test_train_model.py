"""Training a tiny model's own blocks: exits come to agree, full depth stays, a stopped run resumes to the bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer

import adi
from adi.decoding.teacher_forcing import KnownText
from adi.errors import AdiError, FileError, UsageError
from adi.files import read_json, write_json
from adi.progress import Progress, no_progress
from adi.prompts import read_prompts
from adi.training import train_model as module
from adi.training.train_model import (
    Learner,
    ModelOptions,
    _shards,
    _teacher,
    _Text,
    batches,
    general_text,
    train_model,
)

OPTIONS = ModelOptions(depths=(2, 3), steps=64, learning_rate=2e-3, keep=1.0, tokens=96, rank=8, shortlist=VOCABULARY, every=0)


def texts(count: int, seed: int, length: int = 20) -> list[KnownText]:
    """Random prompts; a row of a random model answers whatever follows."""
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return [KnownText(tuple(row[: length - i % 4].tolist()), 4) for i, row in enumerate(ids)]


def trained(model: adi.Model, out: Path, options: ModelOptions = OPTIONS, progress: Progress = no_progress) -> adi.Exits:
    work, held = texts(12, 1), texts(4, 1)  # the texts held out are those learned here: a tiny overfit
    return train_model(model, work, texts(8, 2), out, options, held=held, windows=[held[0].ids], progress=progress)


@pytest.fixture(scope="module")
def done(llama: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[adi.Exits, Path]:
    out = tmp_path_factory.mktemp("trained")
    return trained(llama, out), out


def learner_of(model: Any, tmp_path: Path, options: ModelOptions) -> tuple[Learner, list[_Text]]:
    shards = _shards(model.backbone, tmp_path, {"answers": texts(4, 1)}, no_progress)["answers"]
    return Learner(model.backbone, _teacher(model.backbone, torch.arange(VOCABULARY)), options, False), _Text.all_of(shards)


def test_exits_agree_more_than_before_and_full_depth_says_what_it_said(done: tuple[adi.Exits, Path]) -> None:
    before, after = read_json(done[1] / "curve.json", "curve")
    for depth in ("2", "3"):
        assert after["exits"][depth]["full"] > before["exits"][depth]["full"] + 0.1, (before, after)
    assert after["full"] > 0.6
    assert after["steps"] == OPTIONS.steps
    assert after["perplexity"] < 1.5 * before["perplexity"]


def test_the_result_is_an_ordinary_checkpoint_whose_exits_fit_it(llama: adi.Model, done: tuple[adi.Exits, Path]) -> None:
    exits, out = done
    ordinary = AutoModelForCausalLM.from_pretrained(out).eval()
    model = adi.load(ordinary)
    assert type(ordinary) is type(llama.backbone.model)  # type: ignore[attr-defined]
    assert torch.equal(ordinary.get_input_embeddings().weight, llama.backbone.model.get_input_embeddings().weight)  # type: ignore[attr-defined]
    saved = adi.load_exits(out)
    assert saved.depths == exits.depths == (2, 3)
    full, verified = (
        adi.generate(model, (5, 6, 7), policy, max_new_tokens=24, stop_at_eos=False)
        for policy in (adi.FullDepth(), adi.Verified(saved, adi.Threshold("top_probability", 0.0)))
    )
    assert full.token_ids == verified.token_ids
    with pytest.raises(AdiError, match="belong to"):
        adi.generate(llama, (5, 6, 7), adi.Verified(saved), max_new_tokens=2)


def test_a_stopped_run_ends_with_the_bits_of_an_undisturbed_one(
    llama: adi.Model, done: tuple[adi.Exits, Path], tmp_path: Path
) -> None:
    def stop(at: int, total: int, what: str) -> None:
        if what.startswith("training") and at >= total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(llama, tmp_path, progress=stop)
    trained(llama, tmp_path)
    for name in ("model.safetensors", "exits.safetensors"):
        assert (tmp_path / name).read_bytes() == (done[1] / name).read_bytes()
    points = [[{**p, "minutes": 0} for p in read_json(out / "curve.json", "curve")] for out in (tmp_path, done[1])]
    assert points[0] == points[1]


def test_the_teacher_is_left_as_it_was(llama: adi.Model, tmp_path: Path) -> None:
    before = copy.deepcopy(llama.backbone.model.state_dict())  # type: ignore[attr-defined]
    trained(llama, tmp_path, replace(OPTIONS, steps=16))
    assert all(torch.equal(before[name], t) for name, t in llama.backbone.model.state_dict().items())  # type: ignore[attr-defined]


def test_without_exits_it_is_plain_distillation_whose_loss_at_the_original_is_nothing(llama: adi.Model, tmp_path: Path) -> None:
    learner, known = learner_of(llama, tmp_path, ModelOptions(depths=(), price=0.0, rank=4))
    (update, *_) = learner.updates(known, known, torch.Generator().manual_seed(0))
    (loss,) = update
    assert loss().item() == pytest.approx(0, abs=1e-4)


def test_the_loss_of_exits_is_that_of_full_depth_where_nothing_weighs_them(llama: adi.Model, tmp_path: Path) -> None:
    """At a price of nothing and a low temperature all weight is on full depth, which has no loss; evenly spread it is the
    mean of the exits' divergences."""
    learner, known = learner_of(llama, tmp_path, replace(OPTIONS, price=0.0, tau=1e-4, floor=0.0))
    assert learner.exit_loss(known).item() == pytest.approx(0, abs=1e-4)
    learner.options = replace(OPTIONS, floor=1.0)
    assert learner.exit_loss(known).item() > 0.01


def test_a_loss_that_is_no_number_stops_at_the_last_good_checkpoint(
    llama: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = Learner.keep_loss, [0]

    def broken(self: Learner, given: Any) -> torch.Tensor:
        calls[0] += 1
        return honest(self, given) * (math.nan if calls[0] > module.SPAN + 4 else 1.0)

    monkeypatch.setattr(Learner, "keep_loss", broken)
    with pytest.raises(AdiError, match="a loss is nan; the last good checkpoint, after 1 parts"):
        trained(llama, tmp_path)
    monkeypatch.setattr(Learner, "keep_loss", honest)
    assert trained(llama, tmp_path).depths == (2, 3)


def test_batches_hold_each_text_once_before_any_again_and_no_more_rows_than_asked(llama: adi.Model, tmp_path: Path) -> None:
    _, known = learner_of(llama, tmp_path, OPTIONS)
    found = batches(known, 45, 1, torch.Generator().manual_seed(0), whole=True)
    assert sorted(id(one) for group in found for one in group) == sorted(map(id, known))
    assert all(len(group) * max(len(one.ids_T) for one in group) <= 45 for group in found)
    assert len(batches(known, 45, 9, torch.Generator().manual_seed(0))) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [({"depths": (0, 3)}, r"depths \(0, 3\) are not possible"), ({"depths": (6,)}, "choose among 1..5")],
)
def test_depths_that_a_model_lacks_are_named(llama: adi.Model, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trained(llama, tmp_path, replace(OPTIONS, **change))


def test_no_text_is_said(llama: adi.Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 texts of held"):
        train_model(llama, texts(2, 1), texts(2, 2), tmp_path, OPTIONS, held=[])


def test_general_text_is_the_models_own_talk_and_plain_text(
    sharp: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adi.training.generate_data.SHARD_TEXTS", 6)
    monkeypatch.setattr("adi.training.generate_data.SIDE_BY_SIDE", 6)
    monkeypatch.setattr("adi.training.generate_data.LONGEST_PROMPT", 12)
    monkeypatch.setattr(module, "read_prompts", lambda name: read_prompts(name)[:40])
    found = general_text(sharp, tmp_path, tokens=200)
    assert any(text.first > 0 for text in found), "answers"
    assert sum(text.first == 0 for text in found) > 10, "plain text"
    assert found == general_text(sharp, tmp_path, tokens=200)


def test_exits_begin_with_the_heads_of_the_nearest_depth(llama: adi.Model, done: tuple[adi.Exits, Path]) -> None:
    teacher = _teacher(llama.backbone, torch.arange(VOCABULARY))
    known = done[0].heads
    assert known is not None
    learner = Learner(llama.backbone, teacher, replace(OPTIONS, depths=(1, 5)), False, known)  # type: ignore[arg-type]
    for depth, nearest in ((1, 2), (5, 3)):
        assert torch.equal(learner.adapters[depth].tensors()["up_DR"], known.adapters[nearest].tensors()["up_DR"])


def test_with_more_steps_a_finished_folder_goes_on(llama: adi.Model, tmp_path: Path) -> None:
    for steps in (16, 48):
        trained(llama, tmp_path, replace(OPTIONS, steps=steps))
    points = read_json(tmp_path / "curve.json", "curve")
    assert [point["steps"] for point in points] == [0, 16, 48]


def test_what_a_step_takes_is_measured_once_and_more_minutes_are_more_steps(llama: adi.Model, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=None, minutes=1e-4)
    trained(llama, tmp_path, options)
    note = tmp_path / "work" / "step_seconds.json"
    assert read_json(note, "note") > 0
    write_json(note, 0.01)
    trained(llama, tmp_path, replace(options, minutes=0.335 / 60))
    points = read_json(tmp_path / "curve.json", "curve")
    assert [point["steps"] for point in points] == [0, module.SPAN, 3 * module.SPAN], "33 steps, in whole spans"
    for name, damage in (("curve.json", "[{}]"), ("work/step_seconds.json", '"many"')):
        (tmp_path / name).write_text(damage)
        with pytest.raises(FileError, match=f"{Path(name).name} is damaged"):
            trained(llama, tmp_path, options)


def test_the_tokenizer_goes_along(sharp: adi.Model, tmp_path: Path) -> None:
    train_model(sharp, texts(4, 1), texts(4, 2), tmp_path, replace(OPTIONS, steps=16), held=texts(2, 3))
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size > 0


@pytest.mark.parametrize(
    ("change", "message"), [({"minutes": 0}, "minutes"), ({"price": -1}, "price"), ({"steps": 0}, "steps")]
)
def test_options_that_cannot_be_meant_are_named(change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelOptions(**change)
