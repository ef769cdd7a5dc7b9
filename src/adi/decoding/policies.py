"""How to decode: each policy is one class, which says what it refuses and builds the strategy of a sequence.

The objects of one sequence, by default::

    Policy                  Verified(exits)         what the user chose; shared by sequences
      Strategy              draft_tokens=15         one sequence: proposer, Verification, costs, drafting
        Proposer            ControlledProposer      drafts of a round
          DraftControl      Controller(CostModel)   which drafter, how many drafts
          NgramSources      NgramIndex (the text), History, Datastores (of the exits)
          DraftStep         Drafting (of the exits' drafter), answered by the session
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from weakref import WeakSet

from adi.arguments import instance, real, settle, whole
from adi.artifact import Exits, require_exits, require_model, shipped_for
from adi.decoding.drafting.controller import MOST_DRAFTS, Controller
from adi.decoding.drafting.cost_model import CostModel, cost_model_of
from adi.decoding.drafting.proposers import ControlledProposer, ExitProposer, FixedLength, NgramSources, NoDrafts
from adi.decoding.records import Drift
from adi.decoding.reflex import Loss, SpotCheck, Unverified, disagrees
from adi.decoding.requests import DepthOutput, Request
from adi.decoding.speculate import Strategy, Verification
from adi.drafters.datastore import Datastore
from adi.drafters.history import History
from adi.drafters.ngram import NgramIndex
from adi.errors import AdiError, UsageError
from adi.exits.exit_output import ExitOutput
from adi.exits.probe import require_network
from adi.exits.signals import SIGNALS
from adi.exits.triggers import Always, Trigger, with_thresholds
from adi.model.load import Model
from adi.risk.certificate import SKIPPED, Certificate
from adi.risk.drift import DriftMonitor

DRAFT_TOKENS = 6


class Policy:
    """A way of decoding. One of your own is a subclass with a ``mode`` and a ``strategy``; all else has a default."""

    mode: ClassVar[str]

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths below the last one at which a token may be drafted; 0: before any block, by n-grams or the drafter."""
        return ()

    @property
    def exit_trigger(self) -> Trigger | None:
        """The rule that the exits are asked by; None where none is asked."""
        return None

    def check(self, model: Model, sampled: bool) -> None:
        """UsageError for what this model cannot do, or cannot while tokens are ``sampled``; before any work."""
        blind = [n for n in (self.exit_trigger.needs if self.exit_trigger else ()) if SIGNALS[n].reads == "mlp"]
        if blind and not model.backbone.has_mlp_tap:
            raise UsageError(
                f"the trigger reads {blind[0]!r}, but {model.backbone.spec.family} models show no single MLP per block "
                "(experts, or another form); use entropy, margin, top_probability or stability."
            )

    def prepare(self, model: Model) -> None:
        """What takes long, once for a model: it is not counted as time of a generation."""

    def in_force(self) -> Policy:
        """What to decode by now: itself, unless something was found to speak against it."""
        return self

    def strategy(self, request: Request, model: Model) -> Strategy:
        """How to decode one sequence; called anew for each."""
        raise NotImplementedError

    def on_finished(self, tokens: Sequence[int]) -> None:
        """The tokens of a text that came to its end."""

    def result(self, verification: Verification, fell_at: int | None) -> dict[str, Any]:
        """Further fields of the ``Generation``, of which all tokens from ``fell_at`` on were verified after drift was found."""
        return {}


@dataclass(frozen=True)
class FullDepth(Policy):
    """Every block for every token: ordinary decoding."""

    mode: ClassVar[str] = "full"

    def strategy(self, request: Request, model: Model) -> Strategy:
        """One token a pass."""
        return Strategy(NoDrafts(), 0)


@dataclass(frozen=True)
class Verified(Policy):
    """Speculative decoding: draft cheaply, verify at full depth, exactly the full model's text.

    Exactly where the engine's rows do not depend on their company (``spec.row_invariant``), and in float32; else tokens whose
    logits nearly tie can swap, and ``adi run --compare`` shows whether it happened.

    By default a controller chooses in every round between n-grams of the text (and of ``history``, where given), the drafter
    of ``exits`` (where it has one) and no draft, and drafts as far as measured costs and acceptance say. ``Verified()`` needs
    no training; ``memory=False`` leaves the text's own n-grams out.

    With a ``trigger`` or ``draft_tokens`` drafts come from the exits by that rule alone: at most ``draft_tokens`` (6) a round,
    fewer where the trigger (by default the exits' own) fires at no exit. Without a drafter this is slower than full depth on
    most models (docs/triggers.md), so exits alone never switch it on.
    """

    exits: Exits | None = None
    trigger: Trigger | None = None
    draft_tokens: int | None = None
    history: History | None = None
    memory: bool = True
    mode: ClassVar[str] = "verified"

    def __post_init__(self) -> None:
        if self.draft_tokens is not None:
            settle(self, draft_tokens=whole("draft_tokens", self.draft_tokens, 1))
        if self.exits is not None:
            require_exits(self.exits)
        if self.history is not None:
            instance("history", self.history, History, "adi.drafters.history.History.open(...)")
        if self.adaptive:
            return
        if self.exits is None:
            raise UsageError(f"{self._rule} needs exits=... to draft at; Verified() alone drafts from n-grams.")
        if self.history is not None:
            raise UsageError(f"a history is read by the controller, and {self._rule} replaces it: leave one of them out.")
        _fitting(self.exits, self.trigger or self.exits.trigger)

    @property
    def _stored(self) -> list[Datastore]:
        stored = () if self.exits is None else (self.exits.habits, self.exits.answers)
        return [store for store in stored if store is not None]

    @property
    def _rule(self) -> str:
        """What replaces the controller, in words."""
        return f"draft_tokens={self.draft_tokens}" if self.trigger is None else f"trigger={type(self.trigger).__name__}(...)"

    @property
    def adaptive(self) -> bool:
        """Whether the controller decides, not a rule."""
        return self.trigger is None and self.draft_tokens is None

    @property
    def depths(self) -> tuple[int, ...]:
        """0 for the controller's drafters, else the exits."""
        return (0,) if self.adaptive or self.exits is None else self.exits.depths

    @property
    def exit_trigger(self) -> Trigger | None:
        """The given one, or the exits' own; None for the controller."""
        return None if self.adaptive or self.exits is None else self.trigger or self.exits.trigger

    def prepare(self, model: Model) -> None:
        """Compile the drafter and sort the datastores."""
        if self.adaptive:
            _warm_up(self.exits, model)
            for store in self._stored:
                store.prepare()

    def strategy(self, request: Request, model: Model) -> Strategy:
        """By the controller, or by the exits' rule."""
        trigger, exits = self.exit_trigger, self.exits
        if trigger is not None and exits is not None:
            return _by_exits(request, exits, trigger, self.draft_tokens or DRAFT_TOKENS)
        costs = self._costs(model)
        control = Controller(costs) if exits is None else Controller(costs, bins=exits.acceptance, steps=exits.draft_steps)
        others = () if self.history is None else (self.history,)
        sources = NgramSources([*others, *self._stored], NgramIndex() if self.memory else None)
        drafting = None if exits is None else exits.drafting(model.backbone)
        proposer = ControlledProposer(request, control, sources, drafting is not None)
        return Strategy(proposer, MOST_DRAFTS, drafting=drafting, costs=costs)

    def on_finished(self, tokens: Sequence[int]) -> None:
        """Remember the text, where there is a history."""
        if self.history is None:
            return
        try:
            self.history.learn(tokens)
        except AdiError as error:  # a file that was damaged or a full disk meanwhile; the text is there
            warnings.warn(f"this text was not remembered: {error}", stacklevel=2)

    def _costs(self, model: Model) -> CostModel:
        drafting = None if self.exits is None else self.exits.drafting(model.backbone)
        return cost_model_of(model) if drafting is None else cost_model_of(model, drafting.key)


@dataclass(frozen=True)
class Static(Policy):
    """Verified decoding by one fixed choice: always ``draft_tokens`` drafts, of the exit at ``depth`` whatever it shows, or at
    depth 0 of the drafter. What the controller has to beat."""

    exits: Exits
    depth: int = 0
    draft_tokens: int = DRAFT_TOKENS
    mode: ClassVar[str] = "static"

    def __post_init__(self) -> None:
        require_exits(self.exits)
        settle(self, draft_tokens=whole("draft_tokens", self.draft_tokens, 1), depth=whole("depth", self.depth, 0))
        if self.depth not in (there := self.depths_of(self.exits)):
            raise UsageError(f"there is no exit at depth {self.depth} to draft from; choose among {list(there)}.")

    @staticmethod
    def depths_of(exits: Exits) -> tuple[int, ...]:
        """The depths to choose among: the exits, and 0 where there is a drafter."""
        return (*((0,) if exits.drafter is not None else ()), *exits.depths)

    @property
    def depths(self) -> tuple[int, ...]:
        """The one."""
        return (self.depth,)

    def prepare(self, model: Model) -> None:
        """Compile the drafter, where it drafts."""
        if not self.depth:
            _warm_up(self.exits, model)

    def strategy(self, request: Request, model: Model) -> Strategy:
        """The same number of drafts in every round."""
        if self.depth:
            return _by_exits(request, self.exits, Always((self.depth,)), self.draft_tokens)
        proposer = ControlledProposer(request, FixedLength(), NgramSources((), None), True)
        return Strategy(proposer, self.draft_tokens, drafting=self.exits.drafting(model.backbone))


@dataclass(frozen=True)
class Lookup(Policy):
    """Prompt lookup (Saxena 2023): draft what followed the last tokens earlier in the text, verify at full depth.

    The last ``ngram`` tokens are looked for first, then fewer, down to one; at most ``draft_tokens`` tokens are drafted. Needs
    no exits.
    """

    draft_tokens: int = 10
    ngram: int = 3
    mode: ClassVar[str] = "lookup"

    def __post_init__(self) -> None:
        settle(self, draft_tokens=whole("draft_tokens", self.draft_tokens, 1), ngram=whole("ngram", self.ngram, 1))

    @property
    def depths(self) -> tuple[int, ...]:
        """No block runs for a draft."""
        return (0,)

    def strategy(self, request: Request, model: Model) -> Strategy:
        """N-grams of the text itself, as many drafts as there are."""
        sources = NgramSources((), NgramIndex(self.ngram))
        return Strategy(ControlledProposer(request, FixedLength(), sources, False), self.draft_tokens)


@dataclass(frozen=True)
class Reflex(Policy):
    """Early exit without verification. The text may differ from the full model's; how often is bounded where ``risk`` is given.

    One of three says where an exit's token is final: ``risk``, a level that ``adi calibrate`` certified for these exits (of
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
    mode: ClassVar[str] = "reflex"

    def __post_init__(self) -> None:
        require_exits(self.exits)
        given = sum(given is not None for given in (self.thresholds, self.trigger, self.risk))
        if given != 1:
            raise UsageError(
                f"{given} rules were given; Reflex needs one of risk=... (a level certified by adi calibrate), "
                "thresholds=... for the exits' own trigger, "
                "or trigger=..."
            )
        if self.skipped not in SKIPPED:
            raise UsageError(f"skipped is {self.skipped!r}; choose one of {', '.join(SKIPPED)}.")
        _fitting(self.exits, self.exit_trigger)
        settle(self, spot_check=real("spot_check", self.spot_check, "from 0 to 1, a share of tokens", lambda s: 0 <= s <= 1))
        if self.monitor is not None and not self.spot_check:
            raise UsageError(
                f"spot_check is {self.spot_check}, and a monitor sees only tokens that are checked; give some, such as 0.05."
            )
        if self.spot_check:
            self._watch()

    def _watch(self) -> None:
        certificate = self.certificate
        if self.skipped != "exact":
            raise UsageError(
                f"spot checks compare with full depth, which needs exact keys and values; skipped is {self.skipped!r}: "
                "take 'exact'."
            )
        if certificate is None:
            raise UsageError(
                f"spot_check={self.spot_check} watches over a certificate; give risk=..., a level certified by adi calibrate."
            )
        monitor = self.monitor or DriftMonitor.of(certificate)
        monitor.check(certificate)
        object.__setattr__(self, "monitor", monitor)

    @property
    def certificate(self) -> Certificate | None:
        """What bounds the risk, None where nothing does."""
        return None if self.risk is None else self.exits.certificate(self.kind, self.risk, self.skipped)

    @property
    def depths(self) -> tuple[int, ...]:
        """The exits."""
        return self.exits.depths

    @property
    def exit_trigger(self) -> Trigger:
        """The given one, the certificate's, or the exits' own at the given thresholds."""
        if self.trigger is not None:
            return self.trigger
        if (certificate := self.certificate) is not None:
            return certificate.trigger
        assert self.thresholds is not None
        return with_thresholds(self.exits.trigger, self.thresholds)

    def check(self, model: Model, sampled: bool) -> None:
        """Also a certificate of another model or precision, or of greedy text; and an engine that cannot propagate."""
        super().check(model, sampled)
        certificate = self.certificate
        if sampled and certificate is not None:
            raise UsageError(
                "a certificate of risk speaks of the model's plain greedy text: leave out temperature, penalties and "
                "processors (the model's own generation config too: adi.load(..., generation_config=...)), or leave out "
                "risk=... (thresholds=... are uncertified and go with all)."
            )
        if certificate is not None:
            certificate.check(model.backbone.spec)
        if self.skipped == "propagate" and not model.backbone.can_propagate:
            raise UsageError(
                f"the {model.backbone.spec.backend} engine cannot make keys and values from an exit's state: use "
                "skipped='exact', or the engine 'hf'."
            )

    def in_force(self) -> Policy:
        """Verified decoding, once the monitor has found that the certificate does not hold."""
        return Verified(self.exits) if self.monitor is not None and self.monitor.alarmed else self

    def strategy(self, request: Request, model: Model) -> Strategy:
        """Exits by their rule; verified sometimes, where there is something to watch over."""
        verification = SpotCheck(self.monitor, self.spot_check, self._loss()) if self.monitor is not None else Unverified()
        exits = _by_exits(request, self.exits, self.exit_trigger, DRAFT_TOKENS)
        return replace(exits, verification=verification, propagate=self.skipped == "propagate")

    def _loss(self) -> Loss:
        """What a token costs by the risk that the certificate bounds, in [0, 1]."""
        nats = None if self.certificate is None else self.certificate.nats
        if nats is None:
            return disagrees

        def regret(output: DepthOutput, token: int) -> float:
            assert isinstance(output, ExitOutput)
            logs_V = output.prediction.log_probs_TS[0]
            return min(max(float(logs_V.max() - logs_V[token]), 0.0), nats) / nats

        return regret

    def result(self, verification: Verification, fell_at: int | None) -> dict[str, Any]:
        """``certified``, the certificate in words, until it was refuted, and ``drift``, what spot checks found."""
        certificate, monitor = self.certificate, self.monitor
        found: dict[str, Any] = {"verified": fell_at == 0}
        if certificate is not None and fell_at is None:
            found["certified"] = certificate.sentence()
        if monitor is not None:
            seen = (verification.checked, verification.differed, monitor.checked)
            found["drift"] = Drift(monitor.level, *seen, monitor.lower, monitor.upper, fell_at)
        return found


def default_policy(model: Model) -> Verified:
    """Verified decoding, with the exits shipped for these very weights where there are some; made once for a model."""
    if "default policy" not in model.notes:
        model.notes["default policy"] = Verified(shipped_for(model.backbone.spec.fingerprint))
    found: Verified = model.notes["default policy"]
    return found


def required(policy: Policy | None, model: Model) -> Policy:
    """The policy, by default the model's; AdiError for what is none."""
    require_model(model)
    if policy is not None:
        instance("policy", policy, Policy, "FullDepth(), Verified(exits), Reflex(exits, ...) or Lookup()")
    return policy or default_policy(model)


def _warm_up(exits: Exits | None, model: Model) -> None:
    """One step of the drafter, where there is one, once for a model: engines compile it, and the embedding, when first run."""
    drafting = None if exits is None else exits.drafting(model.backbone)
    if drafting is not None and drafting not in (warm := model.notes.setdefault("warm drafters", WeakSet())):
        drafting.try_once()
        warm.add(drafting)


def _by_exits(request: Request, exits: Exits, trigger: Trigger, draft_tokens: int) -> Strategy:
    stops = tuple(depth for depth in exits.depths if trigger.may_fire(depth))
    return Strategy(ExitProposer(request, stops, trigger), draft_tokens, exits=exits, stops=stops)


def _fitting(exits: Exits, trigger: Trigger) -> None:
    """UsageError where a trigger names a depth that is no exit, where it would never be asked, or asks a network not there."""
    if not hasattr(trigger, "fires") or isinstance(trigger, type):
        raise UsageError(f"trigger is {trigger!r:.60}; give a rule such as adi.Threshold('entropy', 0.3).")
    if stray := sorted(trigger.depths - set(exits.depths)):
        raise UsageError(f"the trigger has thresholds at depths {stray}, but the exits are at {list(exits.depths)}.")
    for name in trigger.needs:
        require_network(name, exits.probe)
