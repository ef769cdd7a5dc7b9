"""How to decode: frozen values without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adi.artifact import Exits
from adi.drafters.history import History
from adi.errors import AdiError
from adi.exits.signals import SIGNALS
from adi.exits.triggers import Always, Never, Trigger, with_thresholds
from adi.risk.certificate import SKIPPED, Certificate
from adi.risk.drift import DriftMonitor


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
    silent at every exit ends the draft earlier. The trigger ``Always((0,))`` drafts before any block has run: the drafter of
    ``exits`` takes ``draft_tokens`` steps in every round.
    """

    exits: Exits | None = None
    trigger: Trigger | None = None
    draft_tokens: int | None = None
    habits: History | None = None
    memory: bool = True

    @property
    def adaptive(self) -> bool:
        """Whether the controller decides, not a rule."""
        by_rule = self.trigger is not None or self.draft_tokens is not None
        return not by_rule and (self.exits is None or self.exits.drafter is not None)

    @property
    def drafts_at_once(self) -> bool:
        """Whether the drafter makes all drafts, and always as many."""
        return self.trigger == Always((0,)) and self.exits is not None and self.exits.drafter is not None

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and (type(self.draft_tokens) is not int or self.draft_tokens < 1):
            raise AdiError(f"draft_tokens is {self.draft_tokens!r}; it must be a whole number of at least 1.")
        if self.adaptive:
            return
        if self.exits is None:
            raise AdiError("a trigger or draft_tokens needs exits=... to draft at; Verified() alone drafts from memory.")
        if self.habits is not None:
            raise AdiError(
                "habits are read by the controller: leave trigger and draft_tokens out, and give exits with a drafter."
            )
        if not self.drafts_at_once:
            _check(self.exits, trigger_of(self))


@dataclass(frozen=True)
class Reflex:
    """What an exit says stands. The text may differ from the full model's; how often is bounded where ``risk`` is given.

    One of three says which exits are believed: ``risk``, a level that ``adi calibrate`` certified for these exits (of
    ``kind`` "disagreement" or "log_loss"); ``thresholds`` (one number, or one per depth) for the exits' own trigger; or a
    whole ``trigger``. The last two are uncalibrated.

    ``spot_check``, with ``risk``: that share of tokens, drawn by dice of its own, is compared with full depth (and corrected
    where it differs); when this shows that the certificate does not hold on this text, the rest is decoded verified, and so is
    all that comes after it with the same ``monitor``, which is made here unless given.

    ``skipped``: blocks that a token did not run owe later tokens its keys and values. "exact": they are computed when a later
    token needs them; "propagate": they are made from the exit's state at once (Elbayad et al. 2020; CALM, Schuster et al.
    2022), an approximation.
    """

    exits: Exits
    thresholds: float | Mapping[int, float] | None = None
    trigger: Trigger | None = None
    risk: float | None = None
    kind: str = "disagreement"
    spot_check: float = 0.0
    monitor: DriftMonitor | None = None
    skipped: str = "exact"

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.thresholds, self.trigger, self.risk)) != 1:
            raise AdiError(
                "Reflex needs one of risk=... (a level certified by adi calibrate), thresholds=... for the exits' own trigger, "
                "or trigger=..."
            )
        if self.skipped not in SKIPPED:
            raise AdiError(f"skipped is {self.skipped!r}; choose one of {', '.join(SKIPPED)}.")
        if self.thresholds is not None:
            with_thresholds(self.exits.trigger, self.thresholds)  # refuses what cannot be meant
        _check(self.exits, trigger_of(self))
        if not isinstance(self.spot_check, (int, float)) or not 0 <= self.spot_check <= 1:
            raise AdiError(f"spot_check is {self.spot_check!r}; it is a share of tokens, from 0 to 1.")
        if self.monitor is not None and not self.spot_check:
            raise AdiError("a monitor sees only tokens that are checked: give spot_check=..., such as 0.05.")
        if self.spot_check:
            certificate = self.certificate
            if self.skipped != "exact":
                raise AdiError("spot checks compare with full depth, which needs exact keys and values: skipped='exact'.")
            if certificate is None:
                raise AdiError("spot_check watches over a certificate: give risk=..., a level certified by adi calibrate.")
            if self.monitor is None:
                object.__setattr__(self, "monitor", DriftMonitor.of(certificate))
            assert self.monitor is not None
            self.monitor.check(certificate)

    @property
    def certificate(self) -> Certificate | None:
        """What bounds the risk, None where nothing does."""
        return None if self.risk is None else self.exits.certificate(self.kind, self.risk, self.skipped)


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
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise AdiError(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1.")


Policy = FullDepth | Verified | Reflex | Lookup


def in_force(policy: Policy) -> Policy:
    """The policy itself; for a reflex whose monitor has found that its certificate does not hold, verified decoding."""
    if isinstance(policy, Reflex) and policy.monitor is not None and policy.monitor.alarmed:
        return Verified(policy.exits)
    return policy


def depths_of(policy: Policy) -> tuple[int, ...]:
    """The depths below the last one at which a token may be put forward; 0: before any block, by a memory or the drafter."""
    match policy:
        case FullDepth():
            return ()
        case Lookup() | Verified(adaptive=True) | Verified(drafts_at_once=True):
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
    if isinstance(policy, Reflex) and policy.certificate is not None:
        return policy.certificate.trigger
    if isinstance(policy, Reflex) and policy.thresholds is not None:
        return with_thresholds(policy.exits.trigger, policy.thresholds)
    assert policy.exits is not None
    return policy.exits.trigger


def name_of(policy: Policy) -> str:
    """The mode that a policy stands for: full, verified, reflex or lookup. ValueError for what is no policy."""
    names: dict[type, str] = {FullDepth: "full", Verified: "verified", Reflex: "reflex", Lookup: "lookup"}
    if type(policy) not in names:
        raise AdiError(
            f"policy is a {type(policy).__name__}; give FullDepth(), Verified(exits), Reflex(exits, ...) or Lookup()."
        )
    return names[type(policy)]


def _check(exits: Exits, trigger: Trigger) -> None:
    """ValueError where a trigger names a depth that is no exit, where it would never be asked, or asks a probe not there."""
    if stray := sorted(trigger.depths - set(exits.depths)):
        raise AdiError(f"the trigger has thresholds at depths {stray}, but the exits are at {list(exits.depths)}.")
    if exits.probe is None and (asked := [name for name in trigger.needs if SIGNALS[name].reads == "probe"]):
        raise AdiError(f"the trigger reads {asked[0]!r}, but these exits have no probe; adi triggers --save DIR fits one.")
