"""What of the checks is a violation, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from adi.measure.audit.replay import Replay
from adi.measure.audit.sampling import Drawing
from adi.measure.audit.ties import Divergence


@dataclass
class Tally:
    """Runs that had to say what full depth says."""

    name: str
    runs: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def within(self) -> bool:
        return all(d.explained for d in self.divergences)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}


def replay_violations(where: str, replayed: Sequence[Replay]) -> list[str]:
    """Sentences; none where all is as promised."""
    said = []
    for i, found in enumerate(replayed):
        for drift in found.drifts:
            what = f"{where}: replay of prompt {i}: {drift.of} at depth {drift.depth} are off by"
            if not drift.within:
                said.append(f"{what} {drift.drafted:.2g}, {drift.allowed:.2g} is allowed")
            if not drift.sound:
                said.append(f"{what} {drift.rough:.2g} of their size without any drafts, {drift.most:.2g} is allowed")
    return said


def text_violations(where: str, tallies: Sequence[Tally]) -> list[str]:
    said = []
    for tally in tallies:
        for gap in tally.divergences:
            if not gap.explained:
                text = f"prompt {gap.prompt} parts from full depth at token {gap.at} ({gap.got} for {gap.full}), no tie"
                said.append(f"{where}: {tally.name}: {text} (gap {gap.gap:.2g}, noise {gap.noise:.2g})")
    return said


def draw_violations(where: str, drawings: Sequence[Drawing]) -> list[str]:
    said = []
    for d in drawings:
        if d.variation > d.band:
            said.append(
                f"{where}: draws with drafts by {d.drafts!r} are {d.variation:.3f} off their law, {d.band:.3f} is allowed"
            )
        if (odd := d.draws - d.foreseen - d.near) > 0:
            said.append(f"{where}: {odd} of {d.draws} draws with drafts by {d.drafts!r} are not what their seeds say")
    return said
