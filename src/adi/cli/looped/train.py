"""``adi train``: train a looped model under a price on depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adi.cli.shared.options import option
from adi.cli.shared.output import err, say
from adi.errors import UsageError
from adi.progress import Reporter


def train(
    settings: Annotated[Path, typer.Argument(metavar="SETTINGS", help="A TOML file: task, model, objective, steps, price.")],
    out: Annotated[
        Path, option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for the model; a stopped run resumes there.")
    ],
) -> None:
    """Train a looped model on a task whose difficulty is known, under a price on depth (docs/loops.md).

    A run that was stopped resumes with the same command. See the result with: adi solve DIR. On several GPUs: accelerate
    launch --config_file examples/train/fsdp.yaml -m adi train ... (docs/loops.md).
    """
    import os
    import tomllib

    from adi.files import expanded, read_text
    from adi.schema import from_json

    try:
        given = tomllib.loads(read_text(expanded(settings), "settings"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{settings} is not TOML: {error}.") from None
    from adi.training.train_looped import TrainSettings, train_looped

    chosen = from_json(given, TrainSettings, f"the settings {settings}")
    (out / "work").mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")):  # of several processes the first one speaks
        train_looped(chosen, out)
        return
    with Reporter(err(), f"training on {chosen.task}", log=out / "work" / "log.txt") as progress:
        train_looped(chosen, out, progress)
    say(err(), f"Saved to {out}. See it work: adi solve {out}")
