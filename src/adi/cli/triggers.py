"""``adi triggers``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adi.cli.inspect import JsonOption, LimitOption, PromptsOption, chosen_prompts, made_of, progress
from adi.cli.options import BackendOption, DeviceOption, ExitsOption, ModelArgument, PrecisionOption, Source, exits_for
from adi.errors import AdiError
from adi.progress import Reporter

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.measure.trigger_study.study import TriggerStudy
    from adi.model.load import Model


def triggers(
    model: ModelArgument = "smollm2-135m",
    exits: ExitsOption = None,
    prompts: PromptsOption = "bench",
    limit: LimitOption = 24,
    calibrate: Annotated[
        str,
        typer.Option("--calibrate", help="Prompts on which calibrations and thresholds are chosen; '' for half of --prompts."),
    ] = "train",
    calibrate_limit: Annotated[int, typer.Option("--calibrate-limit", help="Use so many of them.")] = 40,
    fit_probe: Annotated[
        str | None,
        typer.Option("--fit-probe", metavar="PROMPTS", help="Instead of the study: fit a learned probe on answers to these."),
    ] = None,
    fit_limit: Annotated[int, typer.Option("--fit-limit", help="Use so many of them.")] = 160,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", metavar="DIR", help="Where the exits go, with their probe or else with the fastest rule as their trigger."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of the answers.")] = 96,
    json_out: JsonOption = False,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """How well each signal, at each exit, predicts that the exit's token is the full model's; what asking costs; what pays.

    Prompts of the benchmark only test. With --fit-probe, a probe is fitted and saved with the exits instead.
    """
    errors, out = Console(stderr=True), Console(highlight=False)
    if fit_probe is not None and save is None:
        raise AdiError("--fit-probe needs --save DIR: the probe is kept with a copy of the exits.")
    source = Source(model, backend, precision, device)
    if fit_probe is not None and save is not None:
        loaded = source.load(errors)
        _fit(loaded, exits_for(loaded, exits), fit_probe, fit_limit, save, max_new_tokens, json_out, (errors, out))
        return
    items, others = chosen_prompts(prompts, limit), chosen_prompts(calibrate, calibrate_limit) if calibrate else []
    if shared := {item.prompt for item in items} & {item.prompt for item in others}:
        raise AdiError(
            f"{len(shared)} prompts would calibrate and test; give --calibrate other ones, or '' to split --prompts."
        )
    from adi.measure.trigger_study.study import study_triggers

    loaded = source.load(errors)
    found = exits_for(loaded, exits)
    test, calibrating = ([item.prompt for item in some] for some in (items, others))
    with Reporter(errors) as report:
        study = study_triggers(loaded, found, test, calibrate=calibrating, max_new_tokens=max_new_tokens, progress=report)
    if save is not None:
        _save(found, study, save)
    if json_out:
        print(json.dumps({**made_of(items), **_engine(model, loaded), "probe": found.report.get("probe"), **study.to_json()}))
        return
    _show(study, out)
    if save is not None:
        out.print(f"Saved to {save} with the fastest rule as their trigger.", markup=False, soft_wrap=True)


def _engine(name: str, model: Model) -> dict[str, Any]:
    spec = model.backbone.spec
    return {"model": name, "backend": spec.backend, "precision": spec.precision, "layers": spec.layers}


def _fit(
    model: Model,
    exits: Exits,
    prompts: str,
    limit: int,
    folder: Path,
    max_new_tokens: int,
    json_out: bool,
    consoles: tuple[Console, Console],
) -> None:
    """A probe from the model's answers, saved with the exits."""
    from adi.decoding.teacher_forcing import own_answers
    from adi.training.answers import Answer
    from adi.training.train_probe import fit_probe

    items = chosen_prompts(prompts, limit)
    texts = own_answers(model, [item.prompt for item in items], max_new_tokens)
    given = [
        Answer(item.prompt, text.prompt_ids + text.token_ids, len(text.prompt_ids), True, False)
        for item, text in zip(items, texts, strict=True)
    ]
    with progress(consoles[0], "texts") as report_progress:
        probe, report = fit_probe(model.backbone, exits, given, progress=report_progress)
    report |= {name: made_of(items)[name] for name in ("command", "prompts_hash")}
    replace(exits, probe=probe, report={**exits.report, "probe": report}).save(folder)
    if json_out:
        print(json.dumps(report))
        return
    table = Table(
        title=f"Probe: {report['texts']} texts, {report['tokens']} tokens; loss in nats where chosen", title_justify="left"
    )
    for name in ("depth", "reads", "hidden units", "passes", "loss", "a constant's"):
        table.add_column(name, justify="right")
    for net in report["networks"]:
        numbers = (str(net["hidden"]), str(net["epochs"]), f"{net['loss']:.3f}", f"{net['constant_loss']:.3f}")
        table.add_row(str(net["depth"]), "state" if net["kind"] == "state" else "state and head", *numbers)
    consoles[1].print(table)
    consoles[1].print(f"Saved to {folder}. Compare: adi triggers {model.source} --exits {folder}", markup=False)


def _save(exits: Exits, study: TriggerStudy, folder: Path) -> None:
    """The exits under the rule that was estimated fastest; how many drafts it was chosen with is in their report."""
    from adi.exits.triggers import trigger_from_json

    best = next(one for one in study.estimates if one.trigger is not None)
    chosen = {"rule": best.rule, "draft_tokens": best.draft_tokens, "ratio": best.ratio}
    replace(exits, trigger=trigger_from_json(best.trigger), report={**exits.report, "trigger": chosen}).save(folder)


def _show(study: TriggerStudy, out: Console) -> None:
    title = (
        f"Signals against full depth's token: {study.calibrating_tokens} tokens calibrate, {study.testing_tokens} others test"
    )
    table = Table(title=title, title_justify="left")
    for name in ("depth", "exit right", "signal", "AUROC", "calibration error", "as it is", "µs", "of a block"):
        table.add_column(name, justify="left" if name == "signal" else "right")
    last = None
    for score in study.scores:
        if last is not None and score.depth != last:
            table.add_section()
        first = score.depth != last
        table.add_row(
            str(score.depth) if first else "",
            f"{score.agreement:.1%}" if first else "",
            score.signal,
            _number(score.auroc),
            _number(score.calibration_error),
            _number(score.raw_calibration_error, ""),
            f"{score.microseconds:.0f}",
            f"{score.share_of_block:.0%}",
        )
        last = score.depth
    out.print(table)
    out.print("weighted: logistic combination of all signals that are not learned, fitted where calibrated.")
    rows = [(str(c.depth), f"{c.temperature:.2f}", *map(_number, (c.before, c.scaled, c.isotonic))) for c in study.calibrations]
    out.print(_table("Top probability: calibration error", ("depth", "temperature", "as it is", "scaled", "isotonic"), rows))
    oracle = study.oracle
    rows = [(str(d), f"{share:.1%}", f"{oracle.first_right[d]:.1%}") for d, share in oracle.settled.items()]
    rows.append(("mean", f"{oracle.mean_depth:.1f}", f"{oracle.mean_first_depth:.1f}"))
    out.print(_table("An oracle would stop at", ("depth", "right from there on", "right there"), rows))
    rows = [
        (
            one.rule,
            ", ".join(map(str, one.stops)),
            "" if one.chance is None else f"{one.chance:.1f}",
            str(one.draft_tokens),
            f"{one.tokens_per_second:.1f}",
            f"{one.ratio:.2f} x",
            _number(one.accepted_share),
        )
        for one in study.estimates
    ]
    names = ("rule", "exits", "chance", "drafts", "tokens/s", "of full depth", "kept")
    full = f"full depth {study.full_tokens_per_second:.1f} tokens/s"
    out.print(_table(f"Drafting at exits, worked out from readings and measured passes; {full}", names, rows))
    best = next((one for one in study.estimates if one.trigger is not None), None)
    if best is not None and best.ratio < 1:
        out.print("No rule pays here: every one of them is slower than full depth.")


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name == "rule" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None, none: str = "-") -> str:
    return none if value is None else f"{value:.3f}"
