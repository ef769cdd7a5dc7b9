"""What an interrupted benchmark had finished, in a file beside its result, so that the same command resumes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adi.errors import FileError
from adi.files import read_json, write_json
from adi.measure.bench.outcomes import BatchOutcome, Outcome, Sweep
from adi.measure.bench.worker import System
from adi.schema import Natural, Record, from_json

FORMAT, VERSION = "adi-bench-partial", 4


class SystemState(Record, frozen=True):
    """What a system gave, by prompt, and by size and first prompt of a batch."""

    peak_bytes: Natural
    error: str | None
    outcomes: dict[int, list[Outcome]]
    batches: dict[int, dict[int, BatchOutcome]]


class Unfinished(Record, frozen=True):
    """The file's content. ``terms`` are all that the outcomes depend on; other terms are another benchmark."""

    format: str
    version: int
    terms: dict[str, Any]
    sweeps: dict[str, Sweep]
    systems: dict[str, SystemState]

    def restore(self, systems: Sequence[System]) -> None:
        """Give the systems what they had, an error included."""
        for system in systems:
            if (kept := self.systems.get(system.name)) is not None:
                system.peak_bytes, system.error = kept.peak_bytes, kept.error
                system.outcomes, system.batches = kept.outcomes, kept.batches


@dataclass(frozen=True)
class ResumeFile:
    """The file beside a ``result`` that is not yet written; without one nothing is kept."""

    result: Path | None
    terms: Mapping[str, Any]

    @property
    def path(self) -> Path | None:
        return self.result and self.result.with_name(self.result.name + ".partial")

    def read(self) -> Unfinished:
        """What was finished; FileError where the file is damaged, or of another benchmark."""
        if self.path is None or not self.path.exists():
            return Unfinished(FORMAT, VERSION, {}, {}, {})
        value = read_json(self.path, "unfinished benchmark")
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise FileError(f"{self.path} is not an unfinished benchmark of this adi; delete it or choose another --json.")
        found = from_json(value, Unfinished, f"{self.path} is damaged (delete it)")
        if other := sorted(name for name in self.terms if found.terms.get(name) != self.terms[name]):
            raise FileError(
                f"{self.path} is an unfinished benchmark with another {', '.join(other)}; "
                "give that command again to finish it, delete the file, or choose another --json."
            )
        return found

    def save(self, systems: Sequence[System], sweeps: Mapping[str, Sweep]) -> None:
        """Write all that is finished, whole or not at all."""
        if self.path is not None:
            kept = {s.name: SystemState(s.peak_bytes, s.error, s.outcomes, s.batches) for s in systems}
            write_json(self.path, Unfinished(FORMAT, VERSION, dict(self.terms), dict(sweeps), kept).to_json())

    def discard(self) -> None:
        """The result is written: nothing is left to resume."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
