"""Free energy of what was decided, in nats: surprise plus price times cost. Plain numbers, for every token of a text.

The level of a depth is loss + price * cost. A distribution q over depths has F = sum q level - tau H(q), and none has less than
F* = -tau log sum exp(-level / tau); ``training.price`` has the same for tensors. A token is decided at one depth, with tau 0: F
is that depth's level, F* the least of the depths that were looked at, and F - F*, the regret, what a better halt alone could
have saved (variational free energy: Friston 2010).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from adi.schema import Record

FULL_PRICE = 1.0  # nats for a full pass where none is given: then a token's price is its share of depth


def free_energy(q_R: Sequence[float], level_R: Sequence[float], tau: float = 0.0) -> float:
    """F of a halting distribution over depths of these levels."""
    return sum(q * level + (tau * q * math.log(q) if q > 0 else 0.0) for q, level in zip(q_R, level_R, strict=True))


def least_free_energy(level_R: Sequence[float], tau: float = 0.0) -> float:
    """F*, the least that any halting distribution reaches; at ``tau`` 0 the lowest level."""
    least = min(level_R)
    return least - tau * math.log(sum(math.exp((least - level) / tau) for level in level_R)) if tau else least


class FreeEnergy(Record, frozen=True):
    """Means over the tokens of a text: ``total`` = ``surprise`` + ``price``; ``depth_share`` is that of the blocks which had
    run, ``full_price`` what all of them cost. ``regret``: by how much the best looked-at depths would have been lower."""

    total: float
    surprise: float
    price: float
    depth_share: float
    regret: float
    full_price: float

    def __str__(self) -> str:
        return (
            f"F = {self.total:.2f} nats a token ({self.surprise:.2f} surprise + {self.price:.2f} for {self.depth_share:.0%} "
            f"depth), regret {self.regret:.2f}"
        )
