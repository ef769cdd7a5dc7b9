"""What reflex decoding costs an answer in truth, and in depth: on its own text, or replayed on full depth's.

The risks, each a sequence's mean over its tokens, in [0, 1]:

* ``disagreement``: the share of tokens that differ from what full depth would have said in the same context ("textual
  consistency" of CALM, Schuster et al. 2022, taken token by token);
* ``log_loss``: the log-probability lost per token under the full model, log p(its likeliest token) - log p(the token said),
  clipped to [0, ``NATS``] and divided by that (a regret; the excess cross-entropy of speculative decoding with a tolerance).

*Own text* is what a user gets: the context of each token is what reflex decoding itself wrote before. *Replayed*, the
context is the full model's own answer; that needs no further run, and says nothing of what follows from an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.decoding.policies import Reflex
from adi.decoding.scheduler import generate_batch
from adi.errors import AdiError
from adi.exits.signals import SIGNALS
from adi.exits.triggers import Threshold, Trigger
from adi.measure.forced_read import ForcedRead, forced_read
from adi.model.load import Model

NATS = 3.0  # a token 20 times less likely than the likeliest counts in full


@dataclass(frozen=True)
class Sample:
    """One answer: its two losses in [0, 1], mean depth of a token, number of tokens, those decided at full depth, and the
    answer's log-probability under the full model in nats."""

    disagreement: float
    log_loss: float
    depth: float
    tokens: int
    full: int
    log_probability: float


@dataclass(frozen=True)
class ForcedDecode:
    """What reflex decoding would say at each row of a text, and from which depth, ``[T]``; ``exit_T`` is -1 at full depth."""

    said_T: Tensor
    depth_T: Tensor
    exit_T: Tensor


def disagreement(said_T: Tensor, full_T: Tensor) -> float:
    """Share of tokens that differ from full depth's in the same context."""
    return float((said_T != full_T).double().mean())


def log_loss(regret_T: Tensor) -> float:
    """Mean log-probability lost per token under the full model, clipped at ``NATS`` and divided by it."""
    return float(regret_T.double().clamp(0, NATS).mean()) / NATS


def replay(told: ForcedRead, depths: Sequence[int], layers: int, trigger: Trigger) -> ForcedDecode:
    """The trigger asked at every row of the text, the first apart, which full depth says. Reads ``Threshold`` rules over top
    probability or entropy: ValueError for others, whose signals were not kept."""
    if not isinstance(trigger, Threshold) or trigger.signal not in told.signals:
        raise AdiError(f"a replay reads a Threshold over {' or '.join(told.signals)}, not {trigger.to_json()}.")
    at = [trigger.at.get(d) if not isinstance(trigger.at, float) else trigger.at for d in depths]
    at = [None if d < trigger.min_depth else t for d, t in zip(depths, at, strict=True)]
    values_ET = told.signals[trigger.signal].double()
    sure_is_high = SIGNALS[trigger.signal].sure_is_high
    never = float("inf") if sure_is_high else float("-inf")
    at_E1 = torch.tensor([never if t is None else t for t in at], dtype=torch.double)[:, None]
    fires_ET = values_ET >= at_E1 if sure_is_high else values_ET <= at_E1
    fires_ET[:, 0] = False
    any_T, exit_T = fires_ET.any(0), fires_ET.double().argmax(0)
    said_T = torch.where(any_T, told.token_ET.gather(0, exit_T[None])[0], told.full_T)
    depth_T = torch.where(any_T, torch.tensor(list(depths))[exit_T], torch.tensor(layers))
    return ForcedDecode(said_T, depth_T, torch.where(any_T, exit_T, torch.tensor(-1)))


def replayed(told: ForcedRead, depths: Sequence[int], layers: int, trigger: Trigger) -> Sample:
    """The sample on the text as it stands."""
    found = replay(told, depths, layers, trigger)
    early_T = found.exit_T >= 0
    regret_T = torch.where(early_T, told.regret_ET.gather(0, found.exit_T.clamp_min(0)[None])[0], torch.tensor(0.0))
    return Sample(
        disagreement(found.said_T, told.full_T),
        log_loss(regret_T),
        float(found.depth_T.double().mean()),
        len(found.said_T),
        int((~early_T).sum()),
        float((told.log_T + told.regret_T - regret_T).double().sum()),
    )


def own_text(
    model: Model, exits: Exits, told: Sequence[ForcedRead], trigger: Trigger, max_new_tokens: int, skipped: str = "exact"
) -> list[Sample]:
    """A sample of each prompt's answer as reflex decoding writes it, judged by one full pass over it.

    ``told`` are full depth's answers to the same prompts. Where the trigger, replayed on one, says the same tokens, that is
    the text, and nothing has to run.
    """
    layers = model.backbone.spec.layers
    samples: dict[int, Sample] = {}
    if skipped == "exact":
        for i, one in enumerate(told):
            if torch.equal(replay(one, exits.depths, layers, trigger).said_T, one.said_T):
                samples[i] = replayed(one, exits.depths, layers, trigger)
    rest = [i for i in range(len(told)) if i not in samples]
    policy = Reflex(exits, trigger=trigger, skipped=skipped)
    texts = generate_batch(model, [told[i].prompt_ids for i in rest], policy, max_new_tokens=max_new_tokens)
    judged = forced_read(model.backbone, None, [(g.prompt_ids, g.token_ids) for g in texts])
    for i, text, verdict in zip(rest, texts, judged, strict=True):
        depths = [step.depth for step in text.steps]
        samples[i] = Sample(
            disagreement(verdict.said_T, verdict.full_T),
            log_loss(verdict.regret_T),
            sum(depths) / len(depths),
            len(depths),
            depths.count(layers),
            float(verdict.log_T.double().sum()),
        )
    return [samples[i] for i in range(len(told))]
