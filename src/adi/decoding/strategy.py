"""From a policy to the logic that decodes by it, with what this logic works with."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adi.artifact import Exits
from adi.decoding.controller import Controller
from adi.decoding.cost_model import CostModel, cost_model_of
from adi.decoding.lookup import lookup
from adi.decoding.policies import FullDepth, Lookup, Policy, Reflex, Verified
from adi.decoding.proposers import FixedLength, NgramSources, ladder
from adi.decoding.reflex import Fallback, Loss, SpotCheck, disagrees, watched
from adi.decoding.sampling import Sampling
from adi.decoding.speculate import DepthOutput, Request, Rule, Yields, decode_unverified, likeliest, verified
from adi.drafters.ngram import NgramIndex
from adi.exits.exit_output import ExitOutput
from adi.risk.drift import DriftMonitor

if TYPE_CHECKING:
    from adi.drafters.network import Drafting
    from adi.model.backbone import Backbone

DRAFT_TOKENS = 6


@dataclass(frozen=True)
class Strategy:
    """One sequence's logic; the drafter that answers its guesses and the costs that its passes are told to, where it asks; and
    the spot checks of a reflex under watch."""

    sequence: Generator[Yields | Fallback, Sequence[DepthOutput], None]
    drafting: Drafting | None = None
    costs: CostModel | None = None
    spot: SpotCheck | None = None


def strategy_of(policy: Policy, plan: Request, backbone: Backbone) -> Strategy:
    """The logic for one sequence of this model."""
    match policy:
        case Verified(adaptive=True):
            return _climbing(policy, plan, backbone)
        case Verified(drafts_at_once=True, exits=Exits() as exits):
            steady = ladder(plan, FixedLength(policy.draft_tokens or DRAFT_TOKENS), NgramSources((), None), True)
            return Strategy(steady, exits.drafting(backbone))
        case Verified():
            return Strategy(verified(plan, policy.draft_tokens or DRAFT_TOKENS))
        case Lookup():
            return Strategy(lookup(plan, policy.draft_tokens, policy.ngram))
        case Reflex(monitor=DriftMonitor() as monitor):
            spot = SpotCheck(monitor, policy.spot_check, monitor.dice(), _loss(policy))
            return Strategy(watched(plan, spot, lambda rest: verified(rest, DRAFT_TOKENS)), spot=spot)
        case FullDepth() | Reflex():
            return Strategy(decode_unverified(plan))


def rule_of(sampling: Sampling | None) -> Rule:
    """How final tokens come of what full depth says."""
    if sampling is None:
        return likeliest
    from adi.decoding.sampler import Sampler  # with torch, which greedy decoding on the compiled engine does without

    return Sampler(sampling)


def _loss(policy: Reflex) -> Loss:
    """What a token costs by the risk that the certificate bounds, in [0, 1]."""
    nats = policy.certificate.nats if policy.certificate is not None else None
    if nats is None:
        return disagrees

    def regret(reading: DepthOutput, token: int) -> float:
        assert isinstance(reading, ExitOutput)
        logs_V = reading.prediction.log_probs_TS[0]
        return min(max(float(logs_V.max() - logs_V[token]), 0.0), nats) / nats

    return regret


def _climbing(policy: Verified, plan: Request, backbone: Backbone) -> Strategy:
    exits = policy.exits
    drafting = None if exits is None else exits.drafting(backbone)
    costs = (cost_model_of(backbone) if drafting is None else cost_model_of(backbone, drafting.key, drafting.try_once)).copy()
    controller = Controller(costs, bins={} if exits is None else exits.acceptance)
    pasts = [past for past in (policy.habits, None if exits is None else exits.answers) if past is not None]
    memory = NgramSources(pasts, NgramIndex() if policy.memory else None)
    return Strategy(ladder(plan, controller, memory, drafting is not None), drafting, costs)
