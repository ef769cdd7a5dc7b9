"""Stop strings over a stream of steps, whose tokens do not end where the strings do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import structs

from adi.decoding.records import Event, Step
from adi.errors import UsageError


class StopStrings:
    """Holds events back, in their order, while a stop string may have begun in the text; cuts the text where one is found.

    ``push`` events one by one; after the last one, ``rest``. ``hit`` is the stop string that was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UsageError(f"stop strings are texts of at least one character, got {list(stops)!r}.")
        self.stops = tuple(stops)
        self.hit: str | None = None
        self._held: list[Event] = []

    def push(self, event: Event) -> list[Event]:
        """The events that may be shown by now."""
        held = self._held
        if not self.stops or not (held or isinstance(event, Step)):
            return [event]
        held.append(event)
        text = "".join(map(_text, held))
        if found := [(text.find(stop), stop) for stop in self.stops if stop in text]:
            at, self.hit = min(found)
            self._held = []
            return list(_cut(held, at))
        safe, shown = len(text) - self._overlap(text), list[Event]()
        while held and len(_text(held[0])) <= safe:
            safe -= len(_text(held[0]))
            shown.append(held.pop(0))
        return shown

    def rest(self) -> list[Event]:
        """What is still held back at the end of the text."""
        held, self._held = self._held, []
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins some stop string."""
        longest = max((len(stop) for stop in self.stops), default=0)
        ends = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


def _text(event: Event) -> str:
    return event.text if isinstance(event, Step) else ""


def _cut(events: Sequence[Event], at: int) -> Iterator[Event]:
    """Up to the last step whose text begins before ``at``, which is cut there."""
    for event in events:
        if at <= 0:
            return
        yield structs.replace(event, text=event.text[:at]) if isinstance(event, Step) else event
        at -= len(_text(event))
