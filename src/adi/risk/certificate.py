"""``Certificate``: thresholds with a stated risk, and all that the statement depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from adi.arguments import real
from adi.errors import ModelError, UsageError
from adi.exits.triggers import Rule
from adi.model.backbone import Spec
from adi.schema import NonNegative, Positive, Record

Kind = Literal["disagreement", "log_loss"]
Method = Literal["ltt", "crc"]
Skipped = Literal["exact", "propagate"]
KINDS: tuple[str, ...] = get_args(Kind)
SKIPPED: tuple[str, ...] = get_args(Skipped)
METHODS: tuple[str, ...] = get_args(Method)


class Certificate(Record, frozen=True):
    """In reflex mode with ``trigger``, the expected risk of an answer is at most ``level``.

    This holds for the first ``max_new_tokens`` tokens, decoded greedily, of an answer to a prompt that is exchangeable with
    the calibration prompts, on this model in this precision. ``kind`` is the risk (``adi.measure.calibration.losses``); the
    level of a log_loss is in nats, of which a token counts at most ``nats``. By Learn then Test ("ltt") the bound holds with
    probability 1 - ``delta`` over the draw of the ``sequences`` calibration prompts; by conformal risk control ("crc",
    ``delta`` None) on average over that draw.

    ``observed`` is the mean risk on the calibration prompts and ``mean_depth`` the mean depth of a token there. The risk of a
    trigger that never fires is 0.
    """

    method: Method
    kind: Kind
    level: NonNegative
    delta: NonNegative | None
    trigger: Rule
    sequences: Positive
    max_new_tokens: Positive
    observed: NonNegative
    mean_depth: NonNegative
    nats: NonNegative | None
    text_hash: str
    fingerprint: str
    precision: str
    skipped: Skipped = "exact"

    def __post_init__(self) -> None:
        if (self.delta is None) != (self.method == "crc") or (self.nats is None) != (self.kind == "disagreement"):
            raise UsageError(
                f"method {self.method} with delta {self.delta}, kind {self.kind} with nats {self.nats}: a certificate has "
                "a delta "
                "where its method is ltt, and nats where its kind is log_loss."
            )

    @property
    def unit_level(self) -> float:
        """The level on the scale from 0 to 1 on which losses were tested."""
        return self.level if self.nats is None else self.level / self.nats

    def check(self, spec: Spec) -> None:
        """ModelError for another model, or another precision."""
        for what, mine, other in (
            ("the weights", self.fingerprint, spec.fingerprint),
            ("the precision", self.precision, spec.numbers),
        ):
            if mine != other:
                kept = "" if spec.kv_precision == "auto" else f" --kv-precision {spec.kv_precision}"
                raise ModelError(
                    f"the certificate for {self.kind} {self.level:g} holds for {what} {mine}, and this model has {other}. "
                    f"Certify it: {_command(spec.name, self.kind, self.level, f' --precision {spec.precision}{kept}')}"
                )

    def sentence(self) -> str:
        """What it says, for people."""
        what = "tokens that differ from full depth's in the same context"
        unit = f"at most {self.level:.1%}"
        if self.kind == "log_loss":
            what, unit = "log-probability lost per token under the full model", f"at most {self.level:g} nats"
        sure = f"confidence {1 - self.delta:.0%}" if self.delta is not None else "on average over calibrations"
        return (
            f"certified: {what} {unit}, {sure}, {self.sequences} calibration prompts, "
            f"first {self.max_new_tokens} tokens of an answer to a prompt like those"
        )


def find(certificates: Sequence[Certificate], kind: str, level: float, skipped: str = "exact") -> Certificate:
    """The certificate for exactly this level; UsageError names those that there are."""
    if kind not in KINDS:
        raise UsageError(f"risk_kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    level = real("risk", level, "from 0 on, such as 0.02", lambda r: r >= 0)
    for certificate in certificates:
        if (certificate.kind, certificate.level, certificate.skipped) == (kind, level, skipped):
            return certificate
    if skipped != "exact":
        raise UsageError(
            f"risk is certified for exact keys and values, not for skipped={skipped!r}: take skipped='exact' "
            "(--skipped exact), or thresholds=..., which are uncertified, instead of risk=..."
        )
    there = [f"{c.kind} {c.level:g}" for c in certificates if c.skipped == "exact"]
    raise UsageError(
        f"{kind} {level:g} was never certified for these exits; certified are: {', '.join(there) or 'none'}. "
        f"Certify it: {_command('MODEL', kind, level)}"
    )


def _command(model: str, kind: str, level: float, more: str = "") -> str:
    what = "" if kind == KINDS[0] else f" --kind {kind}"
    return f"adi calibrate {model} --exits DIR{more}{what} --risk {level:g} --prompts FILE --out DIR"


def merged(old: Sequence[Certificate], new: Sequence[Certificate]) -> tuple[Certificate, ...]:
    """Old certificates with new ones in their place, by kind and level; all for one model in one precision, UsageError where
    old ones are for another."""
    holds = {(c.fingerprint, c.precision) for c in (*old, *new)}
    if len(holds) > 1:
        precisions = ", ".join(sorted(precision for _, precision in holds))
        raise UsageError(
            f"exits hold certificates for one precision of a model; these would be for {precisions}. "
            "Save the new ones to a folder of their own: --out DIR"
        )

    def key(c: Certificate) -> tuple[str, float, str]:
        return (c.kind, c.level, c.skipped)

    kept = {key(c): c for c in (*old, *new)}
    return tuple(kept[k] for k in sorted(kept))
