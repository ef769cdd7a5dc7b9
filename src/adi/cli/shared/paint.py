"""Colour by depth in a terminal: tokens as they stream, drafts that may be taken back, the legend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.color import Color
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style
from rich.text import Text

from adi.decoding.records import Draft, Drafted, Event, Rejected, Step

# Warm where the model stopped early, cool where it went deep; even steps in lightness, readable on black and on white.
SCALE = ("#e8590c", "#e67700", "#b08900", "#5c940d", "#0b8a6a", "#0c7fb0", "#5568c9")
SAVE, RESTORE, ERASE_BELOW, LINE_BELOW_AND_BACK = "\x1b7", "\x1b8", "\x1b[0J", "\x1bD\x1b[A"


def style_of(depth: int, depths: Sequence[int]) -> Style:
    """The style of a token decided at ``depth``; full depth is plain."""
    if depth not in depths:
        return Style()
    place = depths.index(depth) / max(1, len(depths) - 1)
    return Style(color=Color.parse(SCALE[round(place * (len(SCALE) - 1))]), bold=True)


def legend(depths: Sequence[int], layers: int) -> Text:
    """One line: which colour is which depth."""
    text = Text("decided after ")
    for depth in depths:
        text.append(f"{depth} ", style_of(depth, depths))
    return text.append(f"{layers} (all) of {layers} blocks")


def printable(text: str) -> str:
    """The text without control characters other than line ends and tabs: a model must not steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


class Painter:
    """Writes events to a terminal: final tokens in the colour of their depth, drafts behind them, dim, until decided.

    Drafts are painted from a saved cursor position and wiped from there. One spare line below is secured first, so that
    the position survives a draft that wraps at the bottom of the screen.
    """

    def __init__(self, console: Console, depths: Sequence[int]) -> None:
        self._console, self._depths, self._out = console, tuple(depths), console.file
        self._drafts: list[Draft] = []
        self.live = console.is_terminal and not console.legacy_windows

    def show(self, event: Event) -> None:
        """Paint one event."""
        self._wipe()
        match event:
            case Drafted():
                self._drafts.append(event.draft)
            case Rejected():
                del self._drafts[-event.count :]
            case Step():
                if event.drafted and self._drafts:
                    self._drafts.pop(0)
                self._write(printable(event.text), style_of(event.depth, self._depths))
        self._paint()
        self._out.flush()

    def follow(self, events: Iterable[Event]) -> Iterator[Step]:
        """Paint events as they come and pass the steps on; the text's last line is ended, interrupted or not."""
        try:
            for event in events:
                self.show(event)
                if isinstance(event, Step):
                    yield event
        finally:
            self.close()

    def close(self) -> None:
        """End the text's last line."""
        self._wipe()
        self._out.write("\n")
        self._out.flush()

    def _write(self, text: str, style: Style) -> None:
        colours = COLOR_SYSTEMS.get(self._console.color_system or "")
        self._out.write(style.render(text, color_system=colours) if self.live else text)

    def _paint(self) -> None:
        if self.live and self._drafts:
            self._out.write(LINE_BELOW_AND_BACK + SAVE)
            for draft in self._drafts:
                style = style_of(draft.depth, self._depths) + Style(dim=True, italic=True, bold=False)
                self._write(printable(draft.text).replace("\n", "⏎"), style)

    def _wipe(self) -> None:
        if self.live and self._drafts:
            self._out.write(RESTORE + ERASE_BELOW)
