"""``DriftMonitor``: whether a certificate still holds, judged by a few tokens checked at full depth, at any time.

A gambler bets that the risk is above the level. Against any running risk at most the level he cannot be expected to win, so
whenever he has won 1 / delta times his stake, drift is found, and the chance of that ever happening without one is at most
delta (Ville 1939; Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by betting"). He spreads his
money over fixed stakes: then, as log(1 + x) <= x, the promise is about the *average* risk of the tokens so far, not each one.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from adi.arguments import real
from adi.errors import UsageError
from adi.risk.certificate import Certificate

STAKES = tuple(2.0**-k for k in range(12))  # shares of the largest stake that cannot ruin
BINS = 100  # losses are rounded down to hundredths, which never finds drift too early, and kept as counts


@dataclass
class DriftMonitor:
    """What spot checks found, over as many generations as it is handed to. State, explicitly: pass it on, or start anew.

    ``level`` is the bound watched over, in [0, 1], of the risk ``kind``; ``delta`` the chance of a false alarm, ever.
    ``counts`` are checked tokens by hundredths of loss. ``alarmed`` stays once set. ``seed`` seeds the dice that choose what
    is checked.
    """

    level: float
    delta: float = 0.05
    seed: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    alarmed: bool = False
    generations: int = 0
    kind: str = "disagreement"

    @classmethod
    def of(cls, certificate: Certificate, seed: int = 0) -> DriftMonitor:
        """A monitor that has seen nothing yet, for this certificate."""
        return cls(certificate.unit_level, certificate.delta or 0.05, seed, kind=certificate.kind)

    def __post_init__(self) -> None:
        for name in ("level", "delta"):
            real(f"a monitor's {name}", getattr(self, name), "between 0 and 1", lambda share: 0 < share < 1)

    def check(self, certificate: Certificate) -> None:
        """UsageError for a monitor that watches over another certificate."""
        if (self.kind, self.level) != (certificate.kind, certificate.unit_level):
            raise UsageError(
                f"this monitor watches over {self.kind} at a level of {self.level:g}, the certificate is of {certificate.kind} "
                f"at {certificate.unit_level:g}; make one of its own: adi.DriftMonitor.of(policy.certificate)."
            )

    def dice(self) -> random.Random:
        """Fresh dice for one more generation, which know nothing of the text."""
        self.generations += 1
        return random.Random(f"{self.seed}:{self.generations}")

    def saw(self, loss: float) -> bool:
        """Take in one checked token's loss in [0, 1]; whether this is the moment at which drift is found."""
        assert 0 <= loss <= 1, loss
        place = math.floor(loss * BINS + 1e-9)
        self.counts[place] = self.counts.get(place, 0) + 1
        if not self.alarmed and self.evidence(self.level) >= 1 / self.delta:
            self.alarmed = True
            return True
        return False

    @property
    def checked(self) -> int:
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Mean loss of the tokens checked, 0 where there are none."""
        total = sum(place * count for place, count in self.counts.items())
        return total / BINS / self.checked if self.checked else 0.0

    def evidence(self, level: float) -> float:
        """What the gambler has made of 1 by betting that the running risk is above ``level``."""
        return _wealth(self.counts, level, 1 / level)

    @property
    def lower(self) -> float:
        """The running risk is above this, with confidence 1 - delta at all times together."""
        return _refuted_up_to(self.counts, self.mean, self.delta)

    @property
    def upper(self) -> float:
        """And below this, with the same confidence (each bound by itself)."""
        mirrored = {BINS - place: count for place, count in self.counts.items()}
        return 1 - _refuted_up_to(mirrored, 1 - self.mean, self.delta)


def _refuted_up_to(counts: dict[int, int], mean: float, delta: float) -> float:
    """The highest level below ``mean`` that a bet on a running risk above it refutes at ``delta``, by bisection."""
    low, high = 0.0, mean
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if middle > 0 and _wealth(counts, middle, 1 / middle) >= 1 / delta else (low, middle)
    return low


def _wealth(counts: dict[int, int], level: float, most: float) -> float:
    """Mean over the stakes of the product of 1 + stake x (loss - level), in floating point's range."""
    logs = []
    for share in STAKES:
        stake = share * most * (1 - 1e-6)
        logs.append(math.fsum(count * math.log1p(stake * (place / BINS - level)) for place, count in counts.items()))
    top = max(logs)
    return math.exp(min(700.0, top + math.log(math.fsum(math.exp(log - top) for log in logs) / len(logs))))
