"""The drafter: its step against a twin in plain Python and as a graph, and what it reads from a model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adi
from adi.drafters.network import EPS, Drafter, advance, first_state, fresh_drafter, predict, shapes, step_function
from adi.exits.heads import shortlist
from adi.model.backbone import ReadOut, Rows, States
from conftest import random_drafter, random_exits
from families import FAMILIES, VOCABULARY, tiny


def parts(norm: str, width: int, bias: bool, size: int, hidden: int = 20) -> tuple[Drafter, ReadOut]:
    """A random drafter beside a random read-out of ``VOCABULARY`` tokens."""
    draw = torch.Generator().manual_seed(width + size)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    bias_V = some(VOCABULARY) if bias else None
    readout = ReadOut(norm, 1 + 0.1 * some(width), 0.1 * some(width), 1e-6, some(VOCABULARY, width), bias_V, 0.7)
    ids_S = torch.randperm(VOCABULARY, generator=draw)[:size].sort().values
    net = fresh_drafter(readout, ids_S, hidden, draw)
    return net.map(lambda weight: weight + 0.1 * some(*weight.shape)), readout


def compiled_step(net: Drafter, readout: ReadOut, eight_bits: bool) -> Any:
    """A step as the compiled engine runs it."""
    ov = pytest.importorskip("openvino")
    from adi.model.openvino.modules import OpenVinoModule, converted

    core, width = ov.Core(), len(net.out_D)
    graph = partial(converted, core, None, "step", lambda: step_function(net, readout), [width] * 2, eight_bits)
    return OpenVinoModule(core, graph, {"INFERENCE_PRECISION_HINT": "f32"})


def normed(row: list[float], kind: str, eps: float, gain: list[float], shift: list[float]) -> list[float]:
    if kind == "layer":
        mean = sum(row) / len(row)
        row = [value - mean for value in row]
    size = math.sqrt(sum(value * value for value in row) / len(row) + eps)
    return [value / size * g + s for value, g, s in zip(row, gain, shift, strict=True)]


def times(matrix: torch.Tensor, row: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(line, row, strict=True)) for line in matrix.tolist()]


def slow_step(net: Drafter, readout: ReadOut, x: list[float], state: list[float]) -> list[float]:
    """One row's next state, number by number."""
    zeros = [0.0] * len(x)
    u = times(net.mix_DE, normed(x, "rms", EPS, net.shallow_D.tolist(), zeros) + state)
    n = normed(u, "rms", EPS, net.gain_D.tolist(), zeros)
    gate, up = times(net.gate_FD, n), times(net.up_FD, n)
    inner = [g / (1 + math.exp(-g)) * v for g, v in zip(gate, up, strict=True)]
    u = [a + b for a, b in zip(u, times(net.down_DF, inner), strict=True)]
    return normed(u, readout.norm, readout.eps, net.out_D.tolist(), net.shift_D.tolist())


def slow_words(net: Drafter, readout: ReadOut, state: list[float]) -> dict[int | str, float]:
    """Log-probability of every token of the shortlist and of the "tail"."""
    logits: dict[int | str, float] = {}
    for token in net.ids_S.tolist():
        (logit,) = times(readout.weight_VD[token : token + 1], state)
        logits[token] = readout.scale * (logit + (0.0 if readout.bias_V is None else float(readout.bias_V[token])))
    logits["tail"] = sum(a * b for a, b in zip(net.tail_D.tolist(), state, strict=True)) + float(net.tail_bias)
    total = math.log(sum(math.exp(logit) for logit in logits.values()))
    return {token: logit - total for token, logit in logits.items()}


KINDS = [("rms", 16, False, 30), ("layer", 12, True, 11), ("rms", 8, True, 2), ("layer", 8, False, 1)]


@pytest.mark.parametrize(("norm", "width", "bias", "size"), KINDS)
def test_a_step_is_what_the_twin_works_out_row_by_row(norm: str, width: int, bias: bool, size: int) -> None:
    net, readout = parts(norm, width, bias, size)
    draw = torch.Generator().manual_seed(3)
    x_TD, deep_TD = 3 * torch.randn((4, width), generator=draw), 5 * torch.randn((4, width), generator=draw)
    state_TD = first_state(readout, deep_TD)
    for row in range(4):
        plain = normed(deep_TD[row].tolist(), norm, readout.eps, readout.gain_D.tolist(), readout.shift_D.tolist())
        torch.testing.assert_close(state_TD[row], torch.tensor(plain), atol=1e-4, rtol=1e-4)
    for _ in range(3):  # each on its own state from the one before
        slow = [slow_step(net, readout, x.tolist(), s.tolist()) for x, s in zip(x_TD, state_TD, strict=True)]
        state_TD = advance(net, readout, x_TD, state_TD)
        torch.testing.assert_close(state_TD, torch.tensor(slow), atol=1e-4, rtol=1e-4)
        said = predict(net, shortlist(readout, net.ids_S), state_TD)
        assert said.tail_T is not None
        for row, wanted in enumerate(slow_words(net, readout, s.tolist()) for s in state_TD):
            got = {
                **dict(zip(net.ids_S.tolist(), said.log_probs_TS[row].tolist(), strict=True)),
                "tail": float(said.tail_T[row]),
            }
            assert got == pytest.approx(wanted, abs=1e-4)


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_rows_know_nothing_of_each_other(rows: int, seed: int) -> None:
    net, readout = parts("rms", 16, False, 30)
    draw = torch.Generator().manual_seed(seed)
    x_TD, state_TD = torch.randn((rows, 16), generator=draw), torch.randn((rows, 16), generator=draw)
    together = advance(net, readout, x_TD, state_TD)
    alone = torch.cat([advance(net, readout, x[None], s[None]) for x, s in zip(x_TD, state_TD, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(("norm", "width", "bias", "size"), [("rms", 64, False, 90), ("layer", 36, True, 41), *KINDS[2:]])
def test_a_compiled_step_does_what_torch_does(norm: str, width: int, bias: bool, size: int, eight_bits: bool) -> None:
    net, readout = parts(norm, width, bias, size, hidden=48)
    among, compiled = shortlist(readout, net.ids_S), compiled_step(net, readout, eight_bits)
    draw = torch.Generator().manual_seed(7)
    x_TD, state_TD = 5 * torch.randn((200, width), generator=draw), torch.randn((200, width), generator=draw)
    for rows in (slice(0, 200), slice(3, 4), slice(10, 12), slice(4, 5)):
        wanted = advance(net, readout, x_TD[rows], state_TD[rows])
        place_T, log_T, state = (torch.from_numpy(a) for a in compiled(x_TD[rows], state_TD[rows].numpy()))
        slow = predict(net, among, wanted if not eight_bits else state)
        same = place_T == slow.log_probs_TS.argmax(-1)
        if eight_bits:
            assert len(same) < 9 or same.float().mean() > 0.9
            near = torch.nn.functional.cosine_similarity(state, wanted, dim=-1)
            assert near.min() > 0.97
            continue
        torch.testing.assert_close(state, wanted, atol=1e-4, rtol=1e-4)
        assert same.all()
        torch.testing.assert_close(log_T, slow.log_probs_TS.amax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("norm", "width", "bias", "size"), [("rms", 64, False, 90), ("layer", 36, True, 41)])
def test_drafting_starts_alike_from_arrays_and_tensors(norm: str, width: int, bias: bool, size: int) -> None:
    _, readout = parts(norm, width, bias, size, hidden=48)
    deep_TD = 30 * torch.randn((3, width), generator=torch.Generator().manual_seed(3))
    plain = replace(readout, gain_D=readout.gain_D.numpy(), shift_D=readout.shift_D.numpy())
    got = first_state(plain, deep_TD.numpy())
    assert got.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(got), first_state(readout, deep_TD), atol=1e-5, rtol=1e-5)


def test_what_a_compiled_step_gave_stays_what_it_was() -> None:
    net, readout = parts("rms", 16, False, 30)
    compiled, first = compiled_step(net, readout, False), np.ones((1, 16), np.float32)
    _, log, state = compiled(first, first)
    kept, kept_log = state.copy(), float(log[0])
    _, other, _ = compiled(-first, first)
    assert np.array_equal(state, kept)
    assert float(log[0]) == kept_log != float(other[0])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_both_engines_embed_what_enters_their_first_block(family: str) -> None:
    pytest.importorskip("openvino")
    from adi.model.openvino import export_and_open

    ids = (5, 7, 5, VOCABULARY - 1, 0)
    compiled = [export_and_open(tiny(family), name=family, precision=precision) for precision in ("fp32", "int8")]
    engines: list[Any] = [adi.load(tiny(family)).backbone, *compiled]
    for backbone in engines:
        x_TD = backbone.embed(ids).hidden_TD
        alone = [backbone.forward([Rows(backbone.new_cache(), 0, (i,), None)], 0, 1)[0].before_TD for i in ids]
        torch.testing.assert_close(x_TD, torch.cat(alone), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x_TD[2:3], backbone.embed((5,)).hidden_TD, atol=0, rtol=0)
    torch.testing.assert_close(*(engine.embed(ids).hidden_TD for engine in engines[:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_last_mlp_is_the_last_blocks_own(family: str) -> None:
    backbone: Any = adi.load(tiny(family)).backbone
    mlp = backbone.last_mlp()
    block, seen = backbone.model.model.layers[-1], {}
    handles = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(given=args[0])),
        block.mlp.register_forward_hook(lambda *args: seen.update(gave=args[2])),
    ]
    with torch.no_grad():
        backbone.model(torch.tensor([[3, 1, 4, 1, 5]]))
    for handle in handles:
        handle.remove()
    h = seen["given"][0]
    n = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + backbone.model.config.rms_norm_eps) * mlp["gain_D"]
    made = (torch.nn.functional.silu(n @ mlp["gate_FD"].T) * (n @ mlp["up_FD"].T)) @ mlp["down_DF"].T
    torch.testing.assert_close(made, seen["gave"][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_last_mlp_fits_a_drafter_or_is_none(family: str) -> None:
    backbone: Any = adi.load(tiny(family)).backbone
    mlp, width = backbone.last_mlp(), backbone.spec.width
    if family in ("gpt2", "opt", "bloom", "phi", "gpt_neox"):
        assert mlp is None, "no gate"
    if family in ("llama", "qwen2", "gemma", "gemma3"):
        assert mlp is not None
    if mlp is not None:
        wanted = shapes(width, mlp["gate_FD"].shape[0])
        assert {name: tuple(tensor.shape) for name, tensor in mlp.items()} == {name: wanted[name] for name in mlp}
        assert set(mlp) == {"gain_D", "gate_FD", "up_FD", "down_DF"}
        assert not any(tensor.requires_grad for tensor in mlp.values())
        before = {name: tensor.clone() for name, tensor in mlp.items()}
        made = fresh_drafter(_readout(width), torch.arange(8), 0, torch.Generator().manual_seed(0), mlp)
        assert {name: tuple(tensor.shape) for name, tensor in made.tensors().items() if name != "ids_S"} == wanted
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.last_mlp().items())


def _readout(width: int) -> ReadOut:
    return ReadOut("rms", torch.ones(width), torch.zeros(width), 1e-5, torch.ones(VOCABULARY, width), None, 1.0)


def test_both_engines_draft_alike() -> None:
    pytest.importorskip("openvino")
    from adi.model.openvino import export_and_open

    slow = adi.load(tiny("llama"))
    exits = replace(random_exits(slow, (2,), adi.Never()), drafter=random_drafter(slow, VOCABULARY))
    backbone = export_and_open(tiny("llama"), name="llama", precision="fp32")
    mine, theirs = exits.drafting(backbone), exits.drafting(slow.backbone)
    assert mine is not None
    assert theirs is not None
    assert mine.key == theirs.key
    deep = States(torch.randn(1, slow.backbone.spec.width, generator=torch.Generator().manual_seed(5)))
    a, b, token = mine.start(States(deep.raw_TD.numpy())), theirs.start(deep), 7
    for _ in range(12):
        ((guess,), a), ((twin,), b) = mine.step([token], a), theirs.step([token], b)
        assert (guess.token, guess.depth) == (twin.token, 0)
        assert guess.signals["top_probability"] == pytest.approx(twin.signals["top_probability"], abs=1e-4)
        token = guess.token
