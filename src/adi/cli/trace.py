"""``adi trace``: record a generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adi.cli.run import PRICE_HELP, energy_line, generated
from adi.cli.shared.options import (
    DEMO_PROMPT,
    DecodingOptions,
    EngineOptions,
    ModelOption,
    SamplingOptions,
    TextOptions,
    TokensOption,
    option,
)
from adi.cli.shared.output import err, say
from adi.files import require_writable
from adi.machine import energy_meter
from adi.risk.free_energy import FULL_PRICE


def trace(
    prompt: Annotated[str, typer.Argument(help="The prompt.")] = DEMO_PROMPT,
    out: Annotated[Path, option("--out", "-o", help="The trace file to write.")] = Path("trace.json"),
    model: ModelOption = "smollm2-135m",
    max_new_tokens: TokensOption = 128,
    logprobs: Annotated[int, option("--logprobs", min=1, help="Candidate tokens to record at every depth.")] = 5,
    price: Annotated[float, option("--price", min=0, help=PRICE_HELP, rare=True)] = FULL_PRICE,
    *,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    text: TextOptions,
    engine: EngineOptions,
) -> None:
    """Generate, and write every exit that was checked, with its candidates and signals, to a trace file."""
    from adi.measure.trace import trace_of, write_trace

    options = {
        "max_new_tokens": max_new_tokens or None,
        "logprobs": logprobs,
        "price": price,
        "sampling": sampling.sampling(),
        **text.settings(),
    }
    require_writable(out)
    loaded, policy = decoding.load(engine, model)
    meter = energy_meter()
    generation = generated(loaded, prompt, policy, **options)
    energy = energy_line(meter(), len(generation.steps))
    write_trace(trace_of(generation, policy, prompt), out)
    say(err(), f"{generation.summary()}\n{energy}\ntrace written to {out}; see it with: adi plot {out}")
