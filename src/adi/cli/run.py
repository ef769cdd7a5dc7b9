"""``adi run``: stream a text, coloured by depth; compare it with full depth."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from adi.cli.options import (
    DEMO_PROMPT,
    BackendOption,
    DeviceOption,
    DraftOption,
    ExitsOption,
    HabitsOption,
    IgnoreEosOption,
    MinPOption,
    ModelOption,
    ModeOption,
    PenaltyOption,
    PrecisionOption,
    RawOption,
    ReflexOptions,
    RiskKindOption,
    RiskOption,
    SeedOption,
    SkippedOption,
    Source,
    SpecialOption,
    SpotOption,
    StopOption,
    TemperatureOption,
    ThresholdOption,
    TokensOption,
    TopKOption,
    TopPOption,
    TriggerOption,
    likely_stops,
    policy_for,
)
from adi.decoding.sampling import Sampling
from adi.files import require_writable

if TYPE_CHECKING:
    from adi.decoding.policies import Policy
    from adi.decoding.records import Drift, Generation
    from adi.model.load import Model

TRACED_CANDIDATES = 5
WARM_UP_TOKENS = 4
VERIFYING = ("verified", "lookup")  # the modes that promise the text of full depth and run many rows at once


def run(
    prompt: Annotated[str, typer.Argument(help="What to ask; '-' reads standard input.")] = DEMO_PROMPT,
    model: ModelOption = "smollm2-135m",
    exits: ExitsOption = None,
    mode: ModeOption = "verified",
    max_new_tokens: TokensOption = 128,
    threshold: ThresholdOption = None,
    trigger: TriggerOption = None,
    draft_tokens: DraftOption = None,
    habits: HabitsOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    risk: RiskOption = None,
    kind: RiskKindOption = "disagreement",
    spot_check: SpotOption = 0.0,
    skipped: SkippedOption = "exact",
    stop: StopOption = None,
    raw: RawOption = False,
    special_tokens: SpecialOption = False,
    ignore_eos: IgnoreEosOption = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run full depth too: identical or not, and the ratio.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the steps, with all that was looked at.")] = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Answer a prompt, each token at the depth it needs, and show where the depth went."""
    errors, out = Console(stderr=True), Console(highlight=False)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed).settled()
    text = sys.stdin.read() if prompt == "-" else prompt
    if trace is not None:
        require_writable(trace)
    stops = likely_stops(model, mode, exits, (threshold, trigger, draft_tokens) == (None,) * 3)
    loaded = Source(model, backend, precision, device).load(errors, stops)
    reflex = ReflexOptions(risk, kind, spot_check, skipped)
    policy = policy_for(loaded, mode, exits, threshold, trigger, draft_tokens, habits, reflex)
    _say_where_ties_may_fall(errors, loaded, mode)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ()), "stop_at_eos": not ignore_eos}
    options |= {"raw": raw, "special_tokens": special_tokens, "sampling": sampling}
    if compare:
        _warm_up(loaded, text, policy, options)
    options["candidates"] = TRACED_CANDIDATES if trace is not None else 0
    generation = _shown(loaded, text, policy, options, out) if not json_out else _quiet(loaded, text, policy, options)
    full = _quiet(loaded, text, None, options) if compare else None
    if trace is not None:
        _write_trace(generation, policy, text, trace)
    if json_out:
        print(json.dumps(document(generation, full, loaded.backbone.spec.row_invariant), ensure_ascii=False))
        return
    _closing(out, generation, full)
    if trace is not None:
        out.print(f"trace written to {trace}; see it with: adi plot {trace}", markup=False, soft_wrap=True)


def _write_trace(generation: Generation, policy: Policy, text: str, file: Path) -> None:
    from adi.measure.trace import trace_of, write_trace

    write_trace(trace_of(generation, policy, text), file)


def document(generation: Generation, full: Generation | None, row_invariant: bool | None = None) -> dict[str, Any]:
    """What ``--json`` prints: text, tokens and summary, and with ``full`` the comparison."""
    value = {"text": generation.text, "token_ids": list(generation.token_ids), **generation.summary().to_json()}
    value["sampling"] = generation.sampling
    value["row_invariant"] = row_invariant
    if full is not None:
        value["full"] = {"text": full.text, "token_ids": list(full.token_ids), **full.summary().to_json()}
        value["identical"] = generation.token_ids == full.token_ids
        value["speedup"] = speedup(generation, full)
    if generation.certified is not None:
        value["certified"] = generation.certified
    if generation.drift is not None:
        value["drift"] = asdict(generation.drift)
    return value


def drift_line(drift: Drift) -> str:
    """What spot checks found, in words."""
    seen = f"spot checks: {drift.differed} of {drift.checked} tokens differed from full depth"
    running = f"running risk above {drift.lower:.2%} and below {drift.upper:.2%} (level {drift.level:.2%})"
    if drift.fell_back_at is None:
        return f"{seen}; {running}; the certificate stands"
    return f"{seen}; {running}: the certificate does not hold on this text, verified from token {drift.fell_back_at} on"


def speedup(generation: Generation, full: Generation) -> float:
    """Tokens per second of this generation over full depth's, from one pair of runs."""
    slow = full.summary().tokens_per_second
    return generation.summary().tokens_per_second / slow if slow else 0.0


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two sequences differ, the end of the shorter one included; None if they are the same."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _say_where_ties_may_fall(errors: Console, model: Model, mode: str) -> None:
    """In a mode that verifies drafts: the engine's arithmetic was found to vary with the number of rows in a pass."""
    if mode in VERIFYING and model.backbone.spec.row_invariant is False:
        errors.print(
            f"On this machine a token's arithmetic was found to vary with the number of rows beside it: {mode} mode gives "
            "the text of full depth except where two tokens are as good as tied.",
            style="dim",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _warm_up(model: Model, text: str, policy: Policy, options: dict[str, Any]) -> None:
    model.backbone.prepare((), drafts=True, wait=True)  # what opens in the background otherwise, beside the first answer
    for each in (policy, None):
        _quiet(model, text, each, {**options, "max_new_tokens": min(WARM_UP_TOKENS, options["max_new_tokens"])})


def _quiet(model: Model, text: str, policy: Policy | None, options: dict[str, Any]) -> Generation:
    from adi.decoding.records import Step
    from adi.decoding.session import Session

    session = Session(model, text, policy, **options)
    return session.generation([event for event in session if isinstance(event, Step)])


def _shown(model: Model, text: str, policy: Policy, options: dict[str, Any], out: Console) -> Generation:
    """Generate with the text painted as it comes."""
    from adi.cli.paint import Painter, legend
    from adi.decoding.policies import depths_of
    from adi.decoding.session import Session

    session = Session(model, text, policy, **options)
    depths = depths_of(policy)
    if depths and out.is_terminal:
        out.print(legend(depths, model.backbone.spec.layers))
    return session.generation(list(Painter(out, depths).follow(session)))


def _closing(out: Console, generation: Generation, full: Generation | None) -> None:
    summary = generation.summary()
    out.print()
    out.print(f"{summary.mode}: {summary}", soft_wrap=True)
    where = ", ".join(f"{depth}: {count}" for depth, count in summary.depth_histogram.items())
    out.print(f"tokens by depth (of {generation.layers}): {where}")
    if generation.sampling is not None:
        out.print(
            f"drawn at temperature {generation.sampling['temperature']:g}; --seed {generation.sampling['seed']} draws it again"
        )
    if not summary.calibrated:
        out.print("reflex mode is uncalibrated: nothing bounds how often this text differs from full depth", soft_wrap=True)
    if generation.certified is not None:
        out.print(generation.certified, soft_wrap=True)
    if generation.drift is not None:
        out.print(drift_line(generation.drift), soft_wrap=True)
    if full is None:
        return
    out.print(f"full: {full.summary()}", soft_wrap=True)
    difference = first_difference(generation.token_ids, full.token_ids)
    out.print("identical: yes" if difference is None else f"identical: no (first difference at token {difference})")
    traced = ", tracing on" if any(step.looks for step in generation.steps) else ""
    setting = f"one pair of runs, {generation.backend} engine, {generation.precision}{traced}"
    out.print(f"tokens/s against full depth: {speedup(generation, full):.2f} x ({setting})", soft_wrap=True)
