"""``adi habituate`` on a tiny model: text stays exact, nothing that is tested on was learned, a stopped run goes on, and
mistakes are sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.decoding.teacher_forcing import KnownText
from adi.errors import FileError, UsageError
from adi.measure.habits import learned
from adi.measure.habits import run as module
from adi.measure.habits.compared import Compared
from adi.measure.habits.page import habits_page
from adi.measure.habits.run import habituate, verdict
from adi.measure.habits.steady import steadily
from adi.progress import Progress, no_progress
from adi.prompts import PromptItem
from adi.training import habituate as training
from adi.training.habituate import HabitOptions, divided, split
from adi.training.shards import texts_in
from adi.training.texts import prompt_of
from adi.training.train_model import ModelOptions
from support import Stop, adi_

OPTIONS = HabitOptions(minutes=5, max_new_tokens=12)
ITEMS = [
    PromptItem((f"{animal} {n} jumps over the {n % 7} dogs",), animal) for animal in ("fox", "cat", "bird") for n in range(14)
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STAGES", (8, 16))
    monkeypatch.setattr(training, "MOST_EPOCHS", 2)
    monkeypatch.setattr(training, "MOST_TURNS", 1)
    monkeypatch.setattr(module, "CURVE_PROMPTS", 2)
    monkeypatch.setattr(module, "REPEATED_PROMPTS", 2)


def run(
    model: adi.Model,
    out: Path,
    items: Sequence[PromptItem] = ITEMS,
    options: HabitOptions = OPTIONS,
    progress: Progress = no_progress,
    keep: adi.Exits | None = None,
    **more: Any,
) -> dict[str, Any]:
    (out / "work").mkdir(parents=True, exist_ok=True)
    (out / "work" / "drafter.dtype").write_text("float32")  # which is measured, and might change between two runs
    return habituate(model, [model], out, items, keep, options, progress=progress, **more)


@pytest.fixture(scope="module")
def done(sharp: adi.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("habits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "STAGES", (8, 16))
        patch.setattr(training, "MOST_EPOCHS", 2)
        patch.setattr(training, "MOST_TURNS", 1)
        patch.setattr(module, "CURVE_PROMPTS", 2)
        patch.setattr(module, "REPEATED_PROMPTS", 2)
        return run(sharp, out, others=[PromptItem(("hello dog",), "talk"), PromptItem(("12 plus 30",), "sums")]), out


def test_every_text_is_full_depths_before_and_after(done: tuple[dict[str, Any], Path]) -> None:
    for one in done[0]["results"]:
        assert one["workload"]["same_text"] == one["others"]["same_text"] == 1
        assert set(one["workload"]["by_category"]) <= {"fox", "cat", "bird"}


def test_the_curve_has_a_point_for_every_stage_and_habits_pay(done: tuple[dict[str, Any], Path]) -> None:
    curve, repeated = done[0]["curve"], done[0]["repetitions"]
    assert [row["prompts"] for row in curve] == [0, 8, 16, done[0]["split"]["train"]]
    assert [row["repetition"] for row in repeated] == [1, 2, 4, 8]
    assert repeated[-1]["tokens_per_pass"] > repeated[0]["tokens_per_pass"], "the same prompt again is a habit"


def test_what_was_made_is_used_as_the_line_says(sharp: adi.Model, done: tuple[dict[str, Any], Path]) -> None:
    exits, prompt = adi.load_exits(done[1]), "fox 99 jumps over the 3 dogs"
    assert exits.drafter is not None
    assert exits.heads is not None
    assert exits.made_by["habits"]["options"]["max_new_tokens"] == 12
    assert exits.habits is not None
    assert len(exits.habits.lengths_M) == done[0]["split"]["train"]
    full = adi.generate(sharp, prompt, adi.FullDepth(), max_new_tokens=20)
    assert adi.generate(sharp, prompt, adi.Verified(exits), max_new_tokens=20).token_ids == full.token_ids


def test_it_goes_on_from_exits_of_a_file(sharp: adi.Model, done: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    found = run(sharp, tmp_path, keep=adi.load_exits(done[1]))
    assert all({"before", "after"} <= set(row) for row in found["exits"])
    assert adi.load_exits(tmp_path).heads is not None


def test_nothing_that_is_tested_on_was_learned_from(sharp: adi.Model, done: tuple[dict[str, Any], Path]) -> None:
    work, sides = done[1] / "work", split(sharp, ITEMS, OPTIONS)
    learned = {prompt_of(text) for text in texts_in(work.glob("texts-*/train-*"))}
    held = {prompt_of(text) for text in texts_in(work.glob("texts-*/held-*"))}
    assert learned == set(sides.train)
    assert held == {*sides.choosing, *sides.testing}
    assert not {*sides.choosing} & {*sides.testing}
    assert not learned & held


def test_prompts_that_differ_in_case_alone_are_on_one_side(sharp: adi.Model) -> None:
    twins = [PromptItem((text,), "") for n in range(40) for text in (f"Fox {n}, dogs!", f"fox {n} dogs")]
    sides = split(sharp, twins, OPTIONS)
    pairs = [{tuple(sharp.encode(twin.prompt)) for twin in twins[at : at + 2]} for at in range(0, 80, 2)]
    for side in (sides.train, sides.choosing, sides.testing):
        assert all(len(pair & {*side}) in (0, 2) for pair in pairs)


@pytest.mark.parametrize("stage", ["training the drafter", "measuring the curve"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_exits(
    sharp: adi.Model, done: tuple[dict[str, Any], Path], tmp_path: Path, stage: str
) -> None:
    plan = done[1] / "work" / "plan.json"  # which follows from times
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "plan.json").write_text(plan.read_text())

    def interrupt(done: int, total: int, what: str) -> None:
        if what.startswith(stage) and done > 1:
            raise Stop

    with pytest.raises(Stop):
        run(sharp, tmp_path, progress=interrupt)
    found = run(sharp, tmp_path)
    assert found["exits"] == done[0]["exits"]
    first, second = adi.load_exits(done[1]), adi.load_exits(tmp_path)
    assert first.drafter is not None
    assert second.drafter is not None
    assert first.drafter.digest() == second.drafter.digest()
    assert first.report == second.report


def test_a_finished_folder_measures_what_it_had_not_measured(
    sharp: adi.Model, done: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    shutil.copytree(done[1], tmp_path / "habits")
    found = run(sharp, tmp_path / "habits", others=[PromptItem(("quick dog",), "other talk")])
    assert set(found["results"][0]["others"]["by_category"]) == {"other talk"}
    assert found["curve"] == done[0]["curve"], "what is as it was is not measured again"


def test_answers_that_are_there_do_not_make_the_plan_cheaper(
    sharp: adi.Model, done: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """A budget that was refused is given again, larger: what answering takes was measured the first time."""
    shutil.copytree(done[1], tmp_path / "habits")
    work = tmp_path / "habits" / "work"
    assert float((work / "answering.json").read_text()) > 0
    (work / "answering.json").write_text("1000.0")
    (work / "plan.json").unlink()
    with pytest.raises(UsageError, match=r"answering .* take some"):
        run(sharp, tmp_path / "habits")


def test_a_larger_budget_first_buys_passes_and_then_further_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MOST_EPOCHS", 12)
    monkeypatch.setattr(training, "MOST_TURNS", 3)
    assert divided(10.0, whole=20.0, answering=50.0) == (0, 1)
    assert divided(100.0, whole=20.0, answering=50.0) == (0, 5)
    assert divided(250.0, whole=20.0, answering=50.0) == (1, 5)
    turns, epochs = divided(1e6, whole=20.0, answering=50.0)
    assert (turns, epochs) == (3, 12)


def test_bills_by_the_cost_table_are_the_same_every_time(sharp: adi.Model, done: tuple[dict[str, Any], Path]) -> None:
    exits, ids = adi.load_exits(done[1]), split(sharp, ITEMS, OPTIONS).testing[0]
    first, second = (steadily(sharp, ids, 24, exits) for _ in range(2))
    assert first == second
    assert first["tokens"] >= first["rounds"] > 0
    assert first["ratio"] > 0


def test_the_page_escapes_and_asks_nothing_of_any_network(done: tuple[dict[str, Any], Path]) -> None:
    document = json.loads(json.dumps(done[0]))
    document["text"]["written"]["after"][0][0] = "<script>"
    page = habits_page(document)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert verdict(document)[0] in page


def test_a_folder_of_another_run_is_refused_and_kept(sharp: adi.Model, tiny_model: adi.Model, done: Any) -> None:
    before = sorted(path.name for path in (done[1] / "work").rglob("*"))
    for changed, match in (
        (dict(model=tiny_model), "another model"),
        (dict(model=sharp, items=ITEMS[:-1]), "another prompts"),
        (dict(model=sharp, options=replace(OPTIONS, seed=1)), "another prompts|another seed"),
        (dict(model=sharp, options=replace(OPTIONS, max_new_tokens=9)), "another max_new_tokens"),
    ):
        with pytest.raises(FileError, match=match):
            run(out=done[1], **changed)
    assert sorted(path.name for path in (done[1] / "work").rglob("*")) == before


def test_damaged_files_of_a_run_are_named(sharp: adi.Model, tmp_path: Path) -> None:
    for name, damage in (("habituate.json", "[]"), ("measured.json", "[{}]")):
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work" / name).write_text(damage)
    with pytest.raises(FileError, match=r"habituate\.json is damaged: expected object, got array"):
        run(sharp, tmp_path)
    with pytest.raises(FileError, match=r"measured\.json is damaged: .*kind"):
        Compared(sharp, {}, 8, tmp_path / "work" / "measured.json")


def test_prompts_that_cannot_be_learned_from_are_sentences(sharp: adi.Model, tmp_path: Path) -> None:
    cases = {
        "too few": [*ITEMS[:5]],
        "1 kinds are too few": [PromptItem(("Fox" + "!" * n,), "") for n in range(30)],
        "longer than the model's context of 512": [*ITEMS, PromptItem(("dog " * 600,), "")],
        "outside the vocabulary": [*ITEMS, PromptItem((), "", (5, 9000))],
    }
    for match, items in cases.items():
        with pytest.raises(UsageError, match=match):
            run(sharp, tmp_path / "never", items)


def test_a_budget_too_short_for_one_pass_says_how_long_one_takes(sharp: adi.Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--minutes is 0\.0001, .* minutes here"):
        run(sharp, tmp_path, options=replace(OPTIONS, minutes=0.0001))
    assert list((tmp_path / "work").glob("texts-*/group-*")), "finished parts are kept"


def test_the_command_makes_page_and_json(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": item.prompt, "category": item.category}) + "\n" for item in ITEMS[:24]))
    given = ("habituate", tiny_folder, "--prompts", prompts, "--out", tmp_path / "out", "-n", 8, "--minutes", 3)
    found = adi_(*given, "--others", prompts, "--precision", "fp32", "--json")
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document == json.loads((tmp_path / "out" / "habits.json").read_text())
    assert (tmp_path / "out" / "habits.html").read_text().startswith("<!DOCTYPE html>")
    assert "--history" in found.stderr.replace("\n", "")
    again = adi_(*given, "--others", prompts, "--precision", "fp32", "--measure-again")
    assert again.exit_code == 0, again.output
    assert "x full depth before" in again.stdout.replace("\n", " ")
    other = adi_(*given[:-4], "-n", 9, "--precision", "fp32")
    assert other.exit_code == 2
    assert "another max_new_tokens" in other.stderr.replace("\n", " ")


def test_a_model_without_tokenizer_learns_from_ids(llama: adi.Model, tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(0)
    items = [PromptItem((), "", tuple(torch.randint(0, 128, (6,), generator=dice).tolist())) for _ in range(24)]
    found = run(llama, tmp_path, items)
    assert found["repetitions"] == []
    assert found["results"][0]["others"] is None


def test_the_model_that_learned_too_stands_beside_the_original(
    sharp: adi.Model, done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the parts of the finished run: its own full depth is the new model's text, and the page shows both."""
    shutil.copytree(done[1], tmp_path / "run")
    monkeypatch.setattr(learned, "general_text", lambda engine, *_, **__: [KnownText(engine.encode("the quick fox " * 9))] * 4)
    options = ModelOptions(depths=(2, 3), steps=16, tokens=64, rank=4, shortlist=64, every=0.0)
    found = run(
        sharp,
        tmp_path / "run",
        others=[PromptItem(("hello dog",), "talk"), PromptItem(("12 plus 30",), "sums")],
        train=options,
        reload=lambda folder: [adi.load(str(folder), backend="hf")],
    )
    (one,) = found["trained"]["engines"]
    for name in ("original", "learned"):
        assert one[name]["same_text"] == 1
        assert 0 < one[name]["certified_depth"] <= 1
    assert found["trained"]["curve"][-1]["steps"] == 16
    assert "learned model: verified" in verdict(found)[-1]
    assert "The model that learned too" in habits_page(json.loads(json.dumps(found)))
