"""``adi history``: what a file of past outputs holds, and how to shorten or empty it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adi.cli.shared.options import ModelOption, option
from adi.cli.shared.output import err, out, say, table
from adi.errors import FileError, UsageError

if TYPE_CHECKING:
    from adi.drafters.history import History


def history(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that --history wrote.")],
    texts: Annotated[int, option("--texts", metavar="N", min=0, help="Print the last N remembered texts too.")] = 0,
    keep_tokens: Annotated[
        int | None, option("--keep-tokens", metavar="N", min=0, help="Drop the oldest until at most N tokens are left.")
    ] = None,
    forget: Annotated[bool, option("--forget", help="Drop everything.")] = False,
    model: ModelOption = "smollm2-135m",
) -> None:
    """What a file of past outputs holds; with --keep-tokens or --forget, shorten or empty it.

    The model is needed for --texts only: its tokenizer must be the one that the file belongs to.
    """
    from adi.drafters.history import History

    if forget and keep_tokens is not None:
        raise UsageError(f"--keep-tokens {keep_tokens} and --forget say different things; give one of them.")
    console, known = out(), History.look(file)
    remembered = _texts(known, texts, model) if texts else []
    if forget:
        known.forget()
    elif keep_tokens is not None:
        known.prune(keep_tokens)
    info = known.info()
    names = ("sequences", "tokens", "limit_tokens", "bytes", "vocabulary")
    rows = [(name.replace("_tokens", " in tokens"), f"{getattr(info, name):,}") for name in names]
    say(console, info.path)
    console.print(table(None, ("", " "), [*rows, ("tokenizer", info.fingerprint)]))
    for text in remembered:
        console.rule()
        say(console, text)


def _texts(known: History, count: int, model: str) -> list[str]:
    """The newest texts, oldest of them first; without what a terminal would obey instead of showing it."""
    from adi.cli.shared.paint import printable
    from adi.model.hub import read_tokenizer
    from adi.model.tokenizer import Tokenizer, tokenizer_fingerprint
    from adi.progress import Reporter

    with Reporter(err(), f"Loading the tokenizer of {model}"):
        tokenizer = Tokenizer(read_tokenizer(model))
    if (own := tokenizer_fingerprint(tokenizer)) != known.info().fingerprint:
        raise FileError(
            f"the history in {known.info().path} is of another tokenizer than {model}'s (fingerprint "
            f"{known.info().fingerprint}, not {own}). Name its model with --model."
        )
    return [printable(tokenizer.decode(ids)) for ids in reversed(known.newest(count))]
