"""``adi.solve``: one result per item, whatever their lengths and order; what is no item or option is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adi.decoding.looped.solve import Solved, solve
from adi.errors import AdiError, FileError, ModelError, UsageError
from adi.model.load import load_looped
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.tasks.registry import task_named


def made(name: str, **form: Any) -> LoopedForCausalLM:
    torch.manual_seed(0)
    known = task_named(name)
    sizes = {"vocab_size": known.vocabulary, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 4}
    return LoopedForCausalLM(LoopedConfig(**{**sizes, "causal": known.causal, "task": name, **form})).eval()


PRODUCTS = made("products-S3", halt_threshold=0.0)
SUDOKU = made("sudoku6", positions="learned", max_position_embeddings=36)
DIAL = made("products-S3", gate_price=True, price_range=[0.01, 1.0])
PUZZLE = "12" + "." * 34


def test_results_are_one_per_item_in_their_order() -> None:
    items = [[0, 1, 2], [3], [4, 5], [6, 1, 1], [2]]
    found = solve(PRODUCTS, items)
    assert [len(each.answers) for each in found] == [3, 1, 2, 3, 1]
    for item, each in zip(items, found, strict=True):
        assert isinstance(each.turns, list)
        assert each.turns == [1] * len(item)  # a threshold of 0 halts at once
        assert solve(PRODUCTS, [item])[0].answers == each.answers
    assert [each.turns for each in solve(PRODUCTS, items, halt=False)] == [[4] * len(item) for item in items]
    assert solve(PRODUCTS, []) == []


def test_ids_come_as_arrays_and_tensors_too() -> None:
    import numpy as np

    plain = solve(PRODUCTS, [[0, 1, 2]])
    for item in (np.array([0, 1, 2]), torch.tensor([0, 1, 2]), (0, 1, 2)):
        assert solve(PRODUCTS, [item])[0].answers == plain[0].answers


def test_a_puzzle_keeps_its_clues_and_has_one_number_of_turns() -> None:
    (found,) = solve(SUDOKU, [PUZZLE])
    assert isinstance(found, Solved)
    assert isinstance(found.answers, str)
    assert (len(found.answers), found.answers[:2], found.turns) == (36, "12", 4)
    assert isinstance(found.sure, float)


def test_turns_end_where_the_model_was_trained_unless_asked_for() -> None:
    assert solve(PRODUCTS, [[1]], halt=False, most=2)[0].turns == [2]
    assert solve(PRODUCTS, [[1]], halt=False, most=9)[0].turns == [4]
    assert solve(PRODUCTS, [[1]], halt=False, most=9, beyond_trained=True)[0].turns == [9]


def test_a_race_is_won_by_the_first_of_the_boards_symmetries_to_halt() -> None:
    """Against each symmetric board solved alone, its answer carried back by hand."""
    import numpy as np

    from adi.tasks.sudoku import GAMES

    game, model = GAMES["sudoku6"], made("sudoku6", positions="learned", max_position_embeddings=36, halt_threshold=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        model.gate.stop.bias.zero_()
    drawn = [np.array(game.puzzle(np.random.default_rng(n))[0]) for n in range(6)]
    puzzles = [game.text(board) for board in drawn]
    cells, digits = game.symmetries(4, np.random.default_rng(7))
    cells[0], digits[0] = np.arange(36), np.arange(7)
    raced = solve(model, puzzles, starts=4, seed=7)
    for board, found in zip(drawn, raced, strict=True):
        alone = [solve(model, [game.text(digits[k][board[cells[k]]])])[0] for k in range(4)]
        turns = [each.turns for each in alone]
        won = alone[found.start]
        assert won.turns == min(turns) == found.turns  # type: ignore[type-var]
        back = np.zeros(36, int)
        back[cells[found.start]] = [digits[found.start].tolist().index(".123456".index(digit)) for digit in won.answers]
        assert found.answers == game.text(back)
        assert found.sure == pytest.approx(won.sure, abs=1e-5)
    assert len({found.start for found in raced}) > 1
    (one,) = solve(model, puzzles[:1], starts=4, seed=7)
    assert (one.answers, one.start) == (raced[0].answers, raced[0].start)


def test_pointers_start_with_noise_and_the_first_start_without() -> None:
    model = made("pointers", halt_threshold=0.01)
    items = task_named("pointers").batch(3, (0,)).ids_BT
    raced = solve(model, items, starts=3)
    assert [found.turns for found in raced] == [1, 1, 1]
    assert {found.start for found in raced} <= {0, 1, 2}
    assert [found.start for found in solve(model, items)] == [0, 0, 0]


def test_a_folder_is_a_model_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    PRODUCTS.save_pretrained(tmp_path)
    assert solve(tmp_path, [[1, 2]])[0].answers == solve(PRODUCTS, [[1, 2]])[0].answers
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_looped(tmp_path)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"hidden_size": "x"}, "cannot be read: hidden_size of a looped model is 'x'"),
        ({"intermediate_size": 33}, r"is none of its config.json: .*mlp.* has the shape \[\d+, \d+\] and not \[\d+, \d+\]"),
        ({"task": "products-D4"}, "no model of products-D4: vocab_size 7 and causal True are not 9 and True"),
        ({"task": "chess"}, "no task 'chess'"),
        ({"turns": 0}, "turns=0"),
    ],
)
def test_a_changed_configuration_is_named(changed: dict[str, Any], match: str, tmp_path: Path) -> None:
    PRODUCTS.save_pretrained(tmp_path)
    page = tmp_path / "config.json"
    page.write_text(json.dumps({**json.loads(page.read_text()), **changed}))
    with pytest.raises(AdiError, match=match):
        solve(tmp_path, [[1]])


def test_numbers_of_other_libraries_are_numbers() -> None:
    import numpy as np

    found = solve(PRODUCTS, [[1, 2]], most=np.int64(2), threshold=np.float32(1.0))
    assert found[0].turns == [2, 2]


def test_missing_weights_are_counted(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    PRODUCTS.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("gate.hidden.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, among them gate\.hidden\.weight"):
        load_looped(tmp_path)


@pytest.mark.parametrize(
    ("model", "items", "options", "match"),
    [
        (PRODUCTS, [[9]], {}, "9 is no id of S3"),
        (PRODUCTS, ["12"], {}, "a list of ids, not str"),
        (SUDOKU, ["12"], {}, "has 2 characters"),
        (SUDOKU, [[1]], {}, "a text of 36 characters, not list"),
        (PRODUCTS, [[1]], {"price": 0.1}, "knows no price"),
        (DIAL, [[1]], {"price": -1}, "price is -1; it must be a number from 0.01 to 1, nats for a full pass"),
        (DIAL, [[1]], {"price": 1.5}, "price is 1.5; it must be a number from 0.01 to 1, nats for a full pass"),
        (PRODUCTS, [[1]], {"most": 0}, "most is 0; it must be a whole number of at least 1"),
        (PRODUCTS, [[1]], {"threshold": 2}, "threshold is 2"),
        (PRODUCTS, [[1]], {"starts": 2}, "starts is 2, a race to halt first, but places of a text halt one by one"),
        (SUDOKU, [PUZZLE], {"starts": 2, "halt": False}, "starts is 2, a race to halt first, but halt=False"),
        (SUDOKU, [PUZZLE], {"starts": 0}, "starts is 0"),
        (made("products-S3", gate_price=True), [[1]], {}, "give price=0.05"),
        (made("products-S3", task=None), [[1]], {}, "no 'task'"),
        (made("products-S3").train(), [[1]], {}, "training mode"),
        (3, [[1]], {}, "not int"),
    ],
)
def test_what_has_no_meaning_is_refused(model: Any, items: Any, options: Any, match: str) -> None:
    with pytest.raises(AdiError, match=match):
        solve(model, items, **options)


def test_no_price_is_the_middle_of_those_that_a_gate_was_trained_over() -> None:
    with torch.no_grad():
        DIAL.gate.hidden.weight.normal_(0, 1)
        DIAL.gate.stop.weight.normal_(0, 1)
    items = [[0, 1, 2, 3, 4, 5]]
    middle = DIAL(torch.tensor(items), output_turns=True, price=0.1).halt_logits
    assert torch.equal(DIAL(torch.tensor(items), output_turns=True).halt_logits, middle)
    assert not torch.allclose(DIAL(torch.tensor(items), output_turns=True, price=1.0).halt_logits, middle)
    threshold = float(middle[1].sigmoid().median())
    assert solve(DIAL, items, threshold=threshold) == solve(DIAL, items, threshold=threshold, price=0.1)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(FileError, match="no looped model 'sudoku9'"):
        solve("sudoku9", [])
    with pytest.raises(UsageError, match="knows no price"):
        solve(PRODUCTS, [], price=1.0)
