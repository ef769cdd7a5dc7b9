"""Light heads: what a fresh one says, what it merges to, what its tail means; and the lazy reading."""

from __future__ import annotations

import pytest
import torch

from adi.exits.exit_output import ExitOutput
from adi.exits.heads import Adapter, fresh_adapter, predict, shortlist
from adi.exits.signals import Prediction
from adi.model.backbone import States
from adi.model.hf import HfBackbone
from adi.training.train_heads import divergence
from families import tiny


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(params=["llama", "gpt2", "gemma", "granite", "cohere", "opt", "phi"])
def backbone(request: pytest.FixtureRequest) -> HfBackbone:
    return HfBackbone(tiny(request.param))


def test_a_fresh_head_is_the_models_own_on_its_shortlist(backbone: HfBackbone) -> None:
    readout, ids_S = backbone.readout(), torch.tensor([1, 5, 9, 40, 77])
    hidden_TD = torch.randn(4, backbone.spec.width, generator=generator())
    said = predict(fresh_adapter(readout, 4, generator()), shortlist(readout, ids_S), hidden_TD)
    wanted = backbone.logits(hidden_TD)[:, ids_S]
    differences = said.log_probs_TS - wanted
    torch.testing.assert_close(differences, differences[:, :1].expand_as(differences), atol=2e-3, rtol=0)


def trained(width: int, readout_like: Adapter) -> Adapter:
    return Adapter(
        readout_like.gain_D * 1.1,
        readout_like.shift_D,
        0.1 * torch.randn(width, 4, generator=generator()),
        readout_like.down_DR,
        0.2 * torch.randn(width, generator=generator()),
        torch.tensor([0.3]),
    )


def test_shortlist_and_tail_are_one_distribution(backbone: HfBackbone) -> None:
    readout = backbone.readout()
    adapter = trained(backbone.spec.width, fresh_adapter(readout, 4, generator()))
    said = predict(adapter, shortlist(readout, torch.tensor([3, 4, 90])), torch.randn(6, backbone.spec.width))
    assert said.tail_T is not None
    torch.testing.assert_close(said.log_probs_TS.exp().sum(-1) + said.tail_T.exp(), torch.ones(6))
    assert said.tail_size == backbone.spec.vocabulary - 3


def test_divergence_is_zero_for_the_same_and_positive_else() -> None:
    logs = torch.randn(5, 9, generator=generator()).log_softmax(-1)
    same = Prediction(logs[:, :8], torch.arange(8), logs[:, 8], 40)
    torch.testing.assert_close(divergence(same, logs[:, :8], logs[:, 8]), torch.zeros(5), atol=1e-6, rtol=0)
    other = torch.randn(5, 9, generator=generator().manual_seed(9)).log_softmax(-1)
    slow = (other.exp() * (other - logs)).sum(-1)
    torch.testing.assert_close(divergence(same, other[:, :8], other[:, 8]), slow)


def test_a_reading_runs_its_head_only_when_asked() -> None:
    calls = []

    def head() -> Prediction:
        calls.append(1)
        return Prediction(torch.tensor([[0.1, 0.6, 0.3]]).log(), torch.tensor([10, 20, 30]), torch.tensor([-9.0]), 5)

    reading = ExitOutput(4, head, States(torch.ones(1, 3), torch.ones(1, 3)))
    assert reading.signals["stability"] == pytest.approx(1)
    assert not calls
    assert reading.token == 20
    assert reading.signals["top_probability"] == pytest.approx(0.6)
    assert [token for token, _ in reading.candidates(2)] == [20, 30]
    assert len(calls) == 1
    with pytest.raises(ValueError, match="MLP activations"):
        reading.signals["hoyer"]
    assert set(reading.signals) == {"entropy", "margin", "top_probability", "stability"}
