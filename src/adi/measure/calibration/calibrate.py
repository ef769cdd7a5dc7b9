"""``calibrate``: from prompts to certificates."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from adi.artifact import Exits
from adi.decoding.scheduler import generate_batch
from adi.errors import AdiError
from adi.exits.triggers import Never, Rule
from adi.measure.calibration.losses import NATS, Sample, own_text, replayed
from adi.measure.calibration.risk_path import RiskRule, path
from adi.measure.forced_read import ForcedRead, forced_read
from adi.model.load import Model
from adi.risk.bounds import Losses, conformal, learn_then_test, sequences_needed
from adi.risk.certificate import KINDS, METHODS, Certificate

LEARNING_SHARE = 0.2
LEAST_PROMPTS = 10
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tested:
    """One rule on the calibration prompts: its samples, those that were replayed on full depth's text beside them."""

    trigger: Rule
    samples: tuple[Sample, ...]
    replayed: tuple[Sample, ...]


@dataclass(frozen=True)
class Calibration:
    """A certificate for every level asked, the rules that were tested, and a sentence for every level at which none fires."""

    certificates: tuple[Certificate, ...]
    tested: tuple[Tested, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The figures: of each rule mean losses and depth, on own text and replayed."""
        rules = []
        for rule in self.tested:
            means = {
                way: {name: mean(getattr(s, name) for s in samples) for name in (*KINDS, "depth")}
                for way, samples in (("own_text", rule.samples), ("replayed", rule.replayed))
            }
            rules.append({"trigger": rule.trigger.to_json(), **means})
        return {"certificates": [c.to_json() for c in self.certificates], "rules": rules, "notes": list(self.notes)}


def calibrate(
    model: Model,
    exits: Exits,
    prompts: Sequence[str],
    levels: Sequence[float],
    *,
    delta: float = 0.05,
    kind: str = "disagreement",
    method: str = "ltt",
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Find, for each level, the boldest thresholds whose risk is shown to be at most that.

    Args:
        model, exits: which the certificates will hold for, in the precision that is loaded.
        prompts: a sample, drawn as the prompts of use will be; one that is given again counts once, or it would be taken for
            more evidence than it is. A fifth, chosen at random, says in which order thresholds are tried; the others are
            calibrated on.
        levels: shares of tokens (of kind "disagreement") or nats per token ("log_loss").
        delta: the chance, over the draw of prompts, that a level does not hold. It is given per level.
        kind: which risk; ``measure.risk`` defines both.
        method: "ltt" (Learn then Test with the betting bound) or "crc" (conformal risk control, on average, no delta).
        max_new_tokens: length of the answers that the certificate speaks of.

    Raises:
        ValueError: levels or delta outside (0, 1), too few prompts, exits of another model.
    """
    units = _units(levels, kind, method, delta)
    raw = model.tokenizer is not None and not model.tokenizer.has_chat_template
    order = list({model.encode(prompt, raw=raw): prompt for prompt in prompts}.values())
    if len(order) < LEAST_PROMPTS:
        raise AdiError(f"{len(order)} different prompts are too few to calibrate on; give at least {LEAST_PROMPTS}.")
    random.Random(seed).shuffle(order)
    learning = max(2, round(LEARNING_SHARE * len(order)))
    told = _told(model, exits, order, raw, max_new_tokens, progress)
    layers = model.backbone.spec.layers
    rules = path(told[:learning], exits.depths, layers, sorted(units), kind)
    tested: list[Tested] = []
    for place, rule in enumerate(rules):
        progress("rules", place, len(rules))
        tested.append(try_rule(model, exits, told[learning:], rule, max_new_tokens))
        if not any(_stands(tested, unit, kind, method, delta) for unit in units):
            break
    about = {
        "delta": delta if method == "ltt" else None,
        "method": method,
        "kind": kind,
        "max_new_tokens": max_new_tokens,
        "text_hash": text_hash([t.prompt_ids for t in told[learning:]]),
        "fingerprint": model.backbone.spec.fingerprint,
        "precision": model.backbone.spec.precision,
    }
    found = [certify(tested, level, len(told) - learning, layers, about) for level in sorted(levels)]
    notes = [note for c in found if (note := _note(c, delta)) is not None]
    if (again := len(prompts) - len(order)) > 0:
        notes.append(f"{again} prompts were given more than once, and count once.")
    return Calibration(tuple(found), tuple(tested), tuple(notes))


def try_rule(model: Model, exits: Exits, told: Sequence[ForcedRead], rule: RiskRule, max_new_tokens: int) -> Tested:
    """One rule on these prompts, on its own text and replayed."""
    own = own_text(model, exits, told, rule.trigger, max_new_tokens)
    layers = model.backbone.spec.layers
    return Tested(rule.trigger, tuple(own), tuple(replayed(t, exits.depths, layers, rule.trigger) for t in told))


def losses(tested: Sequence[Tested], kind: str, places: Sequence[int] | None = None) -> Losses:
    """The rules' losses of a kind, ``[G, N]``, of all sequences or of those at ``places``, in this order."""
    rows = [[getattr(sample, kind) for sample in rule.samples] for rule in tested]
    whole = np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 0)
    return whole if places is None else whole[:, list(places)]


def choose(losses_GN: Losses, unit: float, method: str, delta: float) -> int | None:
    """The boldest rule that this method believes, None where it believes none."""
    return learn_then_test(losses_GN, unit, delta) if method == "ltt" else conformal(losses_GN, unit)


def certify(tested: Sequence[Tested], level: float, sequences: int, layers: int, about: dict[str, Any]) -> Certificate:
    """The certificate for a level; where no rule was believed, of a trigger that never fires."""
    kind, method = about["kind"], about["method"]
    unit = level if kind == "disagreement" else level / NATS
    place = choose(losses(tested, kind), unit, method, about["delta"] or 0.05) if tested else None
    trigger: Rule = Never() if place is None else tested[place].trigger
    scale = 1.0 if kind == "disagreement" else NATS
    return Certificate(
        level=level,
        trigger=trigger,
        sequences=sequences,
        observed=0.0 if place is None else scale * mean(getattr(s, kind) for s in tested[place].samples),
        mean_depth=float(layers) if place is None else mean(s.depth for s in tested[place].samples),
        nats=None if kind == "disagreement" else NATS,
        **about,
    )


def text_hash(prompts: Sequence[Sequence[int]]) -> str:
    """A short name for exactly these prompts, as token ids, in this order."""
    return hashlib.blake2b(repr([tuple(p) for p in prompts]).encode(), digest_size=8).hexdigest()


def _told(
    model: Model, exits: Exits, prompts: Sequence[str], raw: bool, max_new_tokens: int, progress: Progress
) -> list[ForcedRead]:
    found: list[ForcedRead] = []
    for at in range(0, len(prompts), 64):
        progress("answers", at, len(prompts))
        part = generate_batch(model, prompts[at : at + 64], max_new_tokens=max_new_tokens, raw=raw)
        found += forced_read(model.backbone, exits, [(g.prompt_ids, g.token_ids) for g in part])
    return found


def _units(levels: Sequence[float], kind: str, method: str, delta: float) -> list[float]:
    """The levels on the scale of losses from 0 to 1."""
    if kind not in KINDS or method not in METHODS:
        raise AdiError(f"kind {kind!r}, method {method!r}: choose among {', '.join(KINDS)} and {', '.join(METHODS)}.")
    if not 0 < delta < 1:
        raise AdiError(f"delta is {delta}; it is a chance between 0 and 1, such as 0.05.")
    units = [level if kind == "disagreement" else level / NATS for level in levels]
    if not units or not all(0 < unit < 1 for unit in units):
        most = "1, a share of tokens" if kind == "disagreement" else f"{NATS:g}, in nats per token"
        raise AdiError(f"risk levels {tuple(levels)} must lie between 0 and {most}, at least one.")
    return units


def _stands(tested: Sequence[Tested], unit: float, kind: str, method: str, delta: float) -> bool:
    """Whether the last rule is still believed at this level, so that a bolder one may be."""
    return choose(losses(tested, kind), unit, method, delta) == len(tested) - 1


def _note(certificate: Certificate, delta: float) -> str | None:
    """Where nothing fires: what data could change that."""
    if not isinstance(certificate.trigger, Never):
        return None
    needed = sequences_needed(certificate.unit_level, delta, certificate.method)
    said = f"{certificate.kind} {certificate.level:g}: no exit can be believed, so every token runs at full depth"
    if certificate.sequences < needed:
        return (
            f"{said}; with {certificate.sequences} calibration prompts no rule could pass, whatever it does: at least {needed} "
            "are needed if none of them shows a loss, and about twice as many to be of use."
        )
    return f"{said}: the safest rule found lost too much on {certificate.sequences} prompts. More prompts, or better exits."
