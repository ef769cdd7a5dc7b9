"""Probes find a variable that was planted, and nothing on shuffled labels; reach is told serial from doubling."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import adi_

from adi.measure.exposure.knowledge import Variable, growth, knowledge, last_products, probe, products_knowledge, reach
from adi.tasks.products import GROUPS


def test_a_planted_variable_is_found_and_shuffled_labels_are_not() -> None:
    dice = np.random.default_rng(0)
    labels_N, text_N = dice.integers(0, 4, 2000), np.repeat(np.arange(200), 10)
    planted_ND = dice.normal(size=(2000, 16)) + 3 * dice.normal(size=(4, 16))[labels_N]
    empty_ND = dice.normal(size=(2000, 16))
    found = knowledge(
        np.stack([empty_ND, planted_ND]), np.stack([empty_ND] * 2), text_N, [Variable(1, labels_N, np.arange(2000))]
    )
    first, second = found["rows"]
    assert second["accuracy"] > 0.95
    assert second["interval"][0] > 0.9
    for nothing in (first["accuracy"], second["shuffled"], second["untrained"]):
        assert nothing == pytest.approx(0.25, abs=0.05)
    assert found["reach"] == [0, 1]


def test_a_probe_is_judged_on_texts_that_it_was_not_fitted_on() -> None:
    dice = np.random.default_rng(0)
    assert probe(dice.normal(size=(60, 40)), dice.integers(0, 2, 60), np.arange(60)).mean() < 0.8


def test_reach_ends_at_the_first_step_that_is_not_known() -> None:
    rows = [{"turn": 1, "steps": s, "accuracy": a, "shuffled": 0.2} for s, a in ((1, 0.9), (2, 0.5), (4, 0.9))]
    assert reach(rows) == [1]


@pytest.mark.parametrize(("reached", "verdict"), [([1, 2, 3, 4], "serial"), ([1, 2, 4, 8, 16], "doubling"), ([1, 2, 2], None)])
def test_serial_is_told_from_doubling(reached: list[int], verdict: str | None) -> None:
    assert growth(reached)["verdict"] == verdict


def test_last_products_are_those_of_the_last_elements() -> None:
    group = GROUPS["S3"]
    drawn = group.batch(8, 20, 3)
    for window in (1, 3, 5):
        found = last_products(drawn.ids_BT, group.product, group.reset, window)
        for row, ids in enumerate(drawn.ids_BT):
            for t in range(window - 1, 20):
                now = 0
                for element in ids[t - window + 1 : t + 1]:
                    now = 0 if element == group.reset else int(group.product[now, element])
                assert found[row, t] == now
    whole = last_products(drawn.ids_BT, group.product, group.reset, 20)
    assert (whole == drawn.labels_BT).all()


def test_the_shipped_model_of_products_doubles_its_reach() -> None:
    found = products_knowledge(count=128)["answer"]
    assert found["verdict"] == "doubling"
    assert found["reach"][0] >= 2
    assert found["reach"][2] >= 6
    assert max(row["shuffled"] for row in found["rows"] if row["places"] > 300) < 0.35


def test_a_model_of_another_task_is_refused() -> None:
    done = adi_("study", "knowledge", "sudoku6")
    assert done.exit_code == 2
    assert "sudoku6 was trained on sudoku6" in done.stderr
