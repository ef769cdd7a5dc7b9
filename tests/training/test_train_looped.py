"""Training a looped model: resumed to the bit, what was begun otherwise is refused, a loss that is no number stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from adi.errors import AdiError, FileError, UsageError
from adi.model.load import load_looped
from adi.model.looped import LoopedForCausalLM
from adi.tasks.registry import easier, task_named
from adi.training.looped.growth import STEPS, Growth
from adi.training.train_looped import Batches, Carry, PriceTrainer, TrainSettings, drawn_price, train_looped

TINY = TrainSettings(
    task="products-S3",
    model={"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 3},
    steps=9,
    batch=4,
    warmup=2,
    save_every=3,
    ema=0.5,
)


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


@pytest.mark.parametrize("objective", ["price", "plsd", "ouro", "pondernet", "act", "trm"])
def test_every_objective_trains(objective: Any, tmp_path: Path) -> None:
    settings = replace(TINY, objective=objective, steps=4, gate_only=0.0)
    model = train_looped(settings, tmp_path)
    assert not model.training
    assert model.config.task == "products-S3"
    torch.manual_seed(settings.seed)
    fresh = dict(LoopedForCausalLM(model.config).named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, fresh[name])}
    assert "gate.stop.bias" in moved, "the gate learned nothing"
    assert "model.turn.inject.weight" in moved, "the trunk learned nothing"


def test_it_learns(tmp_path: Path) -> None:
    """An element right after a RESET is itself: learned in seconds, where chance is one in six."""
    model = train_looped(replace(TINY, steps=400, batch=16, learning_rate=1e-2, save_every=400, ema=0.9), tmp_path)
    drawn = task_named("products-S3").batch(64, (0,), test=True)
    answers = model(torch.tensor(drawn.ids_BT)).logits.argmax(-1).numpy()
    near = drawn.difficulty_BT <= 1
    assert (answers == drawn.labels_BT)[near].mean() > 0.8


def test_what_was_trained_is_what_was_saved(tmp_path: Path) -> None:
    model = train_looped(replace(TINY, steps=2), tmp_path)
    assert same(load_looped(tmp_path), model)
    assert all(torch.isfinite(p).all() for p in values(model))


CARRIED = replace(TINY, gradient_turns=1, even=1.0, gate_only=0.0)
GROWING = replace(TINY, task="pointers", model={**TINY.model, "relation_bias": True, "relation_range": 2.0}, easy_first=0.9)


@pytest.mark.parametrize("settings", [TINY, CARRIED, GROWING], ids=["whole", "carried", "growing"])
def test_a_stopped_run_ends_as_one_that_was_not(settings: TrainSettings, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole = train_looped(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_looped(settings, tmp_path / "stopped", stop)
    assert (tmp_path / "stopped" / "work" / "checkpoint-3").is_dir()
    assert same(train_looped(settings, tmp_path / "stopped"), whole)


def test_training_ends_early_where_held_out_loss_no_longer_falls(tmp_path: Path) -> None:
    """At a learning rate of almost nothing no evaluation is better than the one before by more than noise of the last digit."""
    seen: list[int] = []
    still = replace(TINY, steps=60, even=0.1, ramp=0.0, gate_only=0.0, learning_rate=1e-30, warmup=1, patience=2, save_every=5)
    train_looped(still, tmp_path / "still", lambda done, total, what: seen.append(done))
    assert seen[-1] == 20, "evaluated at 10 first, then no better at 15 and at 20"
    moving = replace(still, learning_rate=1e-2, steps=30)
    train_looped(moving, tmp_path / "moving", lambda done, total, what: seen.append(done))
    assert seen[-1] == 30


def test_what_tells_of_a_collapse_is_logged(tmp_path: Path) -> None:
    import json

    said: list[str] = []
    train_looped(TINY, tmp_path, lambda done, total, what: said.append(what))
    assert all("turns " in each for each in said)
    state = json.loads((tmp_path / "work" / "checkpoint-9" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "turns_spread" in entry]
    assert logged
    assert 1 <= logged[0]["turns"] <= 3


def test_deep_supervision_goes_on_from_the_last_state_until_an_item_has_had_its_turns() -> None:
    torch.manual_seed(0)
    config = TINY.config(task_named("products-S3"))
    model, carry = LoopedForCausalLM(config).eval(), Carry()
    had: list[list[int]] = []
    for step in range(4):
        fresh = Batches(task_named("products-S3"), TINY)[step]
        items = dict(carry.enter(fresh, config))
        had.append(items["had"].tolist())
        new = items["had"] == 0
        assert torch.equal(items["input_ids"][new], fresh["input_ids"][: int(new.sum())])
        with torch.no_grad():
            out = model(items["input_ids"], state=items["state"], turns=1, output_turns=True)
            for row, turns in enumerate(items["had"].tolist()):
                if turns <= step:  # not of those that began at a later age
                    whole = model(items["input_ids"][row : row + 1], turns=turns + 1, output_turns=True)
                    torch.testing.assert_close(whole.turn_logits[-1, 0], out.turn_logits[-1, row])
        carry.leave(out.state, 1)
    assert had == [[0, 0, 1, 2], [1, 1, 2, 0], [2, 2, 0, 1], [0, 0, 1, 2]]


def test_a_step_of_more_turns_than_an_item_has_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gradient_turns=4 is more than all turns of an item, 3"):
        replace(TINY, gradient_turns=4).config(task_named("products-S3"))


def test_a_carried_state_must_meet_its_input_again() -> None:
    with pytest.raises(UsageError, match=r"gradient_turns=2 needs an injection, not 'none'"):
        replace(TINY, gradient_turns=2, model={"injection": "none"}).config(task_named("products-S3"))


def test_the_average_is_kept_beside_every_checkpoint(tmp_path: Path) -> None:
    train_looped(TINY, tmp_path)
    kept = sorted(path.parent.name for path in tmp_path.glob("work/*/ema.safetensors"))
    assert kept == ["checkpoint-6", "checkpoint-9"]
    (tmp_path / "work" / "checkpoint-9" / "ema.safetensors").unlink()
    with pytest.raises(FileError, match=r"lacks ema\.safetensors; delete that folder"):
        train_looped(TINY, tmp_path)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    train_looped(replace(TINY, steps=2), tmp_path)
    with pytest.raises(UsageError, match=r"was begun with steps = 2, not 9"):
        train_looped(TINY, tmp_path)


def test_a_loss_that_is_no_number_stops_at_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PriceTrainer.compute_loss

    def broken(self: Any, model: Any, inputs: Any, **more: Any) -> Any:
        if self.state.global_step == 4:
            with torch.no_grad():
                self.model.lm_head.weight.fill_(float("nan"))
        return plain(self, model, inputs, **more)

    monkeypatch.setattr(PriceTrainer, "compute_loss", broken)
    with pytest.raises(AdiError, match=r"the loss of step 4 is nan; the last good checkpoint is in .*work"):
        train_looped(TINY, tmp_path)
    assert (tmp_path / "work" / "checkpoint-3").is_dir()


def test_unknown_fields_of_the_model_and_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.width is no field"):
        train_looped(replace(TINY, model={"width": 3}), tmp_path)
    with pytest.raises(UsageError, match="no task 'chess'"):
        train_looped(replace(TINY, task="chess"), tmp_path)


def test_the_schedule_goes_from_even_weights_to_the_price() -> None:
    settings = replace(TINY, steps=100)
    assert settings.at(0) == (0.0, 1.0, False)
    ramp, floor, alone = settings.at(50)
    assert (ramp, floor, alone) == (pytest.approx(0.5), pytest.approx(0.6), False)
    assert settings.at(60)[:2] == (pytest.approx(1.0), pytest.approx(0.2))
    assert settings.at(95) == (pytest.approx(1.0), pytest.approx(0.2), True)


def test_a_range_of_prices_is_drawn_from_and_given_to_the_gate(tmp_path: Path) -> None:
    settings = replace(TINY, price=0.01, highest_price=1.0, steps=3)
    drawn = [drawn_price(settings, step) for step in range(200)]
    assert 0.01 <= min(drawn) < 0.03
    assert 0.3 < max(drawn) <= 1.0
    assert train_looped(settings, tmp_path).config.gate_price
    for wrong in ({"price": 0.0}, {"price": 2.0}, {"highest_price": None, "model": {**TINY.model, "gate_price": True}}):
        with pytest.raises(UsageError, match="learns from a range"):
            train_looped(replace(settings, **wrong), tmp_path / "wrong")


def test_a_network_of_a_fixed_depth_learns_from_its_last_turn_alone(tmp_path: Path) -> None:
    settings = replace(TINY, objective="last", steps=4, gate_only=0.0, ema=0.0)
    model = train_looped(settings, tmp_path)
    torch.manual_seed(settings.seed)
    fresh = dict(LoopedForCausalLM(model.config).named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, fresh[name])}
    assert "gate.stop.bias" not in moved
    assert "model.turn.inject.weight" in moved


def test_the_hardest_items_grow_by_a_hop_when_those_at_hand_are_answered() -> None:
    growth = Growth(task_named("pointers"))
    seen = []
    for step in range(12 * STEPS):
        seen.append(int(growth.batch(64, (0, step)).difficulty_BT.max()))
        growth.judge(torch.tensor(0.9 if step < STEPS else 1.0))
    assert seen[::STEPS] == [1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8]
    assert seen == sorted(seen)


def test_growing_items_have_turns_by_their_hops_and_a_loss_on_the_later_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen, told = LoopedForCausalLM.forward, list[Any](), list[str]()

    def watched(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        out = plain(self, input_ids, **more)
        seen.append((input_ids, more["turns"], out.turn_logits.detach()))
        return out

    monkeypatch.setattr(LoopedForCausalLM, "forward", watched)
    monkeypatch.setattr(Growth, "hops", property(lambda self: 3))
    settings = replace(GROWING, model={**GROWING.model, "turns": 6}, steps=4, easy_first=0.5)
    model = train_looped(settings, tmp_path, lambda done, total, what: told.append(what))
    assert [turns for _, turns, _ in seen] == [4, 4, 6, 6]
    for step, (ids_BT, _, logits) in enumerate(seen[:2]):
        drawn = easier(task_named("pointers"), 3).batch(settings.batch, (settings.seed, step))
        assert torch.equal(ids_BT, torch.tensor(drawn.ids_BT))
        loss_RN = model.losses(logits, torch.tensor(drawn.labels_BT))
        assert told[step].startswith(f"loss {16 * float(loss_RN[1:].mean()):.3f},"), "an item's loss is that of its 16 starts"


def test_only_tasks_with_hops_grow_and_none_that_is_carried_on() -> None:
    with pytest.raises(UsageError, match="mazes has none"):
        TrainSettings(task="mazes", easy_first=0.1).config(task_named("mazes"))
    with pytest.raises(UsageError, match="gradient_turns=2 keeps items"):
        replace(GROWING, gradient_turns=2).config(task_named("pointers"))
