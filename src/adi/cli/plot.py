"""``adi plot``: a trace or a benchmark as a page for a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adi.cli.shared.options import option
from adi.cli.shared.output import err, say
from adi.errors import UsageError
from adi.files import write_text


def plot(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace (adi trace, adi run --trace) or an adi bench --json.")],
    out: Annotated[Path | None, option("--out", "-o", help="The page to write; by default FILE with .html.")] = None,
    base: Annotated[str | None, option("--base", help="Of a benchmark: show ratios against this mode of adi's.")] = None,
) -> None:
    """Turn a trace or a benchmark into one self-contained HTML page.

    A trace shows the text as a depth heat map, with every exit that was checked; a benchmark speeds, ratios and categories.
    """
    from adi.measure.bench.report import bench_page, is_result, read_result
    from adi.measure.trace import read_trace
    from adi.measure.trace_page import plot as write_page

    if file.is_dir():
        raise UsageError(f"{file} is a folder; give a trace or the --json file of a benchmark.")
    target = out or file.with_suffix(".html")
    if target.resolve() == file.resolve():
        raise UsageError(f"--out {target} is the file itself; choose another name.")
    if is_result(file):
        write_text(target, bench_page(read_result(file), base))
    elif base is not None:
        raise UsageError(f"--base {base!r} is an option for benchmarks only, and {file} is none; leave it out.")
    else:
        write_page(read_trace(file), target)
    say(err(), f"page written to {target}")
