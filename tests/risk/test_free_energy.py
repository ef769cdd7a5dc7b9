"""Free energy of every token: what a slow reading of the model says, at no cost where nobody asks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import adi
from adi.decoding.records import FreeEnergy
from adi.machine import energy_meter
from adi.measure.trace_page import trace_page
from adi.risk.free_energy import free_energy, least_free_energy
from adi.training import price as tensors
from support import adi_

PROMPT = "the quick brown fox"


def by_exits(model: adi.Model, **rule: Any) -> adi.Verified:
    return adi.Verified(adi.bare_exits(model, (2, 5)), adi.Threshold("top_probability", {2: 0.02, 5: 0.0}), **rule)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_free_energy_exceeds_the_least_by_tau_times_the_divergence(tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    loss_RN, cost_R = 3 * torch.rand(5, 8, generator=generator, dtype=torch.float64), tensors.costs(5).double()
    q_RN = torch.rand(5, 8, generator=generator, dtype=torch.float64).softmax(0)
    best_RN = tensors.posterior(loss_RN, cost_R, 0.7, tau)
    for n in range(8):
        levels = [float(loss_RN[r, n] + 0.7 * cost_R[r]) for r in range(5)]
        q, best = q_RN[:, n].tolist(), best_RN[:, n].tolist()
        slow = sum(q[r] * levels[r] for r in range(5)) + tau * sum(q[r] * math.log(q[r]) for r in range(5))
        divergence = sum(a * math.log(a / b) for a, b in zip(q, best, strict=True))
        assert free_energy(q, levels, tau) == pytest.approx(slow)
        assert free_energy(q, levels, tau) - least_free_energy(levels, tau) == pytest.approx(tau * divergence)
        assert free_energy(q, levels, tau) == pytest.approx(float(tensors.free_energy(q_RN, loss_RN, cost_R, 0.7, tau)[n]))
        assert least_free_energy(levels, tau) == pytest.approx(float(tensors.least_free_energy(loss_RN, cost_R, 0.7, tau)[n]))


def test_without_a_temperature_the_least_is_the_lowest_level() -> None:
    assert least_free_energy((2.0, 0.5, 3.0)) == 0.5
    assert least_free_energy((2.0, 0.5, 3.0), 1e-4) == pytest.approx(0.5)
    assert free_energy((0.0, 0.0, 1.0), (2.0, 0.5, 3.0)) == 3.0


def test_surprise_and_regret_are_those_of_a_slow_reading(tiny_model: adi.Model, tiny_hf: Any) -> None:
    g = adi.generate(tiny_model, PROMPT, by_exits(tiny_model), max_new_tokens=24, stop_at_eos=False, price=0.6, logprobs=2)
    assert len({step.level for step in g.steps}) > 1, "exits and full depth both decide"
    ids = torch.tensor([[*g.prompt_ids, *g.token_ids]])
    with torch.no_grad():
        states = tiny_hf.model(ids, output_hidden_states=True).hidden_states
        for i, step in enumerate(g.steps):
            place, levels = len(g.prompt_ids) + i - 1, {}
            for depth in {look.depth for look in step.looks}:
                state = states[depth][0, place]
                read = state if depth == g.layers else tiny_hf.model.norm(state)  # the last one is given with its norm
                loss = -float(tiny_hf.lm_head(read).log_softmax(-1)[step.token])
                levels[depth] = loss + 0.6 * depth / g.layers
                (look,) = [look for look in step.looks if look.depth == depth]
                assert look.surprise == pytest.approx(loss, abs=1e-4)
            surprise = levels[g.layers] - 0.6
            level = levels[step.depth] = surprise + 0.6 * step.depth / g.layers
            assert step.surprise == pytest.approx(surprise, abs=1e-4)
            assert step.price == pytest.approx(0.6 * step.depth / g.layers)
            assert step.regret == pytest.approx(level - min(levels.values()), abs=1e-4)
            assert (step.regret or 0.0) >= 0
    free = g.summary().free_energy
    assert free is not None
    assert free.total == pytest.approx(free.surprise + free.price)
    assert free.price == pytest.approx(0.6 * free.depth_share)
    assert str(free) in str(g.summary())


def test_in_reflex_mode_the_exit_that_decided_tells_the_surprise(tiny_model: adi.Model) -> None:
    policy = adi.Reflex(adi.bare_exits(tiny_model, (2, 4)), trigger=adi.Threshold("top_probability", 0.0))
    g = adi.generate(tiny_model, PROMPT, policy, max_new_tokens=6, stop_at_eos=False, price=1, logprobs=1)
    for step in g.steps:
        assert step.surprise == pytest.approx(-step.logprobs[step.token], abs=1e-5)
        assert step.price == step.depth / g.layers


def test_a_token_outside_a_shortlist_has_its_share_of_the_tail(tiny_model: adi.Model) -> None:
    from conftest import random_exits

    exits = random_exits(tiny_model, (2,), adi.Always((2,)))
    g = adi.generate(tiny_model, PROMPT, adi.Verified(exits, exits.trigger), max_new_tokens=12, stop_at_eos=False, price=1)
    assert all(step.surprise is not None and math.isfinite(step.regret or 0.0) for step in g.steps)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}])
def test_a_price_changes_no_token(tiny_model: adi.Model, sampling: dict[str, Any]) -> None:
    for policy in (adi.FullDepth(), adi.Verified(), by_exits(tiny_model)):
        options = {"max_new_tokens": 16, "stop_at_eos": False, **sampling}
        plain, priced = (adi.generate(tiny_model, PROMPT, policy, **options, **more) for more in ({}, {"price": 0.5}))
        assert plain.token_ids == priced.token_ids
        assert all(step.surprise is None and step.price is None and step.regret is None for step in plain.steps)
        assert plain.summary().free_energy is None


def test_nobody_who_does_not_ask_pays(tiny_model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from adi.decoding.frontier import HeadPass

    asked = []
    monkeypatch.setattr(
        HeadPass, "run", lambda self, backbone, run=HeadPass.run: asked.append(self.logits) or run(self, backbone)
    )
    adi.generate(tiny_model, PROMPT, max_new_tokens=4)
    assert asked
    assert not any(asked)


@pytest.mark.parametrize("price", [-1, math.nan, "1", True])
def test_a_price_that_is_none_is_refused(tiny_model: adi.Model, price: Any) -> None:
    with pytest.raises(ValueError, match=r"price is .*0 or more"):
        adi.generate(tiny_model, PROMPT, price=price)


def test_a_trace_keeps_free_energy_and_one_of_version_2_is_read(tiny_model: adi.Model, tmp_path: Path) -> None:
    policy = by_exits(tiny_model)
    g = adi.generate(tiny_model, PROMPT, policy, max_new_tokens=8, stop_at_eos=False, price=1, logprobs=2)
    path = tmp_path / "t.json"
    adi.write_trace(adi.trace_of(g, policy, PROMPT), path)
    again = adi.read_trace(path)
    assert [s.surprise for s in again.steps] == pytest.approx([s.surprise for s in g.steps], rel=1e-5)
    assert again.summary.free_energy is not None
    assert 'id="heat"' in trace_page(again)
    old = json.loads(path.read_text())
    old["version"] = 2
    del old["summary"]["free_energy"]
    for step in old["steps"]:
        for name in ("surprise", "price", "regret"):
            del step[name]
        for look in step["looks"]:
            del look["surprise"]
    path.write_text(json.dumps(old))
    read = adi.read_trace(path)
    assert (read.text, read.summary.free_energy, read.steps[0].surprise) == (g.text, None, None)


def test_the_command_line_tells_free_energy_and_energy(tiny_folder: Path, tmp_path: Path) -> None:
    model = ["--model", tiny_folder, "--backend", "hf", "--mode", "full", "--raw", "-n", 4, "--ignore-eos"]
    assert "F = " not in adi_("run", "hello", *model).stdout
    assert "F = " in (shown := adi_("run", "hello", *model, "--price", "0.5").stdout)
    assert "energy: " in shown
    document = json.loads(adi_("run", "hello", *model, "--json", "--price", 1).stdout)
    assert json.loads(adi_("run", "hello", *model, "--json").stdout)["free_energy"] is None
    free = FreeEnergy.from_json(document["free_energy"])
    assert free.price == free.full_price == free.depth_share == 1
    assert document["joules"] is None or document["joules"] >= 0
    done = adi_("trace", "hello", *model[:-3], "-n", 4, "--out", tmp_path / "t.json")
    assert "F = " in done.stderr
    assert "energy: " in done.stderr


def test_energy_is_read_from_the_counters_there_are(tmp_path: Path) -> None:
    assert energy_meter(tmp_path / "none")() is None
    for zone, name, now in (("intel-rapl:0", "package-0", 900_000), ("intel-rapl:0:0", "core", 5), ("intel-rapl:1", "psys", 7)):
        (tmp_path / zone).mkdir()
        for file, value in (("name", name), ("energy_uj", now), ("max_energy_range_uj", 1_000_000)):
            (tmp_path / zone / file).write_text(f"{value}\n")
    meter = energy_meter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("950000\n")
    assert meter() == pytest.approx(0.05)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000\n")
    assert meter() == pytest.approx(0.2), "the counter has begun again"
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter() is None
