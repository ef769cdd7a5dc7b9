"""``adi run``: stream a text, coloured by depth; compare it with full depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from adi.cli.shared.conversation import ChatOptions, MessagesOption, read_messages
from adi.cli.shared.options import (
    DEMO_PROMPT,
    DecodingOptions,
    EngineOptions,
    JsonOption,
    ModelOption,
    SamplingOptions,
    TextOptions,
    TokensOption,
    option,
    whole_numbers,
)
from adi.cli.shared.output import err, out, read_input, say, show_json
from adi.errors import UsageError
from adi.files import require_writable
from adi.machine import energy_meter
from adi.model.hub import shipped_looped
from adi.risk.free_energy import FULL_PRICE

if TYPE_CHECKING:
    from adi.decoding.policies import Policy
    from adi.decoding.records import Drift, Generation
    from adi.model.load import Model
    from adi.model.prompt import Prompt

TRACED_CANDIDATES = 5
WARM_UP_TOKENS = 4
PRICE_HELP = "Nats for a full pass: give each token's free energy (in the summary and --json); in traces 1 unless given."
VERIFYING = ("verified", "lookup")  # the modes that promise the text of full depth and run many rows at once


def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads standard input.")] = DEMO_PROMPT,
    model: ModelOption = "smollm2-135m",
    max_new_tokens: TokensOption = 128,
    compare: Annotated[bool, option("--compare", help="Run full depth too: identical or not, and the ratio.")] = False,
    messages: MessagesOption = None,
    ids: Annotated[str | None, option("--ids", help="Token ids as the prompt, such as 1,4,6.", rare=True)] = None,
    json_out: JsonOption = False,
    logprobs: Annotated[
        int | None,
        option("--logprobs", min=0, help="With --json: log-probabilities of so many tokens, and of the one drawn.", rare=True),
    ] = None,
    price: Annotated[float | None, option("--price", min=0, help=PRICE_HELP, rare=True)] = None,
    trace: Annotated[Path | None, option("--trace", metavar="FILE", help="Write a trace of every step, for adi plot.")] = None,
    *,
    decoding: DecodingOptions,
    sampling: SamplingOptions,
    text: TextOptions,
    chat: ChatOptions,
    engine: EngineOptions,
) -> None:
    """Answer a prompt: draft tokens cheaply, verify them at full depth, and show at which depth each was decided."""
    from adi.decoding.policies import FullDepth

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens or None, "sampling": sampling.sampling().settled()}
    options |= {**text.settings(), **chat.settings()}
    if logprobs is not None and not json_out and trace is None:
        raise UsageError(f"--logprobs {logprobs} is for --json: give both, or leave it out.")
    content = _content(prompt, messages, ids)
    if ids is None and model in shipped_looped():
        raise UsageError(f"{model} has no tokenizer, so it reads no text; give token ids with --ids, such as 1,4,6.")
    require_writable(trace)
    loaded, policy = decoding.load(engine, model)
    if decoding.mode in VERIFYING and loaded.backbone.spec.row_invariant is False:
        say(err(), TIES.format(mode=decoding.mode), "dim")
    if compare:
        _warm_up(loaded, content, policy, options)
    options["price"] = FULL_PRICE if price is None and trace is not None else price
    options["logprobs"] = logprobs if trace is None else max(logprobs or 0, TRACED_CANDIDATES)
    meter = energy_meter()
    generation = (generated if json_out else _shown)(loaded, content, policy, **options)
    joules = meter()
    full = generated(loaded, content, FullDepth(), **options) if compare else None
    if trace is not None:
        from adi.measure.trace import trace_of, write_trace

        asked = content if isinstance(content, str) else dumps(content, ensure_ascii=False)
        write_trace(trace_of(generation, policy, asked), trace)
    if json_out:
        show_json(document(generation, full, loaded.backbone.spec.row_invariant) | {"joules": joules})
    else:
        _closing(out(), generation, full, joules)


def _content(prompt: str, messages: Path | None, ids: str | None) -> Prompt:
    """The one prompt of three that was given."""
    given = [str(each) for each in (prompt if prompt != DEMO_PROMPT else None, messages, ids) if each is not None]
    if len(given) > 1:
        raise UsageError(f"give a prompt, --messages or --ids, not both {given[0]!r:.40} and {given[1]}.")
    if ids is not None:
        return whole_numbers("--ids", ids)
    return read_messages(messages) if messages is not None else read_input() if prompt == "-" else prompt


TIES = (
    "On this machine the arithmetic of a token was found to vary with the number of rows in its pass: {mode} mode gives the "
    "text of full depth except where two tokens are as good as tied."
)


def document(generation: Generation, full: Generation | None, row_invariant: bool | None = None) -> dict[str, Any]:
    """What ``--json`` prints: text, tokens and summary, and with ``full`` the comparison."""
    value = {"text": generation.text, "token_ids": list(generation.token_ids), **generation.summary().to_json()}
    value["sampling"] = generation.sampling
    value["row_invariant"] = row_invariant
    if any(step.looks for step in generation.steps):
        value["logprobs"] = [
            [{"token": one.token, "text": one.text, "logprob": step.logprobs[one.token]} for one in step.looks[-1].candidates]
            for step in generation.steps
        ]
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
        return f"{seen}; {running}; no evidence against the certificate"
    return f"{seen}; {running}: the certificate does not hold on this text, verified from token {drift.fell_back_at} on"


def speedup(generation: Generation, full: Generation) -> float:
    """Tokens per second of this generation over full depth's, from one pair of runs."""
    slow = full.summary().tokens_per_second
    return generation.summary().tokens_per_second / slow if slow else 0.0


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two sequences differ, the end of the shorter one included; None if they are the same."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


def _warm_up(model: Model, prompt: Prompt, policy: Policy, options: dict[str, Any]) -> None:
    """So that neither of two compared runs pays for what happens once."""
    from adi.decoding.policies import FullDepth, Verified

    model.backbone.prepare((), drafts=True, wait=True)  # what opens in the background otherwise, beside the first answer
    if isinstance(policy, Verified):
        policy = replace(policy, history=None)  # which would remember this
    for each in (policy, FullDepth()):
        generated(
            model,
            prompt,
            each,
            **{**options, "max_new_tokens": min(WARM_UP_TOKENS, options["max_new_tokens"] or WARM_UP_TOKENS)},
        )


def generated(model: Model, prompt: Prompt, policy: Policy, **options: Any) -> Generation:
    """The whole text; options as a ``Session`` takes them."""
    from adi.decoding.session import Session

    session = Session(model, prompt, policy, **options)
    return session.generation(list(session.steps()))


def _shown(model: Model, prompt: Prompt, policy: Policy, **options: Any) -> Generation:
    """Generate with the text painted as it comes."""
    from adi.cli.shared.paint import Painter, legend
    from adi.decoding.session import Session

    console = out()
    session = Session(model, prompt, policy, **options)
    depths = policy.depths
    if depths and console.is_terminal:
        console.print(legend(depths, model.backbone.spec.layers))
    return session.generation(list(Painter(console, depths).follow(session)))


def energy_line(joules: float | None, tokens: int) -> str:
    """What a text took, in words."""
    if joules is None:
        return "energy: this machine tells none (RAPL and NVML are missing, or closed to this user)"
    return f"energy: {joules:.1f} J, {joules / max(tokens, 1):.2f} a token, of the whole machine meanwhile"


def _closing(console: Console, generation: Generation, full: Generation | None, joules: float | None) -> None:
    summary, sampled = generation.summary(), generation.sampling
    say(console, f"\n{summary.mode}: {summary}")
    where = ", ".join(f"{depth}: {count}" for depth, count in summary.depth_histogram.items())
    say(console, f"tokens by depth (of {generation.layers}): {where}")
    if generation.full_price is not None:
        say(console, energy_line(joules, summary.tokens))
    if sampled is not None:
        say(console, f"sampled at temperature {sampled['temperature']:g}; --seed {sampled['seed']} samples it again")
    if not summary.calibrated:
        say(console, "reflex mode is uncalibrated: nothing bounds how often this text differs from full depth")
    if generation.certified is not None:
        say(console, generation.certified)
    if generation.drift is not None:
        say(console, drift_line(generation.drift))
    if full is None:
        return
    say(console, f"full: {full.summary()}")
    difference = first_difference(generation.token_ids, full.token_ids)
    say(console, "identical: yes" if difference is None else f"identical: no (first difference at token {difference})")
    traced = ", tracing on" if any(step.looks for step in generation.steps) else ""
    setting = f"one pair of runs, {generation.backend} engine, {generation.precision}{traced}"
    say(console, f"tokens/s against full depth: {speedup(generation, full):.2f} x ({setting})")
