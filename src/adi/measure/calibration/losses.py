"""What reflex decoding costs an answer in truth, and in depth: on its own text, or replayed on full depth's.

The risks, each a sequence's mean over its tokens, in [0, 1]:

* ``disagreement``: the share of tokens that differ from what full depth predicts in the same context ("textual
  consistency" of CALM, Schuster et al. 2022, taken token by token);
* ``log_loss``: the log-probability lost per token under the full model, log p(its likeliest token) - log p(the token given),
  clipped to [0, ``NATS``] and divided by that (a regret; the excess cross-entropy of speculative decoding with a tolerance).

*Own text* is what a user gets: the context of each token is what reflex decoding itself wrote before. *Replayed*, the
context is the full model's own answer; that needs no further run, and does not measure what follows from an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.decoding.generate import generate_batch
from adi.decoding.policies import Reflex
from adi.decoding.records import Generation
from adi.decoding.teacher_forcing import ForcedReading, forced_readings
from adi.errors import UsageError
from adi.exits.triggers import Threshold, Trigger
from adi.model.load import Model

NATS = 3.0  # a token 20 times less likely than the likeliest counts in full


@dataclass(frozen=True)
class AnswerLoss:
    """One answer: its two losses in [0, 1], mean depth of a token, and number of tokens."""

    disagreement: float
    log_loss: float
    depth: float
    tokens: int


@dataclass(frozen=True)
class ReplayedExits:
    """The token that reflex decoding would give at each row of a text, and its depth, ``[T]``; ``exit_T`` is the place of the
    exit among its depths, -1 at full depth."""

    token_T: Tensor
    depth_T: Tensor
    exit_T: Tensor


def disagreement(token_T: Tensor, full_T: Tensor) -> float:
    """Share of tokens that differ from full depth's in the same context."""
    return float((token_T != full_T).double().mean())


def log_loss(regret_T: Tensor) -> float:
    """Mean log-probability lost per token under the full model, clipped at ``NATS`` and divided by it."""
    return float(regret_T.double().clamp(0, NATS).mean()) / NATS


def replay_exits(reading: ForcedReading, depths: Sequence[int], layers: int, trigger: Trigger) -> ReplayedExits:
    """The trigger checked at every row of the text but the first, which full depth decides. Reads ``Threshold`` rules over top
    probability or entropy: AdiError for others, whose signals were not kept."""
    if not isinstance(trigger, Threshold) or trigger.signal not in reading.signals:
        raise UsageError(f"a replay reads a Threshold over {' or '.join(reading.signals)}, not {trigger.to_json()}.")
    sign = 1.0 if trigger.high else -1.0
    at = trigger.at if isinstance(trigger.at, Mapping) else dict.fromkeys(depths, trigger.at)
    usable = [sign * at[d] if d in at and d >= trigger.min_depth else float("inf") for d in depths]
    fires_ET = sign * reading.signals[trigger.signal].double() >= torch.tensor(usable, dtype=torch.double)[:, None]
    fires_ET[:, 0] = False
    any_T, exit_T = fires_ET.any(0), fires_ET.double().argmax(0)
    token_T = torch.where(any_T, reading.exit_ET.gather(0, exit_T[None])[0], reading.full_T)
    depth_T = torch.where(any_T, torch.tensor(list(depths))[exit_T], layers)
    return ReplayedExits(token_T, depth_T, torch.where(any_T, exit_T, -1))


def replayed_loss(reading: ForcedReading, depths: Sequence[int], layers: int, trigger: Trigger) -> AnswerLoss:
    """The loss on full depth's own answer."""
    found = replay_exits(reading, depths, layers, trigger)
    early_T = found.exit_T >= 0
    regret_T = torch.where(early_T, reading.regret_ET.gather(0, found.exit_T.clamp_min(0)[None])[0], 0.0)
    depth = float(found.depth_T.double().mean())
    return AnswerLoss(disagreement(found.token_T, reading.full_T), log_loss(regret_T), depth, len(regret_T))


def own_text_losses(
    model: Model, exits: Exits, readings: Sequence[ForcedReading], trigger: Trigger, max_new_tokens: int
) -> list[AnswerLoss]:
    """The loss of each prompt's answer as reflex decoding writes it, measured by one full pass over it.

    ``readings`` are of full depth's answers to the same prompts. Where the trigger, replayed on one, gives the same tokens,
    that is the text, and nothing has to run.
    """
    layers = model.backbone.spec.layers
    same = [torch.equal(replay_exits(one, exits.depths, layers, trigger).token_T, one.answer_T) for one in readings]
    rest = [one.prompt_ids for one, known in zip(readings, same, strict=True) if not known]
    texts = generate_batch(model, rest, Reflex(exits, trigger=trigger), max_new_tokens=max_new_tokens)
    forced = forced_readings(model.backbone, None, [(text.prompt_ids, text.token_ids) for text in texts])
    own = iter([_own_loss(reading, text) for reading, text in zip(forced, texts, strict=True)])
    pairs = zip(readings, same, strict=True)
    return [replayed_loss(one, exits.depths, layers, trigger) if known else next(own) for one, known in pairs]


def _own_loss(reading: ForcedReading, text: Generation) -> AnswerLoss:
    depth = mean(step.depth for step in text.steps)
    return AnswerLoss(disagreement(reading.answer_T, reading.full_T), log_loss(reading.regret_T), depth, len(text.steps))
