"""Training on a tiny model, from prompts to exits: interruptions lose nothing; agreement rises."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.progress import Progress, no_progress
from adi.training.shards import texts_in
from adi.training.texts import is_held_out, prompt_of
from adi.training.tune import tune
from support import Stop

PROMPTS = [f"{animal} number {n} jumps over the {n % 7} dogs" for animal in ("fox", "cat", "bird") for n in range(24)]
OPTIONS = adi.TuneOptions(
    depths=(2, 4, 5),
    tokens=900,
    max_new_tokens=24,
    shortlist=64,
    rank=8,
    epochs=12,
    learning_rate=1e-2,
    drafter_epochs=0,
)


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
    brief = tune(sharp, tmp_path, [PROMPTS], replace(OPTIONS, epochs=1, learning_rate=1e-9))
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


STAGES = ("generating text", "reading states", "reading held-out", "training heads", "training the drafter")
QUICK = adi.TuneOptions(
    depths=(2, 4),
    tokens=250,
    max_new_tokens=8,
    shortlist=64,
    rank=4,
    epochs=2,
    drafter_epochs=2,
    generate_tokens=500,
    own_prompts=0.05,
    seed=3,
)


def quick_run(model: adi.Model, out: Path, progress: Progress = no_progress) -> adi.Exits:
    (out / "work").mkdir(parents=True, exist_ok=True)
    (out / "work" / "drafter.dtype").write_text("float32")  # which is measured, and might change between two runs
    return tune(model, out, [PROMPTS], QUICK, progress=progress)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> adi.Exits:
    return quick_run(tiny_model, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(
    tiny_model: adi.Model, undisturbed: adi.Exits, tmp_path: Path, stage: str
) -> None:
    """And every stage says where it is, more than once."""
    calls: list[str] = []

    def interrupt(done: int, total: int, what: str) -> None:
        assert 0 <= done <= total
        calls.append(what)
        if what.startswith(stage) and sum(call.startswith(stage) for call in calls) == 3:
            raise Stop

    with pytest.raises(Stop):
        quick_run(tiny_model, tmp_path, interrupt)
    assert not (tmp_path / "exits.json").exists()
    resumed = quick_run(tiny_model, tmp_path)
    assert resumed.report == undisturbed.report
    assert resumed.made_by == undisturbed.made_by
    assert resumed.heads is not None
    assert undisturbed.heads is not None
    for depth in (2, 4):
        for name, tensor in resumed.heads.adapters[depth].tensors().items():
            assert torch.equal(tensor, undisturbed.heads.adapters[depth].tensors()[name])
    assert resumed.drafter is not None
    assert undisturbed.drafter is not None
    assert resumed.drafter.digest() == undisturbed.drafter.digest()


def test_a_used_folder_trains_on_what_was_asked(sharp: adi.Model, tiny_model: adi.Model, tmp_path: Path) -> None:
    quick = adi.TuneOptions(depths=(3,), tokens=10**6, max_new_tokens=8, shortlist=40, rank=4, epochs=1, drafter_epochs=0)
    used = tmp_path / "used"
    first = tune(sharp, used, [PROMPTS[:40]], quick)
    other = tune(sharp, used, [PROMPTS[20:]], quick)
    assert other.made_by["texts"] != first.made_by["texts"], "other prompts, other texts"
    again, fresh = (tune(tiny_model, folder, [PROMPTS[20:]], quick) for folder in (used, tmp_path / "fresh"))
    assert again.made_by["texts"] == fresh.made_by["texts"], "another model answers for itself"
    assert again.heads is not None
    assert fresh.heads is not None
    assert torch.equal(again.heads.adapters[3].up_DR, fresh.heads.adapters[3].up_DR)


@pytest.mark.parametrize("generate_tokens", [0, 500])
def test_heads_drafter_and_datastore_are_trained_on_one_side_and_tested_on_the_other(
    tiny_model: adi.Model, tmp_path: Path, generate_tokens: int
) -> None:
    """Whichever way the texts came: no text of a prompt that is tested on is in any shard to train on, nor remembered."""
    options = replace(QUICK, generate_tokens=generate_tokens)
    exits = tune(tiny_model, tmp_path, [PROMPTS, PROMPTS], options)
    work = tmp_path / "work"
    train = texts_in([*(work / "states").iterdir(), *work.glob("texts-*/train-*")])
    held = texts_in([*(work / "held-states").iterdir(), *work.glob("texts-*/held-*")])
    assert not {text.ids for text in train} & {text.ids for text in held}
    assert not any(is_held_out(prompt_of(text)) for text in train)
    assert all(is_held_out(prompt_of(text)) for text in held)
    assert exits.answers is not None
    remembered = [tuple(part) for part in torch.tensor(exits.answers.ids_N).split(exits.answers.lengths_M.tolist())]
    assert not {tuple(map(int, part)) for part in remembered} - {text.ids[text.first - 1 :] for text in train}
    assert exits.report["held_out"]["rows"] == sum(len(t.ids) - t.first for t in texts_in((work / "held-states").iterdir()))


def test_texts_made_with_the_old_split_are_refused(tiny_model: adi.Model, tmp_path: Path) -> None:
    for name in ("talk-0123456789ab", "answers.jsonl"):
        (tmp_path / name / "work" / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=r"made by an older adi.*delete that folder"):
            tune(tiny_model, tmp_path / name, [PROMPTS], OPTIONS)


def test_a_trained_head_merges_into_an_ordinary_checkpoint(sharp: adi.Model, tuned: tuple[adi.Exits, Path]) -> None:
    heads = tuned[0].heads
    assert heads is not None
    adapter = heads.adapters[4]
    assert not adapter.shift_D.any(), "an RMS norm has no shift to put it in"
    assert adapter.up_DR.any()
    readout = sharp.backbone.readout()
    weight_VD: Any = readout.scale * readout.weight_VD
    early = copy.deepcopy(sharp.backbone.model)  # type: ignore[attr-defined]
    early.model.layers = early.model.layers[:4]
    early.config.num_hidden_layers = 4
    with torch.no_grad():
        early.model.norm.weight.copy_(adapter.gain_D)
        early.lm_head.weight.copy_(weight_VD + (weight_VD @ adapter.up_DR) @ adapter.down_DR.T)
        ids = torch.tensor([sharp.encode("the quick fox")])
        logits = early(ids).logits[0]
        hidden_TD = sharp.backbone.model(ids, output_hidden_states=True).hidden_states[4][0]  # type: ignore[attr-defined]
    said = tuned[0].reader(sharp.backbone)(4, hidden_TD)
    difference = said.log_probs_TS - logits[:, heads.ids_S]
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-3, rtol=0)


def test_text_files_are_learned_from(tiny_model: adi.Model, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(f"the quick brown fox and {n} lazy dogs, 12 plus {n * n} jumps." for n in range(250)))
    options = adi.TuneOptions(depths=(3,), shortlist=40, rank=4, epochs=1, drafter_epochs=1)
    exits = tune(tiny_model, tmp_path / "out", [], options, texts=[text])
    assert exits.report["training_tokens"] > 2000
    assert exits.report["drafter"]["answer_tokens"] == exits.report["training_tokens"]


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
        tune(tiny_model, tmp_path, [PROMPTS], replace(OPTIONS, **changes))


def test_too_few_prompts_are_refused_before_any_work(tiny_model: adi.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        tune(tiny_model, tmp_path / "a", [["one prompt"]], OPTIONS, progress=lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="groups"):
        tune(tiny_model, tmp_path / "a", PROMPTS, OPTIONS)
    assert not (tmp_path / "a").exists()


def test_with_conversations_the_heads_see_the_first_tokens_only(tiny_model: adi.Model, tmp_path: Path) -> None:
    exits = tune(tiny_model, tmp_path, [[f"the fox {i}" for i in range(40)]], replace(QUICK, epochs=1))
    assert exits.heads is not None
    assert exits.drafter is not None
    assert 250 <= exits.report["training_tokens"] < 260
    assert exits.report["drafter"]["answer_tokens"] > 350
