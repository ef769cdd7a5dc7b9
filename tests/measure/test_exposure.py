"""The exposure study: its world, its parts, and that its figures find what is there and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import adi_

import adi
from adi.errors import FileError, UsageError
from adi.measure.exposure import study as study_module
from adi.measure.exposure import train as train_module
from adi.measure.exposure.devalue import changed, delay, shares, slips
from adi.measure.exposure.facts import LENGTH, NAMES, Facts, Item, batch_of
from adi.measure.exposure.network import TURNS, network
from adi.measure.exposure.observe import MENTIONS, Observed, Question, item_probes, observe, repeat_probes
from adi.measure.exposure.report import report
from adi.measure.exposure.settings import SETTINGS, ExposureSettings, Part
from adi.measure.exposure.slopes import Table, partial_slope
from adi.measure.exposure.study import run_study
from adi.progress import no_progress
from adi.schema import claim
from adi.tasks.pointers import NONE

TINY = ExposureSettings(prices=(0.0, 0.3), seeds=(0,), shapes=("plain",), steps=4, most_exposures=1)


def test_answers_follow_the_relations_hop_by_hop() -> None:
    facts = Facts(0)
    dice = random.Random(1)
    for _ in range(50):
        text = facts.text(dice)
        for place in text.due:
            first = max(p for p in range(place) if text.ids[p] <= NAMES)
            at = text.ids[first]
            for relation, label in zip(text.ids[first + 1 : place + 1], text.labels[first + 1 : place + 1], strict=True):
                at = int(facts.leads[relation - NAMES - 1, at - 1])
                assert label == at
            assert text.ids[place + 1] == at


def test_items_come_as_often_as_their_level_says_and_never_else() -> None:
    facts = Facts(2, most=4)
    calendar = facts.calendar(400)
    met = Counter[tuple[int, ...]]()
    for n in range(0, 400, 50):
        batch = facts.batch(calendar, n, 50)
        for ids, labels in zip(batch.ids_BT.tolist(), batch.labels_BT.tolist(), strict=True):
            starts = [p for p, word in enumerate(ids) if 0 < word <= NAMES and ids[p + 1 : p + 2] > [NAMES]]
            for start in starts:
                end = next(p for p in range(start + 1, LENGTH) if ids[p] <= NAMES)
                for stop in range(start + 2, end + 1):
                    key = tuple(ids[start:stop])
                    if key in facts.keys:
                        assert stop == end
                        met[key] += 1
                        assert (labels[end - 1] == NONE) == facts.keys[key].masked
    repeated = sum(met.values()) - sum(item.exposures for item in facts.items)
    assert set(met) == {item.key for item in facts.items if item.exposures}
    assert repeated == 0


def test_levels_turn_from_seed_to_seed_and_questions_stay() -> None:
    first, second = Facts(0).items, Facts(1).items
    assert [(i.key, i.answer) for i in first] == [(i.key, i.answer) for i in second]
    moved = [a.exposures != b.exposures for a, b in zip(first, second, strict=True) if not a.masked]
    assert all(moved)
    for facts in (first, second):
        counts = Counter((i.hops, i.exposures) for i in facts if not i.masked)
        assert set(counts.values()) == {6}


def test_texts_without_room_for_the_exposures_are_refused() -> None:
    with pytest.raises(UsageError, match="100 texts have no room for 13800 exposures"):
        Facts(0).calendar(100)


def test_a_stack_has_weights_of_its_own_in_each_turn() -> None:
    ids = torch.tensor(batch_of([Facts(0).text(random.Random(0))]).ids_BT)
    model = network("plain", 0).eval()
    before = torch.stack(model.model(input_ids=ids)[0])
    with torch.no_grad():
        next(model.model.turn[TURNS - 1].parameters()).add_(1.0)
    after = torch.stack(model.model(input_ids=ids)[0])
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_what_is_observed_is_the_models_own_loss() -> None:
    facts, model = Facts(0), network("looped", 0).eval()
    probes = item_probes(facts, range(5), 2, seed=3)
    seen = observe(model, probes)
    for n, question in enumerate(probes.questions):
        text = probes.texts[question.text]
        logits = model(torch.tensor([text.ids]), output_turns=True).turn_logits[:, 0, question.place]
        loss_R = -logits.log_softmax(-1)[:, question.answer]
        assert np.allclose(seen.loss_RQ[:, n], loss_R.detach().numpy(), atol=1e-4)
        assert tuple(text.ids[question.place - question.hops : question.place + 1]) == facts.items[question.item or 0].key


def test_repeated_questions_are_counted_within_their_text() -> None:
    probes = repeat_probes(Facts(0), 12, 0)
    for n, text in enumerate(probes.texts):
        mine = [q for q in probes.questions if q.text == n]
        assert tuple(q.mention for q in mine) == MENTIONS
        key = text.ids[mine[0].place - 2 : mine[0].place + 1]
        places = [p for p in text.due if text.ids[p - 2 : p + 1] == key]
        assert [places[q.mention - 1] for q in mine] == [q.place for q in mine]


def _observed(said: list[list[int]], halt: list[list[float]] | None = None) -> Observed:
    said_RQ = np.array(said)
    questions = [Question(0, 0, 9, 1, n) for n in range(said_RQ.shape[1])]
    halt_RQ = np.full(said_RQ.shape, -1.0) if halt is None else np.array(halt)
    return Observed(questions, np.zeros(said_RQ.shape), said_RQ, halt_RQ, np.zeros(said_RQ.shape[1]))


def test_a_question_is_settled_from_where_the_answer_stays() -> None:
    seen = _observed([[5, 9, 9], [9, 9, 5], [9, 9, 9]], [[1, -1, -1], [1, 1, -1], [-1, -1, -1]])
    assert seen.settled.tolist() == [2, 1, 3]
    assert seen.halted.tolist() == [1, 2, 3]


def test_devaluation_counts_old_answers_at_shallow_turns_against_new_ones_at_the_end() -> None:
    """Four questions whose answer was 5 and is 9; the gate halts the first two after the first turn."""
    seen = _observed([[5, 9, 5, 7], [9, 9, 9, 9]], [[1, 1, -1, -1], [1, 1, 1, 1]])
    items = [Item((1, 2), 5, 0)] * 4
    assert shares(seen, items) == {"old": [0.5, 0.0], "new": [0.25, 1.0]}
    found = slips(seen, items, threshold=0.5)
    assert (found["slips"], found["outlived"], found["first_outlived"]) == (0.25, 0.25, 0.5)
    assert found["losses"] == [1, 0, 0, 0]
    assert slips(seen, items, None)["losses"] == []


def test_the_drift_monitor_alarms_on_slips_and_on_nothing_else() -> None:
    assert delay(4, [0] * 200)["alarm_after"] is None
    found = delay(4, [1] * 200)
    assert found["risk"] == 1.0
    assert 1 < found["alarm_after"] < 10


def test_verified_answers_are_full_depths_where_depths_disagree_and_reflex_answers_are_not() -> None:
    """A network with loud weights, whose turns say different things of the facts that devaluation changes."""
    network_, groups = network("looped", 0), changed(Facts(0, most=4), 0)[1]
    with torch.no_grad():
        for weights in network_.model.turn.parameters():
            weights.mul_(6)
    model = adi.load(network_.eval())
    exits = adi.bare_exits(model)
    differing = 0
    for item in groups["fact"][:6]:
        full, drafted, verified = (
            adi.generate(model, item.key, policy, max_new_tokens=4).token_ids
            for policy in (adi.FullDepth(), adi.Reflex(exits, thresholds=0.0), adi.Verified(exits))
        )
        assert verified == full
        differing += drafted != full
    assert differing


def test_changed_facts_touch_the_end_of_the_chosen_questions_and_no_fresh_one() -> None:
    facts = Facts(0, most=4)
    world, groups = changed(facts, 0)
    assert all(world.answers(item.key)[-1] != item.answer == facts.answers(item.key)[-1] for item in groups["familiar"])
    assert {item.exposures for item in groups["new"]} <= {0, 1}
    dice = random.Random(0)
    for _ in range(50):
        assert not any(fact in world.moved for fact in facts.facts(world.fresh(dice)))


def _table(slope: float, seed: int = 0) -> tuple[Table, np.ndarray]:
    """Depth that falls by so much with exposure, and rises with a covariate that goes along with it."""
    dice = np.random.default_rng(seed)
    item_N = np.repeat(np.arange(120), 4)
    exposure_N = dice.integers(0, 9, 120)[item_N].astype(float)
    covariates_NK = dice.normal(size=(480, 2)) + exposure_N[:, None] / 4
    noise_N = 0.2 * dice.normal(size=120)[item_N] + 0.2 * dice.normal(size=480)
    return Table(exposure_N, covariates_NK, item_N), 3 + slope * exposure_N + covariates_NK[:, 0] + noise_N


def test_a_known_slope_is_found_within_its_interval() -> None:
    found: Any = partial_slope(*_table(-0.2)).to_json()
    low, high = found["interval"]
    assert low < -0.2 < high < 0
    assert found["p"] < 0.01


def test_the_slope_is_that_of_ordinary_least_squares() -> None:
    table, depth_N = _table(-0.2)
    design = np.column_stack([table.exposure_N, table.covariates_NK, np.ones(len(depth_N))])
    assert partial_slope(table, depth_N).value == pytest.approx(np.linalg.lstsq(design, depth_N, rcond=None)[0][0], abs=1e-6)


def test_permuted_exposures_have_no_slope() -> None:
    table, depth_N = _table(-0.2)
    dealt = np.random.default_rng(5).permutation(120)
    found: Any = partial_slope(
        Table(table.exposure_N.reshape(120, 4)[dealt].ravel(), table.covariates_NK, table.item_N), depth_N
    )
    assert found.to_json()["interval"][0] < 0 < found.to_json()["interval"][1]
    assert abs(found.permuted_P.mean()) < 0.02


def test_joined_tables_have_a_level_of_their_own() -> None:
    (first, depth), (second, more) = _table(-0.2), _table(-0.2, seed=1)
    joined = Table.joined([first, second])
    assert len(np.unique(joined.item_N)) == 240
    assert partial_slope(joined, np.concatenate([depth, more + 10])).value == pytest.approx(-0.2, abs=0.05)


def test_a_study_resumes_at_the_part_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("CONTEXTS", 2), ("EARLY_CONTEXTS", 1), ("REPEATS", 4), ("KNOWLEDGE", 16)):
        monkeypatch.setattr(study_module, name, few)
    monkeypatch.setattr(train_module, "GATE_STEPS", 2)
    monkeypatch.setattr(study_module, "devalue", partial(study_module.devalue, examples=(0, 1)))
    done = []

    def stopping(*given: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(given)
        return run_part(*given)

    run_part = study_module.run_part
    monkeypatch.setattr(study_module, "run_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, tmp_path, no_progress)
    assert [path.name for path in (tmp_path / "parts").glob("*.json")] == ["plain-0-0.json"]
    before = (tmp_path / "parts" / "plain-0-0.json").read_bytes()
    done.clear()
    parts = run_study(TINY, tmp_path, no_progress)
    assert [part.name for part, _ in parts] == ["plain-0-0", "plain-0.3-0"]
    assert len(done) == 1
    assert (tmp_path / "parts" / "plain-0-0.json").read_bytes() == before
    (shape,) = report(TINY, parts)["shapes"]
    assert [price["price"] for price in shape["prices"]] == [0.0, 0.3]
    assert shape["gate_only"][0]["price"] == shape["minus_price_0"][0]["price"] == 0.3
    assert {row["group"] for row in shape["prices"][0]["devaluation"]["rows"]} <= {"familiar", "new", "fact"}
    (tmp_path / "parts" / "plain-0-0.json").write_text("{}")
    with pytest.raises(FileError, match=r"plain-0-0\.json is damaged: .*texts"):
        run_study(TINY, tmp_path, no_progress)
    (tmp_path / "parts" / "plain-0-0.json").unlink()
    (tmp_path / "school-plain-0.pt").write_bytes(b"PK")
    monkeypatch.setattr(study_module, "run_part", run_part)
    with pytest.raises(FileError, match=r"school-plain-0\.pt are damaged"):
        run_study(TINY, tmp_path, no_progress)


def test_a_study_of_two_configurations_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / SETTINGS, TINY)
    done = adi_("study", "exposure", "--out", tmp_path, "--steps", 5)
    assert done.exit_code == 2
    assert "was begun with prices = (0.0, 0.3), not (0.0, 0.03, 0.1, 0.3)" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.output


def test_a_grid_without_meaning_is_refused(tmp_path: Path) -> None:
    for given, complaint in ((("--prices", "-1"), "prices"), (("--shapes", "round"), "'round'"), (("--seeds", "x"), "'x'")):
        done = adi_("study", "exposure", "--out", tmp_path / "x", *given)
        assert done.exit_code == 2
        assert complaint in done.stderr
        assert not (tmp_path / "x").exists()


def test_parts_are_named_by_what_they_are() -> None:
    assert [part.name for part in TINY.parts()] == ["plain-0-0", "plain-0.3-0"]
    assert Part("looped", 0.03, 2).name == "looped-0.03-2"
