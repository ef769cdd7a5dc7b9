"""The model that learned too (``training.train_model``), beside the original whose blocks stayed as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adi.artifact import Exits, load_exits
from adi.decoding.policies import FullDepth, Policy, Reflex, Verified
from adi.files import read_json
from adi.measure.calibration.calibrate import calibrate
from adi.measure.habits.compared import Compared, summary_of
from adi.model.load import Model
from adi.prompts import PromptItem
from adi.training.habituate import Habituation
from adi.training.shards import texts_in
from adi.training.texts import TEXT_WINDOW
from adi.training.train_model import CURVE, ModelOptions, general_text, train_model

FOLDER = "model"
RISK = 0.02
Reload = Callable[[Path], Sequence[Model]]


def learned(
    run: Habituation,
    frozen: Exits,
    options: ModelOptions,
    reload: Reload,
    others: Sequence[PromptItem],
) -> dict[str, Any]:
    """Train the model's own blocks on the answers of a run, and measure it beside the original with the exits of that run.

    ``curve``: agreement on held-out answers and perplexity of ``others`` as training went on. For every engine, ``original``
    and ``learned``: mean depth of a reflex certified at 2%, speeds on held-out prompts. ``reload`` loads the checkpoint on
    engines as the run's.
    """
    out, model = run.out / FOLDER, run.model
    text = "\n\n".join(item.prompt for item in others)
    ids = model.encode(text, raw=True) if text else ()
    train_model(
        model,
        texts_in([path for _, part in run.parts() for path in part]),
        general_text(run.engines[0], out / "general", progress=run.progress),
        out,
        options,
        held=texts_in(run.testing),
        windows=[ids[at : at + TEXT_WINDOW] for at in range(0, len(ids), TEXT_WINDOW)],
        keep=frozen,
        categories=run.categories,
        made_by=frozen.made_by,
        progress=run.progress,
    )
    exits, rows = load_exits(out), list[dict[str, Any]]()
    for original, engine in zip(run.engines, reload(out), strict=True):
        row: dict[str, Any] = {"backend": engine.backbone.spec.backend, "precision": engine.backbone.spec.precision}
        row["original"] = _figures(run, "original", original, frozen)
        row["learned"] = _figures(run, "learned", engine, exits)
        rows.append(row)
    return {"options": asdict(options), "curve": read_json(out / CURVE, "curve"), "engines": rows}


def _figures(run: Habituation, name: str, engine: Model, exits: Exits) -> dict[str, Any]:
    """Certified reflex and speeds of one model with its exits."""
    spec, tokens = engine.backbone.spec, run.options.max_new_tokens
    which = f"{name}-{spec.backend}-{spec.precision}-{spec.fingerprint[:8]}-{exits.digest()[:8]}"
    place, folder = run.work / f"measured-{which}.json", run.work / which
    prompts = [*run.workload.choosing, *run.workload.testing]
    if not (folder / "exits.json").exists():
        # Learn then Test would need 150 prompts that nothing learned from, without a loss on any
        ways: Any = {"method": "crc", "max_new_tokens": tokens, "progress": run.progress}
        found = calibrate(engine, exits, prompts, [RISK], **ways)
        replace(exits, certificates=found.certificates).save(folder)
    exits = load_exits(folder)
    policies: dict[str, Policy] = {"full": FullDepth(), "verified": Verified(exits)}
    policies["reflex"] = Reflex(exits, risk=RISK)
    compared = Compared(engine, policies, tokens, place)
    known = run.workload.categories
    compared.run([("workload", known[ids], ids) for ids in run.workload.testing], run.plan().measuring, run.progress)
    certificate = exits.certificate("disagreement", RISK)
    depth = {"certified_depth": certificate.mean_depth / spec.layers, "observed": certificate.observed}
    return {**depth, **summary_of(compared.rows)}
