"""``adi quality``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adi.cli.options import ModelArgument
from adi.errors import AdiError
from adi.files import read_text, require_writable, write_json


def quality(
    model: ModelArgument = "smollm2-135m",
    precision: Annotated[str, typer.Option("--precision", help="Several with commas: fp32, int8, int4.")] = "int8,int4",
    text: Annotated[Path | None, typer.Option("--text", help="Text to read; by default the built-in bench prompts.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Read at most so many.")] = 6144,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
) -> None:
    """What fewer bits cost a model: perplexity and predictions on held-out text, against float32."""
    from adi.measure.quality import quality as measure

    if not precision.replace(",", " ").split():
        raise AdiError("--precision is empty; choose among fp32, int8, int4.")
    if tokens < 2:
        raise AdiError(f"--tokens is {tokens}; it must be at least 2.")
    if json_out is not None:
        require_writable(json_out)
    errors = Console(stderr=True)
    found = measure(
        model,
        [part.strip() for part in precision.split(",") if part.strip()],
        text=None if text is None else read_text(text, "text"),
        tokens=tokens,
        command=shlex.join(["adi", *sys.argv[1:]]),
        notice=lambda said: errors.print(said, markup=False, highlight=False, soft_wrap=True),
    )
    if json_out is not None:
        write_json(json_out, found)
    title = f"{found['tokens']:,} tokens against transformers in float32"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "perplexity", "ratio", "KL, nats", "same token"):
        table.add_column(name, justify="right" if name else "left")
    for row in found["precisions"]:
        table.add_row(
            row["precision"],
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.4f} ± {row['ratio_error']:.4f}",
            f"{row['divergence']:.4f}",
            f"{row['same_token']:.1%}",
        )
    Console(highlight=False).print(table)
