"""``adi trace`` and ``adi plot``: record a generation, look at it (or at a benchmark) in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adi.cli.options import (
    DEMO_PROMPT,
    BackendOption,
    DeviceOption,
    DraftOption,
    ExitsOption,
    IgnoreEosOption,
    ModelOption,
    ModeOption,
    PrecisionOption,
    RawOption,
    ReflexOptions,
    RiskKindOption,
    RiskOption,
    Source,
    SpecialOption,
    ThresholdOption,
    TokensOption,
    TriggerOption,
    policy_for,
)
from adi.errors import AdiError
from adi.files import require_writable


def trace(
    prompt: Annotated[str, typer.Argument(help="What to ask.")] = DEMO_PROMPT,
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace file to write.")] = Path("trace.json"),
    model: ModelOption = "smollm2-135m",
    exits: ExitsOption = None,
    mode: ModeOption = "verified",
    max_new_tokens: TokensOption = 128,
    candidates: Annotated[int, typer.Option("--candidates", help="Candidate tokens to record at every depth.")] = 5,
    threshold: ThresholdOption = None,
    trigger: TriggerOption = None,
    draft_tokens: DraftOption = None,
    risk: RiskOption = None,
    kind: RiskKindOption = "disagreement",
    raw: RawOption = False,
    special_tokens: SpecialOption = False,
    ignore_eos: IgnoreEosOption = False,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Generate, and write every depth that was looked at, with its candidates and signals, to a trace file."""
    from adi.decoding.generate import generate
    from adi.measure.trace import trace_of, write_trace

    if candidates < 1:
        raise AdiError(f"--candidates is {candidates}; it must be at least 1.")
    require_writable(out)
    console = Console(stderr=True, highlight=False)
    loaded = Source(model, backend, precision, device).load(console)
    reflex = ReflexOptions(risk, kind)
    policy = policy_for(loaded, mode, exits, threshold, trigger, draft_tokens, reflex=reflex)
    generation = generate(
        loaded,
        prompt,
        policy,
        max_new_tokens=max_new_tokens,
        raw=raw,
        special_tokens=special_tokens,
        stop_at_eos=not ignore_eos,
        candidates=candidates,
    )
    write_trace(trace_of(generation, policy, prompt), out)
    console.print(f"{generation.summary()}\ntrace written to {out}; see it with: adi plot {out}", markup=False, soft_wrap=True)


def plot(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace (adi trace, adi run --trace) or an adi bench --json.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page to write; by default FILE with .html.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Of a benchmark: show ratios against this mode of adi's.")] = None,
) -> None:
    """Turn a trace or a benchmark into one self-contained HTML page.

    A trace shows the text as a depth heat map, and all that was looked at; a benchmark speeds, ratios and categories.
    """
    from adi.measure.bench.report import is_result, read_result, write_bench_page
    from adi.measure.trace import read_trace
    from adi.measure.trace_page import write_page

    target = out or file.with_suffix(".html")
    if target.resolve() == file.resolve():
        raise AdiError(f"--out {target} is the file itself; choose another name.")
    if is_result(file):
        write_bench_page(read_result(file), target, base)
    elif base is not None:
        raise AdiError("--base means something for a benchmark only; leave it out.")
    else:
        write_page(read_trace(file), target)
    Console(stderr=True, highlight=False).print(f"page written to {target}", markup=False, soft_wrap=True)
