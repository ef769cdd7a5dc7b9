"""``adi triggers``: which signal predicts best whether an exit is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from adi.cli.shared.options import (
    AnswerTokensOption,
    EngineOptions,
    ExitsOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    PromptsOption,
    chosen_prompts,
    exits_for,
    judged_exits,
    option,
)
from adi.cli.shared.output import command_line, err, out, percent, say, table
from adi.errors import UsageError
from adi.files import require_writable
from adi.progress import Reporter

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.measure.trigger_study.study import TriggerStudy
    from adi.model.load import Model
    from adi.prompts import PromptItem


FIT_LIMIT = 160


def triggers(
    model: ModelArgument = "smollm2-135m",
    exits: ExitsOption = None,
    prompts: PromptsOption = "bench",
    limit: LimitOption = 24,
    calibrate: Annotated[
        str, option("--calibrate", help="Prompts on which calibrations and thresholds are chosen; '' for half of --prompts.")
    ] = "train",
    calibrate_limit: Annotated[int, option("--calibrate-limit", min=1, help="Use so many of them.")] = 40,
    fit_probe: Annotated[
        str | None, option("--fit-probe", metavar="PROMPTS", help="Instead of the study: fit a probe on answers to these.")
    ] = None,
    fit_limit: Annotated[int, option("--fit-limit", min=1, help="Use so many of them.")] = FIT_LIMIT,
    save: Annotated[
        Path | None,
        option("--save", metavar="DIR", help="Save the exits here, with the probe or with the fastest rule as their trigger."),
    ] = None,
    max_new_tokens: AnswerTokensOption = 96,
    json_out: JsonOption = False,
    *,
    engine: EngineOptions,
) -> None:
    """How well each signal at each exit predicts the full model's token; what checking costs; which rule pays.

    Prompts of the benchmark only test. With --fit-probe, a probe is fitted and saved with the exits instead.
    """
    named = judged_exits(exits)
    require_writable(None if save is None else save / "exits.json")
    _check_fit(fit_probe, fit_limit, save)
    if fit_probe is not None and save is not None:
        items, loaded = chosen_prompts(fit_probe, fit_limit), engine.load(model)
        report = _fit(loaded, exits_for(loaded, named), items, save, max_new_tokens)
        print(json.dumps(report)) if json_out else _show_probe(report, f"adi triggers {model} --exits {save}", out())
        return
    items, others = chosen_prompts(prompts, limit), chosen_prompts(calibrate, calibrate_limit) if calibrate else []
    if shared := {item.prompt for item in items} & {item.prompt for item in others}:
        raise UsageError(
            f"{len(shared)} prompts would calibrate and test; give --calibrate other ones, or '' to split --prompts."
        )
    from adi.measure.provenance import provenance
    from adi.measure.trigger_study.study import study_triggers

    loaded = engine.load(model)
    found = exits_for(loaded, named)
    test, calibrating = ([item.prompt for item in some] for some in (items, others))
    with Reporter(err(), "answers") as report_progress:
        ways: dict[str, Any] = {"calibrate": calibrating, "max_new_tokens": max_new_tokens, "progress": report_progress}
        study = study_triggers(loaded, found, test, **ways)
    if save is not None:
        _save(found, study, save)
    spec = loaded.backbone.spec
    if json_out:
        about = {"model": model, "backend": spec.backend, "precision": spec.precision, "layers": spec.layers}
        made = {**provenance(command_line(), items), "probe": found.report.get("probe")}
        print(json.dumps({**about, **made, **study.to_json()}))
        return
    _show(study, out())
    if save is not None:
        say(out(), f"Saved to {save} with the fastest rule as their trigger.")


def _check_fit(fit_probe: str | None, fit_limit: int, save: Path | None) -> None:
    if fit_probe is None and fit_limit != FIT_LIMIT:
        raise UsageError(f"--fit-limit {fit_limit} is for --fit-probe; give both, or leave it out.")
    if fit_probe is not None and save is None:
        raise UsageError(f"--fit-probe {fit_probe} needs --save DIR: the probe is kept with a copy of the exits.")


def _fit(model: Model, exits: Exits, items: list[PromptItem], folder: Path, max_new_tokens: int) -> dict[str, Any]:
    """Fit a probe on the model's answers and save it with the exits; its report."""
    from adi.decoding.teacher_forcing import KnownText, own_answers
    from adi.measure.provenance import provenance
    from adi.training.train_probe import fit_probe

    with Reporter(err(), "answers") as bar:
        answers = own_answers(model, [item.prompt for item in items], max_new_tokens)
        texts = [KnownText.of_answer(answer.prompt_ids, answer.token_ids) for answer in answers]
        probe, report = fit_probe(model.backbone, exits, texts, progress=bar)
    about = provenance(command_line(), items)
    report |= {name: about[name] for name in ("command", "prompts_hash")}
    replace(exits, probe=probe, report={**exits.report, "probe": report}).save(folder)
    return report


def _show_probe(report: dict[str, Any], compare: str, console: Console) -> None:
    rows = []
    for net in report["networks"]:
        reads = "state" if net["kind"] == "state" else "state and head"
        rows.append((net["depth"], reads, net["hidden"], net["epochs"], *map(_number, (net["loss"], net["constant_loss"]))))
    title = f"Probe: {report['texts']} texts, {report['tokens']} tokens; loss in nats where chosen"
    console.print(table(title, ("depth", "reads", "hidden units", "passes", "loss", "a constant's"), rows))
    say(console, f"Saved. Compare: {compare}")


def _save(exits: Exits, study: TriggerStudy, folder: Path) -> None:
    """Save the exits under the rule that was estimated fastest; the draft length it was chosen with is in their report."""
    from adi.exits.triggers import trigger_from_json

    best = next(one for one in study.estimates if one.trigger is not None)
    chosen = {"rule": best.rule, "draft_tokens": best.draft_tokens, "ratio": best.ratio}
    replace(exits, trigger=trigger_from_json(best.trigger), report={**exits.report, "trigger": chosen}).save(folder)


def _show(study: TriggerStudy, console: Console) -> None:
    title = (
        f"Signals against full depth's token: {study.calibrating_tokens} tokens calibrate, {study.testing_tokens} others test"
    )
    names = ("depth", "exit right", "signal", "AUROC", "calibration error", "as it is", "µs", "of a block")
    rows, last = list[Sequence[object]](), None
    for score in study.scores:
        head = (score.depth, percent(score.agreement, 1)) if score.depth != last else ("", "")
        off = _number(score.auroc), _number(score.calibration_error), _number(score.raw_calibration_error, "")
        rows.append((*head, score.signal, *off, f"{score.microseconds:.0f}", percent(score.share_of_block)))
        last = score.depth
    console.print(table(title, names, rows, left=("signal",)))
    say(console, "weighted: logistic combination of all signals that are not learned, fitted where calibrated.")
    errors = [(c.depth, f"{c.temperature:.2f}", *map(_number, (c.before, c.scaled, c.isotonic))) for c in study.calibrations]
    columns = ("depth", "temperature", "as it is", "scaled", "isotonic")
    console.print(table("Top probability: calibration error", columns, errors))
    oracle = study.oracle
    depths: list[Sequence[object]] = [
        (d, percent(share, 1), percent(oracle.first_right[d], 1)) for d, share in oracle.settled.items()
    ]
    mean = ("mean", f"{oracle.mean_depth:.1f}", f"{oracle.mean_first_depth:.1f}")
    console.print(table("An oracle would stop at", ("depth", "right from there on", "right there"), [*depths, mean]))
    _show_estimates(study, console)


def _show_estimates(study: TriggerStudy, console: Console) -> None:
    rows = [
        (
            *(one.rule, ", ".join(map(str, one.stops)), "" if one.chance is None else f"{one.chance:.1f}", one.draft_tokens),
            *(f"{one.tokens_per_second:.1f}", f"{one.ratio:.2f} x", _number(one.accepted_share)),
        )
        for one in study.estimates
    ]
    title = f"Drafting at exits, estimated from measured passes; full depth {study.full_tokens_per_second:.1f} tokens/s"
    names = ("rule", "exits", "chance", "drafts", "tokens/s", "of full depth", "accepted")
    console.print(table(title, names, rows, left=("rule",)))
    best = next((one for one in study.estimates if one.trigger is not None), None)
    if best is not None and best.ratio < 1:
        say(console, "No rule pays here: every one of them is slower than full depth.")


def _number(value: float | None, none: str = "-") -> str:
    return none if value is None else f"{value:.3f}"
