"""Stop strings over a stream of steps, whose tokens do not end where the strings do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from msgspec import structs

from adi.decoding.records import Step
from adi.errors import AdiError

Other = TypeVar("Other")


class StopStrings:
    """Holds steps back while their text might be the beginning of a stop string; cuts the text where one is found."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise AdiError(f"stop strings are texts of at least one character, got {list(stops)!r}.")
        self.stops = tuple(stops)
        self.hit: str | None = None

    def watch(self, events: Iterable[Step | Other]) -> Iterator[Step | Other]:
        """The same steps, and whatever is between them, up to the first stop string, which is left out of the text."""
        if not self.stops:
            yield from events
            return
        held: list[Step] = []
        for event in events:
            if not isinstance(event, Step):
                yield event
                continue
            held.append(event)
            text = "".join(step.text for step in held)
            if (at := self._find(text)) is not None:
                yield from _cut(held, at)
                return
            safe = len(text) - self._overlap(text)
            while held and len(held[0].text) <= safe:
                safe -= len(held[0].text)
                yield held.pop(0)
        yield from held

    def _find(self, text: str) -> int | None:
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if not found:
            return None
        at, self.hit = min(found)
        return at

    def _overlap(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins some stop string."""
        longest = max((len(stop) for stop in self.stops), default=0)
        ends = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


def _cut(steps: Sequence[Step], at: int) -> Iterator[Step]:
    """The steps whose text begins before ``at``, the last one cut there."""
    for step in steps:
        if at <= 0:
            return
        yield structs.replace(step, text=step.text[:at])
        at -= len(step.text)
