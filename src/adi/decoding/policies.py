"""How to decode: frozen values without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adi.exits.artifact import Exits
from adi.exits.triggers import Trigger, with_thresholds


@dataclass(frozen=True)
class FullDepth:
    """Every block for every token: ordinary decoding."""


@dataclass(frozen=True)
class Verified:
    """Draft at exits, verify at full depth: exactly the full model's text.

    ``trigger`` replaces the exits' own. At most ``draft_tokens`` tokens are drafted before they are verified; a token
    for which the trigger stays silent at every exit ends the draft earlier.
    """

    exits: Exits
    trigger: Trigger | None = None
    draft_tokens: int = 6

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens is {self.draft_tokens}; it must be at least 1.")


@dataclass(frozen=True)
class Reflex:
    """What an exit says stands. The text may differ from the full model's, and nothing bounds yet how often.

    Either ``thresholds`` (one number, or one per depth) for the exits' own trigger, or a whole ``trigger``.
    """

    exits: Exits
    thresholds: float | Mapping[int, float] | None = None
    trigger: Trigger | None = None

    def __post_init__(self) -> None:
        if (self.thresholds is None) == (self.trigger is None):
            raise ValueError(
                "Reflex needs thresholds=... for the exits' own trigger, or trigger=...: nothing is calibrated yet, "
                "so the choice is yours."
            )
        if self.thresholds is not None:
            with_thresholds(self.exits.trigger, self.thresholds)  # refuses what cannot be meant


Policy = FullDepth | Verified | Reflex


def trigger_of(policy: Verified | Reflex) -> Trigger:
    """The rule that this policy asks."""
    if policy.trigger is not None:
        return policy.trigger
    if isinstance(policy, Reflex) and policy.thresholds is not None:
        return with_thresholds(policy.exits.trigger, policy.thresholds)
    return policy.exits.trigger


def name_of(policy: Policy) -> str:
    """ "full", "verified" or "reflex"."""
    return {FullDepth: "full", Verified: "verified", Reflex: "reflex"}[type(policy)]
