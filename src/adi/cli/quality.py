"""``adi quality``: what fewer bits cost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from adi.cli.shared.options import JsonFileOption, ModelArgument, chosen_among, option
from adi.cli.shared.output import command_line, err, out, percent, table
from adi.files import read_text, require_writable, write_json
from adi.progress import Reporter


def quality(
    model: ModelArgument = "smollm2-135m",
    precision: Annotated[str, option("--precision", help="Several with commas: fp32, int8, int4, int8-bf16.")] = "int8,int4",
    kv_precision: Annotated[
        str, option("--kv-precision", help="Of keys and values, several with commas: auto, int8.")
    ] = "auto",
    text: Annotated[Path | None, option("--text", help="Text to read; by default the built-in bench prompts.")] = None,
    tokens: Annotated[int, option("--tokens", min=2, help="Read at most so many.")] = 6144,
    json_out: JsonFileOption = None,
) -> None:
    """What fewer bits cost a model: perplexity and predictions on held-out text, against float32."""
    from adi.measure.quality import quality as measure
    from adi.model.load import BACKENDS

    precisions = chosen_among(BACKENDS["openvino"], "--precision", precision)
    kept = chosen_among(("auto", "int8"), "--kv-precision", kv_precision)
    require_writable(json_out)
    read = None if text is None else read_text(text, "text")
    with Reporter(err(), f"quality of {model}") as progress:
        notice = partial(progress, 0, 0)
        settings: Any = {"text": read, "tokens": tokens, "command": command_line(), "notice": notice}
        found = measure(model, precisions, kv_precisions=kept, **settings)
    if json_out is not None:
        write_json(json_out, found)
    rows = []
    for row in found["precisions"]:
        name = row["precision"] + ", KV int8" * (row["kv_precision"] == "int8")
        measured = (f"{row['perplexity']:.2f}", f"{row['ratio']:.4f} ± {row['ratio_error']:.4f}", f"{row['divergence']:.4f}")
        rows.append((name, *measured, percent(row["same_token"], 1)))
    title = f"{found['tokens']:,} tokens against transformers in float32"
    out().print(table(title, ("", "perplexity", "ratio", "KL, nats", "same token"), rows))
