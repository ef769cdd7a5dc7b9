"""Stop strings over a stream of steps, whose tokens do not end where the strings do."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from adi.decoding.records import Event, Step
from adi.errors import UsageError


class StopStrings:
    """Holds steps back while their text might be the beginning of a stop string; cuts the text where one is found.

    ``push`` events one by one; after the last one, ``rest``. ``hit`` is the stop string that was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UsageError(f"stop strings are texts of at least one character, got {list(stops)!r}.")
        self.stops = tuple(stops)
        self.hit: str | None = None
        self._held: list[Step] = []

    def push(self, event: Event) -> list[Event]:
        """The events that may be shown by now."""
        if not isinstance(event, Step) or not self.stops:
            return [event]
        held = self._held
        held.append(event)
        text = "".join(step.text for step in held)
        if found := [(text.find(stop), stop) for stop in self.stops if stop in text]:
            at, self.hit = min(found)
            self._held = []
            return list(_cut(held, at))
        safe, shown = len(text) - self._overlap(text), list[Event]()
        while held and len(held[0].text) <= safe:
            safe -= len(held[0].text)
            shown.append(held.pop(0))
        return shown

    def rest(self) -> list[Event]:
        """What is still held back at the end of the text."""
        held, self._held = self._held, []
        return list(held)

    def _overlap(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins some stop string."""
        longest = max((len(stop) for stop in self.stops), default=0)
        ends = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


def _cut(steps: Sequence[Step], at: int) -> list[Step]:
    """The steps whose text begins before ``at``, the last one cut there."""
    kept = []
    for step in steps:
        if at <= 0:
            break
        kept.append(structs.replace(step, text=step.text[:at]))
        at -= len(step.text)
    return kept
