"""``adi bench``: modes and other tools on the same prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from adi.cli.shared.options import (
    AnswerTokensOption,
    BackendOption,
    JsonFileOption,
    ModelArgument,
    PromptsOption,
    chosen_among,
    chosen_prompts,
    option,
)
from adi.cli.shared.output import command_line, err, out, percent, say, table
from adi.errors import UsageError
from adi.files import require_writable, write_json
from adi.progress import Reporter

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.measure.bench.outcomes import Setting


TrainedExitsOption = Annotated[
    str | None, option("--exits", "-e", metavar="DIR", help="Trained exits; by default those shipped under MODEL's name.")
]


def bench(
    model: ModelArgument = "smollm2-135m",
    prompts: PromptsOption = "bench",
    limit: Annotated[int | None, option("--limit", min=1, help="Use so many prompts, spread over the file.")] = None,
    modes: Annotated[str, option("--modes", help="Of adi: full, verified, reflex, lookup, static.")] = "full,verified",
    peers: Annotated[str, option("--peers", help="Other tools, such as llama.cpp,hf:fp32; or 'all'.")] = "",
    precision: Annotated[str, option("--precision", help="Of adi's modes; several with commas.")] = "auto",
    backend: BackendOption = "auto",
    exits: TrainedExitsOption = None,
    shape: Annotated[
        str | None,
        option("--shape", help="For MODEL, random weights: llama-0.3b, llama-1b, llama-3b, llama-long.", rare=True),
    ] = None,
    max_new_tokens: AnswerTokensOption = 128,
    prompt_tokens: Annotated[int | None, option("--prompt-tokens", min=1, help="Make every prompt exactly so long.")] = None,
    repeats: Annotated[int, option("--repeats", min=1, help="Runs of every prompt.")] = 1,
    batch: Annotated[str | None, option("--batch", help="Also so many texts at once; several with commas: 1,4,16.")] = None,
    threads: Annotated[int, option("--threads", min=1, help="Processor threads of every contestant.")] = 2,
    risk: Annotated[float | None, option("--risk", help="Reflex mode: a certified level.", rare=True)] = None,
    threshold: Annotated[float | None, option("--threshold", help="Reflex mode, uncertified.", rare=True)] = None,
    static: Annotated[
        str | None, option("--static", metavar="DEPTH,K", help="Static mode: K drafts from DEPTH; 0: drafter.", rare=True)
    ] = None,
    sweep: Annotated[bool, option("--sweep", help="Find static mode's depth and draft length first.", rare=True)] = False,
    restarts: Annotated[int, option("--restarts", min=1, help="Spread the prompts over so many processes.", rare=True)] = 1,
    seed: Annotated[int, option("--seed", help="Of the order of the runs.", rare=True)] = 0,
    json_out: JsonFileOption = None,
) -> None:
    """Compare modes and tools on the same prompts, in turn, in one run; ratios are medians over prompts.

    An interrupted run with --json FILE resumes.
    """
    from adi.artifact import load_exits, shipped
    from adi.measure.bench.outcomes import Setting
    from adi.measure.bench.peers import PEERS
    from adi.measure.bench.resume import ResumeFile
    from adi.measure.bench.run import Extent
    from adi.measure.bench.run import bench as measure
    from adi.measure.bench.systems import MODES
    from adi.model.load import BACKENDS

    items = chosen_prompts(prompts, limit)
    model = model if shape is None else _shaped(shape)
    chosen, pair = chosen_among(MODES, "--modes", modes), None if static is None else _pair(static)
    precisions = chosen_among(("auto", *BACKENDS["auto"]), "--precision", precision)
    _check_modes(chosen, pair, sweep)
    _check_reflex(chosen, risk, threshold)
    names = [f"adi:{mode}:{p}" for p in precisions for mode in chosen]
    names += [] if not peers else PEERS if peers == "all" else chosen_among(tuple(PEERS), "--peers", peers)
    trained = exits if exits is not None else (model if model in shipped() else None)
    setting = Setting(model, trained, threshold, threads, seed, backend, pair, risk=risk)
    _check_engines(setting, precisions, None if trained is None else load_exits(trained))
    extent = Extent(max_new_tokens, repeats, prompt_tokens, sweep, restarts, _sizes(batch))
    require_writable(json_out)
    with Reporter(err(), "preparing") as report:
        found = measure(names, items, setting, extent, command=command_line(), result=json_out, progress=report)
    if json_out is not None:
        write_json(json_out, found)
        ResumeFile(json_out, {}).discard()
    _print(out(), found)


def _sizes(text: str | None) -> tuple[int, ...]:
    """Of batches, in their order."""
    found = [part.strip() for part in (text or "").split(",") if part.strip()]
    if bad := [part for part in found if not part.isdecimal()]:
        raise UsageError(f"--batch is numbers of texts with commas, such as 1,4,16, not {bad[0]!r}.")
    return tuple(dict.fromkeys(map(int, found)))


def _shaped(name: str) -> str:
    """The folder of a model of that shape."""
    from adi.measure.bench.shapes import SHAPES, shaped

    (found,) = chosen_among(tuple(SHAPES), "--shape", name)
    return str(shaped(found))


def _check_modes(chosen: Sequence[str], pair: tuple[int, int] | None, sweep: bool) -> None:
    given = ([f"--static {pair[0]},{pair[1]}"] if pair is not None else []) + (["--sweep"] if sweep else [])
    if "static" in chosen and len(given) != 1:
        raise UsageError(
            f"static mode needs --static DEPTH,K or --sweep, one of them, and got {' and '.join(given) or 'none'}."
        )
    if "static" not in chosen and given:
        raise UsageError(f"{given[0]} is of static mode; put static into --modes, or leave it out.")


def _check_engines(setting: Setting, precisions: Sequence[str], exits: Exits | None) -> None:
    """UsageError for what the first process would find out only after an export."""
    from adi.measure.bench.systems import backend_for
    from adi.model.load import check_engine

    for precision in precisions:
        check_engine(backend_for(setting.backend, precision), precision)
    if setting.risk is not None and exits is not None:
        exits.certificate("disagreement", setting.risk)


def _check_reflex(chosen: Sequence[str], risk: float | None, threshold: float | None) -> None:
    given = [f"--{n} {v:g}" for n, v in (("risk", risk), ("threshold", threshold)) if v is not None]
    if "reflex" in chosen and len(given) != 1:
        raise UsageError(
            "reflex mode needs --risk R (certified by adi calibrate, such as 0.02) or --threshold T, one of them, and got "
            f"{' and '.join(given) or 'none'}."
        )
    if "reflex" not in chosen and given:
        raise UsageError(f"{given[0]} is of reflex mode; put reflex into --modes, or leave it out.")


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None or int(found[2]) < 1:
        raise UsageError(f"--static is DEPTH,K, such as 24,4 (depth 0: the drafter; at least one draft), not {text!r}.")
    return int(found[1]), int(found[2])


def _print(console: Console, found: dict[str, Any]) -> None:
    columns = (
        "",
        "tokens\n/s",
        "first\nms",
        "a\nround",
        "drafts\naccepted",
        "same\ntext",
        "same\nstart",
        "peak\nMiB",
        "held\nMiB",
    )
    rows = [_row(run) for run in found["runs"] if run["error"] is None]
    console.print(table(f"{found['prompts']} prompts, {found['max_new_tokens']} tokens at most", columns, rows, wrap=False))
    for run in found["runs"]:
        if run["error"] is not None:
            say(console, f"{run['name']} did not run: {run['error']}")
        elif "static" in run:
            depth, draft_tokens = run["static"]
            say(console, f"{run['name']} drafts {draft_tokens} tokens from depth {depth}")
    for ratio in found["ratios"]:
        if ratio["b"].startswith("adi:") and not ratio["b"].startswith("adi:full:"):
            continue  # in the file; here what is compared with full depth and with other tools
        times = f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f}), first token {ratio['ttft_median']:.2f} x"
        say(console, f"{ratio['a']} / {ratio['b']}: {times}")
    _print_batches(console, found["batches"])


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    a_round = run["tokens_per_round"]
    return (
        *(run["name"], f"{run['tokens_per_second']:.1f}", f"{1e3 * run['ttft_seconds']:.0f}"),
        "" if a_round is None else f"{a_round:.2f}",
        *map(percent, (run["accepted_share"], run["match"], run["match_tokens"])),
        *(f"{run[kind] / 2**20:.0f}" for kind in ("peak_bytes", "resident_bytes")),
    )


def _print_batches(console: Console, batches: Sequence[dict[str, Any]]) -> None:
    ran = [entry for entry in batches if entry["error"] is None]
    names = list(dict.fromkeys(entry["name"] for entry in ran))
    rows = [
        (
            *(entry["batch"], entry["name"], entry["groups"], f"{entry['tokens_per_second']:.1f}"),
            *(_times(entry["against"].get(name)) for name in names),
            "yes" if entry["same"] else "no",
        )
        for entry in ran
    ]
    if rows:
        heads = ("at\nonce", "", "groups", "tokens\n/s", *(f"x {name}" for name in names), "as\nalone")
        console.print(table(None, heads, rows, wrap=False))
    for entry in batches:
        if entry["error"] is not None:
            say(console, f"{entry['name']} in batches: {entry['error']}")


def _times(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
