"""``calibrate``: from prompts to certificates."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from adi.arguments import real, settle
from adi.artifact import Exits, require_model
from adi.decoding.teacher_forcing import ForcedReading, encoded, forced_readings, own_answers
from adi.errors import UsageError
from adi.exits.triggers import Never, Threshold
from adi.measure.calibration.losses import NATS, AnswerLoss, own_text_losses, replayed_loss
from adi.measure.calibration.risk_path import risk_path
from adi.model.load import Model
from adi.model.prompt import Prompt
from adi.progress import Progress, no_progress
from adi.risk.bounds import Losses, conformal, learn_then_test, sequences_needed
from adi.risk.certificate import KINDS, METHODS, Certificate, Kind, Method

LEARNING_SHARE = 0.2
LEAST_PROMPTS = 10
ANSWERED = 64  # prompts between two reports of progress


@dataclass(frozen=True)
class TestedRule:
    """One rule on the calibration prompts: the losses on its own text and, beside them, replayed on full depth's."""

    trigger: Threshold
    own_text: tuple[AnswerLoss, ...]
    replayed: tuple[AnswerLoss, ...]


@dataclass(frozen=True)
class Calibration:
    """A certificate for every level asked, the rules that were tested, and a sentence for every level at which none fires."""

    certificates: tuple[Certificate, ...]
    tested: tuple[TestedRule, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The figures: of each rule mean losses and depth, on own text and replayed."""
        rules = []
        for rule in self.tested:
            means = {
                way: {name: mean(getattr(loss, name) for loss in getattr(rule, way)) for name in (*KINDS, "depth")}
                for way in ("own_text", "replayed")
            }
            rules.append({"trigger": rule.trigger.to_json(), **means})
        return {"certificates": [c.to_json() for c in self.certificates], "rules": rules, "notes": list(self.notes)}


@dataclass(frozen=True)
class RiskTest:
    """How a level is tested: the risk's ``kind``, the ``method``, and the chance ``delta`` that it errs.

    AdiError for what cannot be meant.
    """

    kind: Kind
    method: Method
    delta: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.method not in METHODS:
            allowed = f"kind among {', '.join(KINDS)}, method among {', '.join(METHODS)}"
            raise UsageError(f"kind is {self.kind!r} and method {self.method!r}; choose {allowed}.")
        settle(self, delta=real("delta", self.delta, "between 0 and 1, a chance such as 0.05", lambda d: 0 < d < 1))

    @property
    def scale(self) -> float:
        """The level that is a loss of 1."""
        return 1.0 if self.kind == "disagreement" else NATS

    def check(self, levels: Sequence[float]) -> None:
        """AdiError unless there are levels and all of them could be exceeded."""
        most = "1, a share of tokens" if self.kind == "disagreement" else f"{NATS:g}, in nats per token"
        if not levels:
            raise UsageError(f"risk levels are {levels!r}; give at least one, between 0 and {most}.")
        for level in levels:
            real("a risk level", level, f"between 0 and {most}", lambda r: 0 < r < self.scale)

    def losses(self, tested: Sequence[TestedRule]) -> Losses:
        """The rules' losses on their own text, ``[G, N]``."""
        return np.array([[getattr(loss, self.kind) for loss in rule.own_text] for rule in tested], dtype=np.float64)

    def boldest(self, tested: Sequence[TestedRule], level: float) -> int | None:
        """The place of the boldest rule, safest first, whose risk is shown to be at most ``level``; None where none is."""
        if not tested:
            return None
        losses_GN, unit = self.losses(tested), level / self.scale
        return learn_then_test(losses_GN, unit, self.delta) if self.method == "ltt" else conformal(losses_GN, unit)


def calibrate(
    model: Model,
    exits: Exits,
    prompts: Sequence[Prompt],
    levels: Sequence[float],
    *,
    delta: float = 0.05,
    kind: Kind = "disagreement",
    method: Method = "ltt",
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Calibration:
    """Find, for each level, the boldest thresholds whose risk is shown to be at most that.

    Args:
        model, exits: which the certificates will hold for, in the precision that is loaded.
        prompts: texts or token ids, a sample, drawn as the prompts of use will be; one that is given again counts once, or it
            would be taken for more evidence than it is. A fifth, chosen at random, decides in which order thresholds are tried;
            the others are calibrated on.
        levels: shares of tokens (of kind "disagreement") or nats per token ("log_loss").
        delta: the chance, over the draw of prompts, that a level does not hold. It is given per level.
        kind: which risk; ``adi.measure.calibration.losses`` defines both.
        method: "ltt" (Learn then Test with the betting bound) or "crc" (conformal risk control, on average, no delta).
        max_new_tokens: length of the answers that the certificate is about.

    Raises:
        AdiError: levels or delta outside (0, 1), too few prompts, exits of another model.
    """
    require_model(model, exits)
    (test := RiskTest(kind, method, delta)).check(levels)
    order = list(dict.fromkeys(encoded(model := model.plain(), prompts)))  # certificates speak of plain greedy text
    if len(order) < LEAST_PROMPTS:
        raise UsageError(f"{len(order)} different prompts are too few to calibrate on; give at least {LEAST_PROMPTS}.")
    random.Random(seed).shuffle(order)
    learning = max(2, round(LEARNING_SHARE * len(order)))
    readings = _readings(model, exits, order, max_new_tokens, progress)
    layers = model.backbone.spec.layers
    units = sorted(level / test.scale for level in levels)
    rules = risk_path(readings[:learning], exits.depths, layers, units, kind, _signal(exits))
    tested: list[TestedRule] = []
    for place, rule in enumerate(rules):
        progress(place, len(rules), "rules")
        own = own_text_losses(model, exits, readings[learning:], rule.trigger, max_new_tokens)
        replayed = (replayed_loss(reading, exits.depths, layers, rule.trigger) for reading in readings[learning:])
        tested.append(TestedRule(rule.trigger, tuple(own), tuple(replayed)))
        if not any(test.boldest(tested, level) == place for level in levels):
            break  # a bolder one would not pass either
    about = {
        "max_new_tokens": max_new_tokens,
        "sequences": len(order) - learning,
        "text_hash": hashlib.blake2b(repr(order[learning:]).encode(), digest_size=8).hexdigest(),
        "fingerprint": model.backbone.spec.fingerprint,
        "precision": model.backbone.spec.numbers,
    }
    found = [certify(tested, test, level, layers, about) for level in sorted(levels)]
    notes = [note for c in found if (note := _note(c, delta)) is not None]
    if (again := len(prompts) - len(order)) > 0:
        notes.append(f"{again} prompts were given more than once, and count once.")
    return Calibration(tuple(found), tuple(tested), tuple(notes))


def _signal(exits: Exits) -> str:
    """What rules are made of: the gate where the exits' own trigger reads it."""
    return "gate" if exits.trigger.needs == ("gate",) else "top_probability"


def certify(tested: Sequence[TestedRule], test: RiskTest, level: float, layers: int, about: dict[str, Any]) -> Certificate:
    """The certificate for a level; where no rule passed, of a trigger that never fires."""
    place = test.boldest(tested, level)
    losses = () if place is None else tested[place].own_text
    return Certificate(
        method=test.method,
        kind=test.kind,
        level=level,
        delta=test.delta if test.method == "ltt" else None,
        trigger=Never() if place is None else tested[place].trigger,
        observed=test.scale * mean(getattr(loss, test.kind) for loss in losses) if losses else 0.0,
        mean_depth=mean(loss.depth for loss in losses) if losses else float(layers),
        nats=None if test.kind == "disagreement" else NATS,
        **about,
    )


def _readings(
    model: Model, exits: Exits, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, progress: Progress
) -> list[ForcedReading]:
    """Of full depth's answers to these prompts."""
    found: list[ForcedReading] = []
    for at in range(0, len(prompts), ANSWERED):
        progress(at, len(prompts), "answers")
        part = own_answers(model, prompts[at : at + ANSWERED], max_new_tokens)
        found += forced_readings(model.backbone, exits, [(g.prompt_ids, g.token_ids) for g in part])
    return found


def _note(certificate: Certificate, delta: float) -> str | None:
    """Where nothing fires: what data could change that."""
    if not isinstance(certificate.trigger, Never):
        return None
    needed = sequences_needed(certificate.unit_level, delta, certificate.method)
    nothing = f"{certificate.kind} {certificate.level:g}: no exit could be certified, so every token runs at full depth"
    if certificate.sequences < needed:
        return (
            f"{nothing}; with {certificate.sequences} calibration prompts no rule could pass, whatever it does: at least "
            f"{needed} are needed if none of them shows a loss, and about twice as many to be of use."
        )
    return f"{nothing}: the safest rule found lost too much on {certificate.sequences} prompts. More prompts, or better exits."
