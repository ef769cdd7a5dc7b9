"""What an interrupted benchmark had finished, in a file beside its result, so that the same command goes on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adi.errors import AdiError
from adi.files import read_json, write_json
from adi.measure.bench.timing import Outcome, Pair
from adi.measure.bench.worker import System

FORMAT, VERSION = "adi-bench-partial", 2


@dataclass(frozen=True)
class Partial:
    """The side file of a result. ``terms`` are all that the outcomes depend on; other terms are another benchmark."""

    path: Path
    terms: Mapping[str, Any]

    @staticmethod
    def beside(result: Path, terms: Mapping[str, Any]) -> Partial:
        return Partial(result.with_name(result.name + ".partial"), terms)

    def sweeps(self) -> dict[str, Any]:
        """The sweeps that were finished, by contestant."""
        found = self._read().get("sweeps", {})
        if not isinstance(found, dict):
            raise AdiError(f"{self.path} is damaged (its sweeps are no object); delete it.")
        return found

    def restore(self, contestants: Sequence[System]) -> None:
        """Give the contestants what they had, an error included; ValueError where the file is damaged."""
        try:
            self._restore(contestants)
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise AdiError(f"{self.path} is damaged ({type(error).__name__}: {error}); delete it.") from None

    def _restore(self, contestants: Sequence[System]) -> None:
        kept = self._read().get("contestants", {})
        for contestant in contestants:
            if contestant.name in kept:
                mine = kept[contestant.name]
                contestant.peak_bytes, contestant.error = mine["peak_bytes"], mine["error"]
                contestant.pairs = {int(first): Pair(**pair) for first, pair in mine["pairs"].items()}
                for prompt, outcomes in mine["outcomes"].items():
                    contestant.outcomes[int(prompt)] = [
                        Outcome(**{**outcome, "token_ids": tuple(outcome["token_ids"])}) for outcome in outcomes
                    ]

    def save(self, contestants: Sequence[System], sweeps: Mapping[str, Any]) -> None:
        """Write all that is finished, whole or not at all."""
        kept = {
            c.name: {
                "peak_bytes": c.peak_bytes,
                "error": c.error,
                "outcomes": {str(p): [asdict(o) for o in outcomes] for p, outcomes in c.outcomes.items()},
                "pairs": {str(first): asdict(pair) for first, pair in c.pairs.items()},
            }
            for c in contestants
        }
        stated = {"format": FORMAT, "version": VERSION, "terms": self.terms}
        write_json(self.path, {**stated, "sweeps": dict(sweeps), "contestants": kept})

    def discard(self) -> None:
        """The result is written: nothing is left to resume."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        value = read_json(self.path, "unfinished benchmark")
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise AdiError(f"{self.path} is not an unfinished benchmark of this adi; delete it or choose another --json.")
        if not isinstance(value.get("terms"), dict):
            raise AdiError(f"{self.path} is damaged (it states no terms); delete it.")
        if other := sorted(name for name in self.terms if value["terms"].get(name) != self.terms[name]):
            raise AdiError(
                f"{self.path} is an unfinished benchmark with another {', '.join(other)}; "
                "give that command again to finish it, delete the file, or choose another --json."
            )
        return value
