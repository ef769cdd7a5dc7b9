"""Exit heads as graphs against their slow twin in torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.exits.heads import Adapter, head_function, predict, shortlist
from adi.exits.signals import HeadRows, Prediction, entropy, margin, top_probability
from adi.model.backbone import ReadOut
from conftest import random_exits
from families import tiny

pytest.importorskip("openvino")
VOCABULARY, RANK = 300, 8


def parts(norm: str, width: int, bias: bool, size: int) -> tuple[Adapter, ReadOut, torch.Tensor]:
    draw = torch.Generator().manual_seed(width + size)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    readout = ReadOut(
        norm, some(width), some(width), 1e-5, 3 * some(VOCABULARY, width), some(VOCABULARY) if bias else None, 0.7
    )
    adapter = Adapter(
        1 + 0.1 * some(width), 0.1 * some(width), 0.1 * some(width, RANK), some(width, RANK), some(width), some(1)
    )
    return adapter, readout, torch.randperm(VOCABULARY, generator=draw)[:size].sort().values


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # or users read it
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(
    ("norm", "width", "bias", "size"),
    [("rms", 64, False, 90), ("layer", 36, True, 41), ("rms", 48, True, 2), ("rms", 32, False, 1)],
)
def test_a_compiled_head_says_what_torch_says(norm: str, width: int, bias: bool, size: int, eight_bits: bool) -> None:
    import openvino as ov

    from adi.model.openvino.modules import OpenVinoModule, converted

    adapter, readout, ids_S = parts(norm, width, bias, size)
    among = shortlist(readout, ids_S)
    core = ov.Core()
    graph = functools.partial(
        converted, core, None, "head", lambda: head_function(adapter, readout, ids_S), [width], eight_bits
    )
    run = OpenVinoModule(core, graph, {"INFERENCE_PRECISION_HINT": "f32"})

    def head(hidden_TD: torch.Tensor) -> Prediction:
        *rows, log_probs_TS = map(torch.from_numpy, run(hidden_TD))
        return Prediction(log_probs_TS, ids_S, rows[3], VOCABULARY - size, HeadRows(*rows))

    hidden_TD = 5 * torch.randn((200, width), generator=torch.Generator().manual_seed(7))
    wanted = predict(adapter, among, hidden_TD)
    for rows in (slice(0, 200), slice(3, 4), slice(10, 12)):
        some = hidden_TD[rows]
        got = head(some)
        slow = predict(adapter, among, some)
        best = slow.log_probs_TS.argmax(-1)
        if not eight_bits:
            torch.testing.assert_close(got.log_probs_TS, slow.log_probs_TS, atol=1e-3, rtol=1e-4)
            for measure in (entropy, margin, top_probability):
                torch.testing.assert_close(measure(got), measure(slow), atol=1e-4, rtol=1e-4)
            assert torch.equal(got.rows.place_T, best)
        assert torch.equal(got.rows.place_T, got.log_probs_TS.argmax(-1))
    if eight_bits:
        got = head(hidden_TD)
        assert (got.rows.place_T == wanted.log_probs_TS.argmax(-1)).float().mean() > 0.9
        assert (entropy(got) - entropy(wanted)).abs().mean() < 0.1


def test_readings_on_the_compiled_engine_come_from_it() -> None:
    """Verified generation with trained-form heads: same text as full depth, measures from the graph, all of them on demand."""
    from adi.model.openvino import export_and_open

    model = adi.Model(export_and_open(tiny("llama"), name="llama", precision="fp32"), None, frozenset())
    exits = random_exits(model, (2, 4), adi.Threshold("top_probability", 0.0))
    full = adi.generate(model, [1, 2, 3], adi.FullDepth(), max_new_tokens=12)
    got = adi.generate(model, [1, 2, 3], adi.Verified(exits, exits.trigger), max_new_tokens=12, logprobs=3)
    assert got.token_ids == full.token_ids
    twin = adi.load(tiny("llama"))
    slow = adi.generate(twin, [1, 2, 3], adi.Verified(exits, exits.trigger), max_new_tokens=12, logprobs=3)
    for mine, theirs in zip(got.steps, slow.steps, strict=True):
        for a, b in zip(mine.looks, theirs.looks, strict=True):
            assert (a.depth, a.token) == (b.depth, b.token)
            assert a.signals["entropy"] == pytest.approx(b.signals["entropy"], abs=1e-3)
            assert a.candidates[0].token == a.token


def test_a_function_is_converted_once_and_again_only_where_it_is_damaged(tmp_path: Path) -> None:
    import openvino as ov

    from adi.model.openvino.modules import OpenVinoModule, converted

    core, built = ov.Core(), []

    def function() -> Any:
        built.append(1)
        return lambda x_TD: (x_TD * 2,)

    def run(name: str) -> list[float]:
        graph = functools.partial(converted, core, tmp_path, name, function, [3], False)
        return OpenVinoModule(core, graph, {})(torch.ones(1, 3))[0].ravel().tolist()  # type: ignore[no-any-return]

    assert run("double") == [2, 2, 2]
    assert run("double") == [2, 2, 2]
    assert len(built) == 1
    run("another")
    assert len(built) == 2
    for file in tmp_path.rglob("graph.xml"):
        file.write_text("<damaged")
    assert run("double") == [2, 2, 2]
    assert len(built) == 3
