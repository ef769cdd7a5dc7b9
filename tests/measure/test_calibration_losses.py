"""Losses of a text that is not run again are those of running it; risks are as they are defined."""

from __future__ import annotations

import math

import pytest
import torch

import adi
from adi.decoding.teacher_forcing import ForcedReading, forced_readings
from adi.measure.calibration.losses import NATS, disagreement, log_loss, own_text_losses, replay_exits, replayed_loss
from adi.model.backbone import Rows
from conftest import random_exits

TOKENS = 12
PROMPTS = [(1, 2, 3), (4, 5), (6, 7, 8, 9), (10,)]


@pytest.fixture(scope="module")
def exits(llama: adi.Model) -> adi.Exits:
    return random_exits(llama, (2, 4), adi.Never())


@pytest.fixture(scope="module")
def readings(llama: adi.Model, exits: adi.Exits) -> list[ForcedReading]:
    texts = [adi.generate(llama, prompt, adi.FullDepth(), max_new_tokens=TOKENS) for prompt in PROMPTS]
    return forced_readings(llama.backbone, exits, [(g.prompt_ids, g.token_ids) for g in texts])


def rule(readings: list[ForcedReading], share: float) -> adi.Threshold:
    """Believed at about this share of rows, at each depth."""
    sure = torch.cat([t.signals["top_probability"] for t in readings], 1)
    return adi.Threshold("top_probability", {d: float(sure[e].quantile(1 - share)) for e, d in enumerate((2, 4))})


def logs(model: adi.Model, ids: list[int]) -> torch.Tensor:
    backbone = model.backbone
    states = backbone.forward([Rows(backbone.new_cache(), 0, tuple(ids), None)], 0, backbone.spec.layers)[0].hidden_TD
    return backbone.logits(states[-1:]).log_softmax(-1)[0]


def test_a_text_of_full_depth_is_its_own_truth(readings: list[ForcedReading]) -> None:
    for one in readings:
        assert torch.equal(one.answer_T, one.full_T)
        assert float(one.regret_T.max()) == 0.0


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_own_text_is_what_generation_and_a_slow_judge_say(
    llama: adi.Model, exits: adi.Exits, readings: list[ForcedReading], share: float
) -> None:
    trigger = rule(readings, share)
    samples = own_text_losses(llama, exits, readings, trigger, TOKENS)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        text = adi.generate(llama, prompt, adi.Reflex(exits, trigger=trigger), max_new_tokens=TOKENS)
        context, wrong, regrets = list(prompt), [], []
        for token in text.token_ids:
            full = logs(llama, context)
            wrong.append(int(full.argmax()) != token)
            regrets.append(min(float(full.max() - full[token]), NATS))
            context.append(token)
        assert sample.disagreement == pytest.approx(sum(wrong) / len(wrong))
        assert sample.log_loss == pytest.approx(sum(regrets) / len(regrets) / NATS, abs=1e-4)
        assert sample.depth == pytest.approx(sum(s.depth for s in text.steps) / len(text.steps))
        assert sample.tokens == len(text.steps)


def test_a_replay_that_says_the_same_is_the_generation(
    llama: adi.Model, exits: adi.Exits, readings: list[ForcedReading]
) -> None:
    same = 0
    for share in (0.02, 0.05, 0.1, 0.3):
        trigger = rule(readings, share)
        for one in readings:
            seen = replay_exits(one, exits.depths, 6, trigger)
            text = adi.generate(llama, one.prompt_ids, adi.Reflex(exits, trigger=trigger), max_new_tokens=TOKENS)
            differs = (seen.token_T != one.answer_T).nonzero()
            until = int(differs[0]) + 1 if len(differs) else TOKENS
            assert list(text.token_ids[:until]) == seen.token_T[:until].tolist(), "up to the first difference it is the text"
            assert [s.depth for s in text.steps[:until]] == seen.depth_T[:until].tolist()
            same += until == TOKENS
    assert 0 < same < 16


def test_a_replay_knows_entropy_and_single_thresholds_too(readings: list[ForcedReading]) -> None:
    for trigger, depths in (
        (adi.Threshold("entropy", 1e9), [6] + [2] * (TOKENS - 1)),
        (adi.Threshold("entropy", 1e9, min_depth=3), [6] + [4] * (TOKENS - 1)),
        (adi.Threshold("top_probability", {4: 2.0}), [6] * TOKENS),
    ):
        assert replay_exits(readings[0], (2, 4), 6, trigger).depth_T.tolist() == depths
    with pytest.raises(ValueError, match="a replay reads a Threshold"):
        replay_exits(readings[0], (2, 4), 6, adi.Threshold("margin", 0.5))


def test_replayed_losses_add_up(readings: list[ForcedReading]) -> None:
    trigger = rule(readings, 0.5)
    for one in readings:
        found = replay_exits(one, (2, 4), 6, trigger)
        sample = replayed_loss(one, (2, 4), 6, trigger)
        wrong = [a != b for a, b in zip(found.token_T.tolist(), one.full_T.tolist(), strict=True)]
        assert sample.disagreement == pytest.approx(sum(wrong) / TOKENS)
        regrets = [0.0 if e < 0 else min(float(one.regret_ET[e, t]), NATS) for t, e in enumerate(found.exit_T.tolist())]
        assert sample.log_loss == pytest.approx(sum(regrets) / TOKENS / NATS)


def test_risks_are_means_of_a_sequence() -> None:
    assert disagreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])) == 0.5
    assert log_loss(torch.tensor([0.0, 1.5, 100.0])) == pytest.approx((0.5 + 1.0) / 3)
    assert math.isclose(math.exp(-NATS), 1 / 20, rel_tol=0.01)
