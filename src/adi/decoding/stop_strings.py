"""Stop strings over a stream of steps, whose tokens do not end where the strings do."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from msgspec import structs

from adi.decoding.records import Event, Step
from adi.errors import UsageError


class StopStrings:
    """Holds events back, in their order, while a stop string may have begun in the text; cuts the text where one is found.

    A stop string is looked for in the text as it is shown, and in the text with its special tokens, which ``special`` spells:
    "" for a token that is none. ``push`` events one by one; after the last one, ``rest``. ``hit`` is the stop string found.
    """

    def __init__(self, stops: Sequence[str], special: Callable[[int], str] = lambda token: "") -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UsageError(f"stop strings are texts of at least one character, got {list(stops)!r}.")
        self.stops = tuple(stops)
        self.hit: str | None = None
        self._special = special
        self._held: list[Event] = []
        self._texts: list[tuple[str, str]] = []  # of each held event, as shown and with special tokens

    def push(self, event: Event) -> list[Event]:
        """The events that may be shown by now."""
        if not self.stops or not (self._held or isinstance(event, Step)):
            return [event]
        self._held.append(event)
        shown, special = (event.text, self._special(event.token)) if isinstance(event, Step) else ("", "")
        self._texts.append((shown, shown + special))
        readings = list(zip(*self._texts, strict=True))
        if found := [place for texts in readings if (place := self._find(texts)) is not None]:
            count, length, self.hit = min(found)
            return _cut(self._taken(len(self._held))[:count], length)
        return self._taken(min(map(self._safe, readings)))

    def rest(self) -> list[Event]:
        """What is still held back at the end of the text."""
        return self._taken(len(self._held))

    def _taken(self, count: int) -> list[Event]:
        taken = self._held[:count]
        del self._held[:count], self._texts[:count]
        return taken

    def _find(self, texts: Sequence[str]) -> tuple[int, int, str] | None:
        """The first stop string in these texts: how many of them begin before it, and how much of the last one does."""
        text = "".join(texts)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if not found:
            return None
        at, stop = min(found)
        starts = list(accumulate(map(len, texts), initial=0))[:-1]
        count = bisect_left(starts, at)
        return count, at - starts[count - 1] if count else 0, stop

    def _safe(self, texts: Sequence[str]) -> int:
        """How many of these texts end before anything that may become a stop string."""
        text = "".join(texts)
        return bisect_right(list(accumulate(map(len, texts))), len(text) - self._overlap(text))

    def _overlap(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins some stop string."""
        longest = max((len(stop) for stop in self.stops), default=0)
        ends = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


def _cut(events: list[Event], length: int) -> list[Event]:
    """The events, of the last one so many characters."""
    if events and isinstance(last := events[-1], Step):
        events[-1] = structs.replace(last, text=last.text[:length])
    return events
