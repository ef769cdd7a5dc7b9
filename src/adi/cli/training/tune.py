"""``adi tune``: train exits and a drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from adi.cli.shared.options import (
    DeviceOption,
    EngineOptions,
    ModelArgument,
    RayOption,
    chosen_among,
    listed,
    option,
    whole_numbers,
)
from adi.cli.shared.output import command_line, err, percent, say, table
from adi.errors import UsageError
from adi.files import require_file, require_writable
from adi.progress import Reporter
from adi.prompts import read_prompts

if TYPE_CHECKING:
    from adi.training.tune import TuneOptions


_rare = partial(option, panel="Training", rare=True)


@dataclass(frozen=True)
class TrainingOptions:
    """How exits and drafter are trained; the fields are those of ``TuneOptions``, with depths as text."""

    tokens: Annotated[int, option("--tokens", help="Tokens of its own answers that the model trains on.")] = 100_000
    generate_tokens: Annotated[
        int, option("--talk", help="Tokens of self-generated conversations to learn from instead of answers.")
    ] = 0
    depths: Annotated[str | None, option("--depths", help="Where to put exits, such as 8,16,24.")] = None
    epochs: Annotated[int, option("--epochs", help="Passes over the data.")] = 3
    drafter_epochs: Annotated[int, option("--drafter-epochs", help="Passes for the drafter; 0 trains none.")] = 4
    max_new_tokens: Annotated[int, option("--max-new-tokens", "-n", help="Longest answer.")] = 160
    shortlist: Annotated[int, _rare("--shortlist", help="Tokens that a head can name.")] = 4096
    rank: Annotated[int, _rare("--rank", help="Rank of each head's adapter.")] = 128
    learning_rate: Annotated[float, _rare("--learning-rate", help="Peak learning rate.")] = 3e-3
    own_prompts: Annotated[
        float | None, _rare("--own-prompts", help="With --talk: share of conversations whose prompt is generated too, 0 to 1.")
    ] = None
    warm_start: Annotated[bool, _rare("--warm-start", help="Begin with the drafter of --keep.")] = False
    seed: Annotated[int, _rare("--seed", help="Of initial weights, order and generated text.")] = 0

    def options(self) -> TuneOptions:
        from adi.training.tune import TuneOptions

        if self.own_prompts is not None and not self.generate_tokens:
            raise UsageError(f"--own-prompts {self.own_prompts:g} is for conversations: give --talk TOKENS, or leave it out.")
        return TuneOptions(**vars(self) | {"depths": None if self.depths is None else whole_numbers("depths", self.depths)})


def tune(
    model: ModelArgument,
    out: Annotated[
        Path, option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for the exits; a stopped run resumes there.")
    ],
    prompts: Annotated[
        list[str] | None, option("--prompts", help="JSONL prompt file, or 'train' (built in, 480); may be repeated.")
    ] = None,
    text: Annotated[list[Path] | None, option("--text", help="Plain text to learn from; may be repeated.")] = None,
    keep: Annotated[str | None, option("--keep", help="Exits whose heads stay: only a drafter is trained.")] = None,
    device: DeviceOption = "auto",
    talk_precision: Annotated[
        str, _rare("--talk-precision", help="Precisions in which text is generated, with commas; each its share.")
    ] = "auto",
    judge_only: Annotated[
        bool, _rare("--judge-only", help="Train nothing: measure the drafter of --keep again, on --talk tokens of fresh text.")
    ] = False,
    ray: RayOption = None,
    *,
    training: TrainingOptions,
) -> None:
    """Train exits and a drafter: the model answers prompts, and they learn full depth's predictions on those answers.

    Without --prompts and --text the 480 'train' prompts are used. A run that was stopped resumes with the same command.
    """
    from adi.artifact import load_exits
    from adi.model.load import BACKENDS, check_engine
    from adi.training.texts import MOST_TEXT_BYTES
    from adi.training.tune import begin_of, remeasure
    from adi.training.tune import tune as train
    from adi.training.workers import use_cluster

    if judge_only and keep is None:
        raise UsageError("--judge-only measures the drafter of exits: give them with --keep.")
    if judge_only and text:
        raise UsageError(f"--text {text[0]} means nothing with --judge-only, which writes its own; leave it out.")
    sets = [read_prompts(name) for name in (prompts if prompts is not None else [] if text or judge_only else ["train"])]
    options, kept = training.options(), None if keep is None else load_exits(keep)
    begin_of(kept, options)
    for precision in chosen_among(("auto", *BACKENDS["auto"]), "--talk-precision", talk_precision):
        check_engine("auto", precision)
    for path in text or ():
        require_file(path, "text", MOST_TEXT_BYTES)
    require_writable(out / "exits.json")
    loaded = EngineOptions(backend="hf", device=device).load(model)
    generators = [EngineOptions(precision=precision).load(model) for precision in listed(talk_precision)]
    use_cluster(generators, model, ray)
    made_by = {"command": command_line(), "versions": {name: version(name) for name in ("adi-lm", "torch", "transformers")}}
    groups = [[item.prompt for item in items] for items in sets]
    (out / "work").mkdir(parents=True, exist_ok=True)
    with Reporter(err(), log=out / "work" / "log.txt") as report:
        more: dict[str, Any] = {"generators": generators, "made_by": made_by, "progress": report}
        more["categories"] = {i.prompt: i.category for s in sets for i in s}
        if judge_only and kept is not None:
            exits = remeasure(loaded, out, groups, options, keep=kept, **more)
        else:
            exits = train(loaded, out, groups, options, keep=kept, texts=text or (), **more)
    show_report(err(), exits.report)
    say(err(), f"Saved to {out}. Use them: adi run --model {model} --exits {out} 'your prompt'")


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """Held-out figures: exits by depth, the drafter by step, both by category of prompt where any is known."""
    console.print(_by_depth(report))
    if (drafter := report.get("drafter")) is not None:
        steps = ", ".join(percent(share, 1) for share in drafter["agreement_by_step"])
        say(
            console,
            f"Drafter: agreement by step, those before it having agreed: {steps}; {drafter['accepted_in_a_row']:.2f} accepted "
            f"of 5 in a row, {drafter['positions']} held-out tokens.",
        )
    for each in by_category(report):
        console.print(each)


def by_category(report: Mapping[str, Any]) -> list[Table]:
    """By category of prompt: the drafter's agreement at its steps, and the exits' at their depths."""
    drafts = {name: _drafted(found) for name, found in report.get("drafter", {}).get("by_category", {}).items()}
    depths = {str(row["depth"]): row.get("by_category", {}) for row in report["depths"]}
    names = sorted({name for found in depths.values() for name in found})
    agreed = {name: [percent(found.get(name)) for found in depths.values()] for name in names}
    steps = max((len(cells) - 2 for cells in drafts.values()), default=0)
    columns = ["", "tokens", *(str(step + 1) for step in range(steps)), "in a row"]
    tables: list[tuple[str, Sequence[str], dict[str, list[str]]]] = [
        ("Drafter, by kind of prompt and step", columns, drafts),
        ("Exits, by kind of prompt and depth", ["", *depths], agreed),
    ]
    return [
        table(title, names, [(name, *cells) for name, cells in rows.items()], wrap=False)
        for title, names, rows in tables
        if rows
    ]


def _drafted(found: Mapping[str, Any]) -> list[str]:
    shares = [percent(share) for share in found["agreement_by_step"]]
    return [str(found["positions"]), *shares, f"{found['accepted_in_a_row']:.2f}"]


def _by_depth(report: Mapping[str, Any]) -> Table:
    held, rows = report["held_out"], []
    for row in report["depths"]:
        rule = ("never used", "", "")
        if row["threshold"] is not None:
            rule = (f"{row['threshold']:.2f}", percent(row["fires"], 1), percent(row["precision"], 1))
        agreement = percent(row["agreement"], 1), percent(row["bare_agreement"], 1)
        rows.append((row["depth"], *agreement, f"{row['divergence']:.2f}", *rule))
    title = (
        f"Agreement with the full model's greedy token, {held['rows']} held-out tokens "
        f"({percent(held['shortlist_coverage'], 1)} of them in the shortlist)"
    )
    return table(title, ("depth", "exit", "bare head", "KL, nats", "entropy up to", "decides", "then right"), rows)
