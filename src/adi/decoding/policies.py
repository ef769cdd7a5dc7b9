"""How to decode: frozen values without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adi.exits.artifact import Exits
from adi.exits.habits import Habits
from adi.exits.signals import SIGNALS
from adi.exits.triggers import Never, Trigger, with_thresholds


@dataclass(frozen=True)
class FullDepth:
    """Every block for every token: ordinary decoding."""


@dataclass(frozen=True)
class Verified:
    """Draft cheaply, verify at full depth: exactly the full model's text.

    Exactly where the engine's rows do not depend on their company (``spec.row_invariant``), and in float32; else tokens whose
    logits nearly tie can swap, and ``adi run --compare`` shows whether it happened.

    By default a controller climbs the ladder: memory of the text (and of ``habits``, where given), the drafter of ``exits``
    (where it has one), full depth; it drafts as far as measured costs and acceptance say. ``Verified()`` needs no training.
    With a ``trigger`` or ``draft_tokens`` of your own, or with exits that have no drafter, drafts come from exits by that
    rule alone: at most ``draft_tokens`` (6) are drafted before they are verified, and a token for which the trigger stays
    silent at every exit ends the draft earlier.
    """

    exits: Exits | None = None
    trigger: Trigger | None = None
    draft_tokens: int | None = None
    habits: Habits | None = None
    memory: bool = True

    @property
    def adaptive(self) -> bool:
        """Whether the controller decides, not a rule."""
        by_rule = self.trigger is not None or self.draft_tokens is not None
        return not by_rule and (self.exits is None or self.exits.drafter is not None)

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise ValueError(f"draft_tokens is {self.draft_tokens}; it must be at least 1.")
        if self.adaptive:
            return
        if self.exits is None:
            raise ValueError("a trigger or draft_tokens needs exits=... to draft at; Verified() alone drafts from memory.")
        if self.habits is not None:
            raise ValueError(
                "habits are read by the controller: leave trigger and draft_tokens out, and give exits with a drafter."
            )
        _check(self.exits, trigger_of(self))


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
        _check(self.exits, trigger_of(self))


@dataclass(frozen=True)
class Lookup:
    """Draft what followed the last tokens when they stood in the text before; verify at full depth: exactly its text.

    Prompt lookup (Saxena 2023): the last ``ngram`` tokens are looked for first, then fewer, down to one; at most
    ``draft_tokens`` tokens are drafted. Needs no exits.
    """

    draft_tokens: int = 10
    ngram: int = 3

    def __post_init__(self) -> None:
        for name in ("draft_tokens", "ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


Policy = FullDepth | Verified | Reflex | Lookup


def depths_of(policy: Policy) -> tuple[int, ...]:
    """The depths below the last one at which a token may be put forward; 0 is a memory of the text."""
    match policy:
        case FullDepth():
            return ()
        case Lookup() | Verified(adaptive=True):
            return (0,)
        case _:
            assert policy.exits is not None
            return policy.exits.depths


def trigger_of(policy: Policy) -> Trigger:
    """The rule that this policy asks; one that never fires where it looks at no exit."""
    if isinstance(policy, (FullDepth, Lookup)) or (isinstance(policy, Verified) and policy.adaptive):
        return Never()
    if policy.trigger is not None:
        return policy.trigger
    if isinstance(policy, Reflex) and policy.thresholds is not None:
        return with_thresholds(policy.exits.trigger, policy.thresholds)
    assert policy.exits is not None
    return policy.exits.trigger


def name_of(policy: Policy) -> str:
    """The mode that a policy stands for: full, verified, reflex or lookup. ValueError for what is no policy."""
    names: dict[type, str] = {FullDepth: "full", Verified: "verified", Reflex: "reflex", Lookup: "lookup"}
    if type(policy) not in names:
        raise ValueError(
            f"policy is a {type(policy).__name__}; give FullDepth(), Verified(exits), Reflex(exits, ...) or Lookup()."
        )
    return names[type(policy)]


def _check(exits: Exits, trigger: Trigger) -> None:
    """ValueError where a trigger names a depth that is no exit, where it would never be asked, or asks a probe not there."""
    if stray := sorted(trigger.depths - set(exits.depths)):
        raise ValueError(f"the trigger has thresholds at depths {stray}, but the exits are at {list(exits.depths)}.")
    if exits.probe is None and (asked := [name for name in trigger.needs if SIGNALS[name].reads == "probe"]):
        raise ValueError(f"the trigger reads {asked[0]!r}, but these exits have no probe; adi triggers --save DIR fits one.")
