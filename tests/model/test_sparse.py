"""Sparse layers against a slow loop over their units; which loss reaches which weights; looped models made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.decoding.frontier import Frontier
from adi.decoding.looped.compiled import compiled
from adi.decoding.looped.halting import Rule
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.model.sparse import SplLinear
from looped import gated, ids


def layer(inputs: int = 5, units: int = 7) -> SplLinear:
    made = SplLinear(inputs, units)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_each_unit_speaks_where_its_match_passes_its_cost(scale: float) -> None:
    made, x_NI = layer(), torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made.router.gates *= scale / made.router.gates.abs().max()
        found_NF = made(x_NI)
    made.requires_grad_(False)
    largest = max(1.0, max(abs(float(gate)) for gate in made.router.gates))
    spoke = 0
    for n, x in enumerate(x_NI.tolist()):
        for j in range(7):
            match = sum(a * float(p) for a, p in zip(x, made.router.prototypes[j], strict=True)) / math.sqrt(5)
            inner = sum(a * float(m) for a, m in zip(x, made.weight[j], strict=True)) + float(made.bias[j])
            speaks = match - float(made.router.gates[j]) / largest > 0
            spoke += speaks
            assert float(found_NF[n, j]) == pytest.approx(inner / (1 + math.exp(-inner)) if speaks else 0.0, abs=1e-5)
    assert 0 < spoke < 63


def test_the_main_loss_reaches_weights_and_inputs_and_the_rule_prototypes_and_gates() -> None:
    made, x_NI = layer(), torch.randn(9, 5, requires_grad=True)
    made(x_NI).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (made.weight, made.bias, x_NI))
    assert made.router.prototypes.grad is None
    assert made.router.gates.grad is None
    made, x_NI = layer(), torch.randn(9, 5, requires_grad=True)
    made.router(x_NI).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.router.parameters())
    assert made.weight.grad is None
    assert made.bias.grad is None
    assert x_NI.grad is None


def test_about_half_of_the_units_speak_at_first() -> None:
    torch.manual_seed(0)
    share = float((SplLinear(64, 256).router(torch.randn(200, 64)) > 0).float().mean())
    assert 0.45 < share < 0.55


@pytest.mark.parametrize("where", ["relu", "mlp", "all"])
def test_a_sparse_looped_model_decodes_verified_as_at_full_depth_and_is_kept(where: str, tmp_path: Path) -> None:
    network = gated(True, sparse=where, turns=4)
    assert sum(isinstance(m, SplLinear) for m in network.modules()) == {"relu": 0, "mlp": 1, "all": 5}[where]
    model = adi.load(network)
    policy = adi.Verified(adi.bare_exits(model, (1, 2)), adi.Threshold("top_probability", 0.0))
    full, drafted = (adi.generate(model, [1, 2, 3], p, max_new_tokens=8) for p in (adi.FullDepth(), policy))
    assert full.token_ids == drafted.token_ids
    if where != "relu":
        route_TF = shown(model, network, [1, 2, 3])
        assert route_TF.shape == (3, 32)
        assert (route_TF < 0).any()
    network.save_pretrained(tmp_path)
    again: Any = LoopedForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids(2, 9)).logits, network(ids(2, 9)).logits)


def shown(model: adi.Model, network: LoopedForCausalLM, text: list[int]) -> torch.Tensor:
    """The tap after two turns, which must be the routing logits of the MLP there."""
    seen: list[torch.Tensor] = []
    hook = network.model.turn.layers[0].mlp.up_proj.router.register_forward_hook(lambda _, given, out: seen.append(out))  # type: ignore[union-attr]
    with torch.no_grad():
        network(torch.tensor([text]), turns=2)
    hook.remove()
    frontier = Frontier(model.backbone, mlp=True)
    frontier.append(text)
    frontier.advance(2)
    assert frontier.last is not None
    route_TF = frontier.last.mlp_TF
    frontier.close()
    assert route_TF is not None
    assert torch.allclose(route_TF, seen[1][0], atol=1e-5)
    return route_TF


def test_what_a_turn_injects_is_not_taken_for_its_mlp() -> None:
    network, seen = gated(True, intermediate_size=48), list[torch.Tensor]()
    network.model.turn.layers[0].mlp.down_proj.register_forward_hook(lambda _, given, out: seen.append(given[0]))  # type: ignore[union-attr, operator]
    frontier = Frontier(adi.load(network).backbone, mlp=True)
    frontier.append([1, 2, 3])
    frontier.advance(2)
    assert frontier.last is not None
    assert torch.equal(frontier.last.mlp_TF, seen[-1][0])  # type: ignore[arg-type]


def test_fresh_prototypes_gates_and_biases_start_as_published() -> None:
    torch.manual_seed(0)
    made = LoopedForCausalLM(LoopedConfig(sparse="mlp", initializer_range=0.1)).model.turn.layers[0].mlp.up_proj
    assert isinstance(made, SplLinear)
    made.requires_grad_(False)
    assert float(made.router.prototypes.std()) == pytest.approx(0.02, rel=0.05)
    assert float(made.weight.std()) == pytest.approx(0.1, rel=0.05)
    assert not made.router.gates.any()
    assert not made.bias.any()


def test_another_form_of_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match="sparse is 'some'; choose one of none, relu, mlp, all"):
        LoopedConfig(sparse="some")


def test_compiled_halting_refuses_sparse_models_by_name() -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match="sparse='mlp' halts place by place on backend 'hf'"):
        compiled(gated(True, sparse="mlp")).run(ids(2, 9), Rule(0.5, 6, backend="openvino"), torch.ones(2, 9), None)
