"""The shipped looped models do what docs/loops.md says, and the contract of ``adi.solve`` is kept."""

from __future__ import annotations

import numpy as np

import adi
from adi.measure.solving import solving_report
from adi.model.hub import shipped_looped
from adi.tasks.products import GROUPS


def test_products_are_right_at_the_depth_that_they_need() -> None:
    found = solving_report("products", 128, 3)
    assert found["accuracy_all_turns"] > 0.985
    assert found["accuracy_halted"] > found["accuracy_all_turns"] - 0.005
    assert found["mean_turns"] < 2.7
    assert found["rank_correlation"] > 0.9
    assert found["controls"]["random_same_turns"] < found["accuracy_halted"] - 0.1
    turns = [row["turns"] for row in found["by_difficulty"]]
    assert turns == sorted(turns)


def test_solve_gives_a_number_of_turns_for_every_place() -> None:
    items = [[1, 4, 6, 2, 5], [6, 6, 3], [0]]
    for item, found in zip(items, adi.solve("products", items), strict=True):
        wanted, _ = GROUPS["S3"].answers(np.array([item]))
        assert found.answers == wanted[0].tolist()
        assert isinstance(found.turns, list)
        assert len(found.turns) == len(item)
        assert max(found.turns) <= 3
    full = adi.solve("products", items, halt=False)
    assert [each.turns for each in full] == [[8] * len(item) for item in items]


def test_shipped_models_are_small_and_say_how_they_were_made() -> None:
    from adi.files import package_data

    folder = package_data("looped")
    assert "products" in shipped_looped()
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8 << 20
    for name in shipped_looped():
        assert (folder / name / "train.json").exists()
