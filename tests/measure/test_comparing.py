"""Looped models side by side: objectives, fixed depths, and the price as a dial."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import adi
from adi.errors import ModelError
from adi.measure.comparing import at_prices, compared
from adi.measure.halting_controls import area, at_turns, curve, first_turns, sweep
from adi.measure.solving import solving_report
from adi.model.load import load_looped
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.tasks.registry import task_named
from adi.training.price import OBJECTIVES, Price, costs
from adi.training.train_looped import TrainSettings, drawn_price, train_looped
from support import adi_

PRICES = (0.003, 0.1, 3.0)


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a gate that learns its halting over a range of prices, as the last steps of ``adi train`` do."""
    shipped, folder = load_looped("products"), tmp_path_factory.mktemp("dial")
    model = LoopedForCausalLM(LoopedConfig(**{**shipped.config.to_dict(), "gate_price": True}))
    weights = {name: value for name, value in shipped.state_dict().items() if not name.startswith("gate.")}
    model.load_state_dict(weights, strict=False)
    drawn = task_named("products-S3").batch(64, (1,))
    with torch.no_grad():
        read_RND = torch.stack(model.model(input_ids=torch.tensor(drawn.ids_BT))[0]).flatten(1, 2)
        loss_RN = model.losses(model.lm_head(read_RND)[:, None], torch.tensor(drawn.labels_BT).reshape(1, -1))
    settings = TrainSettings(task="products-S3", price=0.001, highest_price=10.0)
    optimizer = torch.optim.Adam(model.gate.parameters(), 1e-2)
    for step in range(150):
        chosen = torch.randperm(loss_RN.shape[1], generator=torch.Generator().manual_seed(step))[:256]
        price = drawn_price(settings, step)
        halt_RN = model.gate(read_RND[:, chosen], price)
        optimizer.zero_grad()
        OBJECTIVES["price"](loss_RN[:, chosen], halt_RN, costs(8), Price(price, gate_tau=0.02)).gate.backward()
        optimizer.step()
    model.save_pretrained(folder)
    (folder / "train.json").write_text(json.dumps(settings.to_json()))
    return folder


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of a fixed depth, hardly trained."""
    folder = tmp_path_factory.mktemp("fixed")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 4}
    train_looped(TrainSettings(task="products-S3", model=shape, steps=2, batch=4, objective="last", gate_only=0.0), folder)
    return folder


def test_a_higher_price_buys_fewer_turns_of_one_checkpoint(dial: Path) -> None:
    rows = at_prices(dial, PRICES[::-1], 64, 0)
    assert [row["price"] for row in rows] == list(PRICES)
    turns, right = ([row[name] for row in rows] for name in ("mean_turns", "accuracy"))
    assert turns == sorted(turns, reverse=True)
    assert turns[0] > turns[1] + 0.2 > turns[2] + 0.4
    assert right[0] >= right[2]
    for row in rows[:2]:
        found = solving_report(dial, 64, 0, row["price"])
        assert (found["mean_turns"], found["accuracy_halted"]) == (row["mean_turns"], row["accuracy"])
        assert row["mean_turns_interval"][0] <= row["mean_turns"] <= row["mean_turns_interval"][1]
    item = [[6, 1, 2, 3, 4, 5, 1, 2, 3, 4]]
    cheap, dear = (adi.solve(dial, item, price=price)[0].turns for price in (PRICES[0], PRICES[-1]))
    assert np.mean(cheap) > np.mean(dear)


def test_a_sweep_keeps_items_apart_and_a_curve_joins_them() -> None:
    dice = np.random.default_rng(0)
    right_RBT, signal_RBT = dice.random((3, 5, 4)) < 0.5, dice.random((3, 5, 4))
    turns_LB, right_LB = sweep(right_RBT, signal_RBT)
    assert turns_LB.shape == right_LB.shape == (len(turns_LB), 5)
    for level in (-np.inf, float(np.quantile(signal_RBT, 0.5))):
        at_BT = first_turns(signal_RBT, level)
        plain = at_turns(right_RBT.reshape(3, -1), at_BT.reshape(-1))
        assert (pytest.approx(at_BT.mean() + 1), pytest.approx(plain)) in curve(turns_LB, right_LB)


def test_models_are_compared_on_the_same_items(dial: Path, fixed: Path) -> None:
    rows = compared([dial, fixed, dial], 24, 3, price=0.1)
    first, last, again = rows
    found = solving_report(dial, 24, 3, 0.1)
    assert first["objective"] == "price"
    assert first["area"] == pytest.approx(found["controls"]["area"]["gate"])
    assert first["accuracy"] == found["accuracy_all_turns"]
    assert first["accuracy_halted"] == found["accuracy_halted"]
    assert first["area_interval"][0] < first["area"] < first["area_interval"][1]
    assert again["ahead_interval"] == [0.0, 0.0]
    assert (last["objective"], last["turns"], "area" in last) == ("last", 4, False)
    assert last["accuracy"] < first["accuracy"]
    assert area([(1.0, 0.0), (4.0, 1.0)], 4) == pytest.approx(0.5)


def test_the_shell_reports_prices_and_a_comparison(dial: Path, fixed: Path) -> None:
    asked = ("solve", dial, "--count", 20, "--prices", "0.01,10", "--against", fixed)
    found = json.loads(adi_(*asked, "--json").stdout)
    assert [row["price"] for row in found["prices"]] == [0.01, 10.0]
    assert [row["objective"] for row in found["compared"]] == ["price", "last"]
    text = adi_(*asked).output
    assert "On the same items" in text
    assert "price" in text
    assert adi_("solve", dial, "1,2,3", "--price", 0.1).exit_code == 0
    missing = adi_("solve", dial, "1,2,3")
    assert missing.exit_code == 2
    assert "give price=0.05" in missing.output + missing.stderr


def test_models_of_other_tasks_are_refused(dial: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LoopedForCausalLM(LoopedConfig(vocab_size=9, turns=2, task="products-D4")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="products-S3 and of products-D4 solve different items"):
        compared([dial, tmp_path], 4, 0, 0.1)
