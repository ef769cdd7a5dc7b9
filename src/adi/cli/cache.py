"""``adi cache``: what converted and exported models take on disk, and how to be rid of them."""

from __future__ import annotations

from typing import Annotated

import typer

from adi.cache import cache_entries, cache_folder
from adi.cli.shared.options import option
from adi.cli.shared.output import err, out, say, table
from adi.errors import UsageError
from adi.files import megabytes


def cache(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Models, by part of their name.")] = None,
    clear: Annotated[bool, option("--clear", help="Delete what is listed; without --yes only say so.")] = False,
    yes: Annotated[bool, option("--yes", "-y", help="With --clear: delete without asking again.")] = False,
) -> None:
    """What the cache holds of the models so far used, all or those named, and its size; with --clear, delete that.

    The place is $ADI_CACHE, by default ~/.cache/adi. What is deleted is made again when it is needed.
    """
    if yes and not clear:
        raise UsageError("--yes belongs to --clear.")
    found = [e for e in cache_entries() if not names or any(name.lower() in e.name.lower() for name in names)]
    if names and not found:
        raise UsageError(f"the cache in {cache_folder()} holds nothing named {', '.join(names)}; see adi cache.")
    say(out(), cache_folder())
    rows = [(entry.name, entry.what, megabytes(entry.bytes)) for entry in found]
    total = ("total", "", megabytes(sum(entry.bytes for entry in found)))
    out().print(table(None, ("model", "", "size"), [*rows, total], left=("model", "")))
    if clear and yes:
        for entry in found:
            entry.delete()
        say(err(), "Deleted.")
    elif clear:
        say(err(), "Nothing is deleted yet: give --yes too.")
