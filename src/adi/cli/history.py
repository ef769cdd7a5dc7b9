"""``adi habits``: what a file of past outputs holds, and how to shorten or empty it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adi.cli.options import ModelOption
from adi.errors import AdiError

if TYPE_CHECKING:
    from adi.drafters.history import History


def history(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of habits.")],
    texts: Annotated[int, typer.Option("--texts", metavar="N", help="Print the last N remembered texts too.")] = 0,
    keep_tokens: Annotated[
        int | None, typer.Option("--keep-tokens", metavar="N", help="Drop the oldest until at most N tokens are left.")
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Drop everything.")] = False,
    model: ModelOption = "smollm2-135m",
) -> None:
    """What a file of past outputs holds; with --keep-tokens or --forget, shorten or empty it.

    The model is needed for --texts only: its tokenizer must be the one that the file belongs to.
    """
    from adi.drafters.history import History

    if forget and keep_tokens is not None:
        raise AdiError("give --keep-tokens or --forget, not both.")
    if texts < 0:
        raise AdiError(f"--texts is {texts}; it must be at least 0.")
    if keep_tokens is not None and keep_tokens < 0:
        raise AdiError(f"--keep-tokens is {keep_tokens}; it must be at least 0.")
    out = Console(highlight=False)
    known = History.look(file)
    remembered = _texts(known, texts, model) if texts else []
    if forget:
        known.forget()
    elif keep_tokens is not None:
        known.prune(keep_tokens)
    out.print(_table(known))
    for text in remembered:
        out.rule()
        out.print(text, markup=False, soft_wrap=True)


def _table(known: History) -> Table:
    info = known.info()
    table = Table(title=escape(str(info.path)), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("sequences", "tokens", "limit_tokens", "bytes", "vocabulary"):
        table.add_row(name.replace("_tokens", " in tokens"), f"{getattr(info, name):,}")
    table.add_row("tokenizer", escape(info.fingerprint))
    return table


def _texts(known: History, count: int, model: str) -> list[str]:
    """The newest texts, oldest of them first; what a terminal would obey instead of showing is left out."""
    from adi.model.hub import read_tokenizer
    from adi.model.tokenizer import Tokenizer, tokenizer_fingerprint

    with Console(stderr=True).status(f"Loading the tokenizer of {escape(model)}"):
        tokenizer = Tokenizer(read_tokenizer(model))
    if (own := tokenizer_fingerprint(tokenizer)) != known.info().fingerprint:
        raise AdiError(
            f"the habits in {known.info().path} are of another tokenizer than {model}'s (fingerprint "
            f"{known.info().fingerprint}, not {own}). Name their model with --model."
        )
    plain = [tokenizer.decode(ids) for ids in reversed(known.newest(count))]
    return ["".join(c for c in text if c.isprintable() or c in "\n\t") for text in plain]
