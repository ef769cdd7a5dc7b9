"""How a text is painted in the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from adi.cli.shared.paint import ERASE_BELOW, RESTORE, Painter, legend, style_of
from adi.decoding.records import Draft, Drafted, Rejected, Step


def _painter() -> tuple[Painter, io.StringIO]:
    out = io.StringIO()
    return Painter(Console(file=out, force_terminal=True, color_system="truecolor"), (2, 4)), out


def _step(text: str, depth: int, drafted: bool) -> Step:
    return Step(0, 0, text, depth, "exit" if drafted else "full", 1, drafted, drafted, {}, (), (), 0.0)


def test_drafts_are_painted_and_wiped() -> None:
    painter, out = _painter()
    painter.show(Drafted(Draft(1, " red", 2)))
    assert " red" in out.getvalue()
    painter.show(Drafted(Draft(2, " blue\n", 4)))
    assert "⏎" in out.getvalue()
    painter.show(Rejected(1))
    assert out.getvalue().count(RESTORE + ERASE_BELOW) == 2
    painter.show(_step(" red", 2, drafted=True))
    painter.close()
    assert out.getvalue().split(ERASE_BELOW)[-1] == f"{style_of(2, (2, 4)).render(' red')}\n"


def test_colours_tell_depths_apart() -> None:
    assert style_of(2, (2, 4)) != style_of(4, (2, 4)) != style_of(6, (2, 4))
    assert legend((2, 4), 6).plain == "decided after 2 4 6 (all) of 6 blocks"
