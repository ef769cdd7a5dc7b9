"""``habituate``: answers, drafter, datastore, heads, then before and after; parts that are finished are found again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

from adi.artifact import Exits, bare_exits
from adi.decoding.policies import FullDepth, Verified
from adi.errors import UsageError
from adi.files import read_json, write_json
from adi.measure.calibration.calibrate import LEAST_PROMPTS
from adi.measure.habits.compared import Compared, by_category, shallowest, summary_of, written_by
from adi.measure.habits.learned import Reload, learned
from adi.measure.habits.steady import curve_row, over_repetitions, steadily
from adi.measure.provenance import provenance
from adi.model.load import Model
from adi.progress import Progress, no_progress
from adi.prompts import PromptItem, prompts_hash, spread
from adi.training.habituate import REHEARSED, HabitOptions, Habituation, Ids, Stage, split
from adi.training.train_model import ModelOptions

FORMAT, VERSION = "adi-habits", 1
CURVE_PROMPTS, REPEATED_PROMPTS = 24, 8


def habituate(
    model: Model,
    engines: Sequence[Model],
    out: Path,
    items: Sequence[PromptItem],
    keep: Exits | None = None,
    options: HabitOptions | None = None,
    *,
    others: Sequence[PromptItem] = (),
    talk: Sequence[PromptItem] = (),
    command: str = "",
    measure_again: bool = False,
    train: ModelOptions | None = None,
    reload: Reload | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Make a workload cheap for a model that stays as it is, and measure what it gave; the result document.

    Args:
        model: the model on the transformers engine, whose drafter and heads are trained.
        engines: the same model as it will be used; each answers all prompts.
        out: gets the exits, and ``work/`` with all parts; a stopped run goes on there.
        items: prompts of the workload; a quarter of them is held out.
        keep: exits of this model to begin with.
        options: budget, length of answers, seed.
        others: prompts of other work, which must not become slower.
        talk: further prompts of other work, some of whose answers the drafter learns beside.
        command: noted in the result.
        measure_again: what was measured before is measured anew; nothing is trained that is there.
        train: then train the model's own blocks too, for so many minutes more; ``reload`` loads the checkpoint on such engines.
        progress: called with done, total and what is being done.

    Raises:
        AdiError: prompts or options that do not fit the model, a budget too short for one pass, a folder of another run.
    """
    options = options or HabitOptions()
    workload = split(model, items, options)
    if train is not None and (held := len(workload.choosing) + len(workload.testing)) < LEAST_PROMPTS:
        raise UsageError(f"{held} held-out prompts are too few to certify a reflex of the trained model; give more prompts.")
    rehearsed = _rehearsed(model, talk, (*items, *others), round(REHEARSED * len(workload.train)), options)
    run = Habituation(model, engines, out, workload, keep, options, progress, rehearsed)
    stages = run.stages()
    exits, heads = run.with_heads(stages[-1].exits)
    made_by = {**exits.made_by, "habits": {"command": command, "options": asdict(options)}}
    (exits := replace(exits, made_by=made_by)).save(out)
    measuring = _Measuring(run, [*stages[:-1], replace(stages[-1], exits=exits)], measure_again, progress)
    found = {
        "format": FORMAT,
        "version": VERSION,
        **provenance(command, items),
        "model": model.backbone.spec.name,
        **asdict(options),
        "plan": asdict(run.plan()),
        "split": {name: len(getattr(run.workload, name)) for name in ("train", "choosing", "testing")},
        "exits": heads,
        **measuring.all(others),
    }
    if train is not None and reload is not None:
        found["trained"] = learned(run, exits, train, reload, others)
    return found


class _Measuring:
    """What is measured of a run; every part is a file in its ``work`` folder."""

    def __init__(self, run: Habituation, stages: Sequence[Stage], again: bool, progress: Progress) -> None:
        self.run, self.stages, self.again, self.progress = run, stages, again, progress
        self.tokens, self.testing = run.options.max_new_tokens, list(run.workload.testing)
        self.before, self.after = stages[0].exits, stages[-1].exits
        self.key = self.after.digest()[:8]
        if again:
            for path in list(run.work.glob("measured-*.json")):
                path.unlink()

    def all(self, others: Sequence[PromptItem]) -> dict[str, Any]:
        """By cost table on one engine, by the clock on each, which gets its share of the seconds that are left."""
        began, run = time.monotonic(), self.run
        found = {name: self._kept(name, make) for name, make in self.by_cost.items()}
        left = inf if self.again else max(0.0, run.plan().measuring - (time.monotonic() - began))
        results = [self._engine(engine, others, left / len(run.engines)) for engine in run.engines]
        return {**found, "results": results}

    @property
    def by_cost(self) -> dict[str, Callable[[], Any]]:
        """What no clock is in, by name."""
        return {"curve": self._curve, "repetitions": self._repetitions, "text": self._text}

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.run.work / f"measured-{name}-{self.key}.json"
        if not path.exists():
            write_json(path, make())
        return read_json(path, "measurement")

    def _curve(self) -> list[dict[str, Any]]:
        rows, prompts = list[dict[str, Any]](), self.testing[:CURVE_PROMPTS]
        for done, stage in enumerate(self.stages):
            found = list[dict[str, Any]]()
            for ids in prompts:
                found.append(steadily(self.run.engines[0], ids, self.tokens, stage.exits))
                self.progress(done * len(prompts) + len(found), len(self.stages) * len(prompts), "measuring the curve")
            steps = stage.judged.get("agreement_by_step", [None])
            rows.append({"prompts": stage.prompts, **curve_row(found), "first_draft_right": steps[0]})
        return rows

    def _repetitions(self) -> list[dict[str, Any]]:
        prompts = self.testing[:REPEATED_PROMPTS]
        return over_repetitions(self.run.engines[0], prompts, self.tokens, self.before, self.progress)

    def _text(self) -> dict[str, Any]:
        """One held-out text, before and after: who wrote each token, and the shallowest exit that says it."""
        engine, ids = self.run.engines[0], self.testing[0]
        policies = {"before": Verified(self.before), "after": Verified(self.after)}
        written = written_by(engine, ids, policies, self.tokens)
        answer = self.run.answer_to(ids)
        own = self.before if self.before.heads is not None else bare_exits(self.run.model, self.run.depths)
        found = {"layers": engine.backbone.spec.layers, "written": written}
        depth = {n: shallowest(self.run.model.backbone, e, ids, answer) for n, e in (("before", own), ("after", self.after))}
        return {**found, "depth": depth}

    def _engine(self, engine: Model, others: Sequence[PromptItem], seconds: float) -> dict[str, Any]:
        spec = engine.backbone.spec
        policies = {
            "full": FullDepth(),
            "before": Verified(self.before),
            "after": Verified(self.after),
        }
        which = f"{self.key}-{prompts_hash(others)[:8]}"  # others than before may be given
        path = self.run.work / f"measured-{spec.backend}-{spec.precision}-{which}.json"
        compared = Compared(engine, policies, self.tokens, path)
        known = self.run.workload.categories
        mine = [("workload", known[ids], ids) for ids in self.testing]
        theirs = [("others", *one) for one in _encoded(engine, spread(others, len(mine)), self.tokens)]
        in_turn = [one for pair in zip_longest(mine, theirs) for one in pair if one is not None]
        compared.run(in_turn, seconds, self.progress)
        sides = {kind: [row for row in compared.rows if row["kind"] == kind] for kind in ("workload", "others")}
        return {
            "backend": spec.backend,
            "precision": spec.precision,
            "exact": spec.row_invariant,
            **{kind: {**summary_of(rows), "by_category": by_category(rows)} if rows else None for kind, rows in sides.items()},
        }


def _rehearsed(
    model: Model, talk: Sequence[PromptItem], used: Sequence[PromptItem], count: int, options: HabitOptions
) -> list[Ids]:
    """Token ids of so many prompts of other work, evenly over the set, none of which is used otherwise."""
    known = {prompt.text_or_ids for prompt in used}
    chosen = spread([one for one in talk if one.text_or_ids not in known], count)
    return [ids for _, ids in _encoded(model, chosen, options.max_new_tokens)]


def _encoded(model: Model, items: Sequence[PromptItem], new: int) -> list[tuple[str, Ids]]:
    """Categories and token ids of the prompts that leave room for so many new tokens."""
    raw = model.tokenizer is None or not model.tokenizer.has_chat_template
    room = (model.backbone.spec.context or 1 << 40) - new
    encoded = [(item.category, tuple(model.encode(item.text_or_ids, raw=raw))) for item in items]
    return [one for one in encoded if len(one[1]) <= room]


def verdict(document: Mapping[str, Any]) -> list[str]:
    """What it gave, in a sentence for each engine."""
    lines = []
    for one in document["results"]:
        work, others = one["workload"], one["others"]
        text = (
            f"{one['precision']}: held-out prompts of the workload {work['before']['ratio'][0]:.2f} x full depth before, "
            f"{work['after']['ratio'][0]:.2f} x after ({work['after']['ratio'][1]:.2f} to {work['after']['ratio'][2]:.2f})"
        )
        if others is not None:
            text += f"; other prompts at {others['after_to_before'][0]:.2f} x of what they were"
        same = min(side["same_text"] for side in (work, others) if side is not None)
        lines.append(f"{text}; same text as full depth {same:.0%}.")
    for one in document.get("trained", {}).get("engines", ()):
        lines += [_of_model(one["precision"], name, one[name]) for name in ("original", "learned")]
    return lines


def _of_model(precision: str, name: str, found: Mapping[str, Any]) -> str:
    verified, reflex = (f"{found[way]['tokens_per_second']:.1f} tokens/s" for way in ("verified", "reflex"))
    return (
        f"{precision}, the {name} model: verified {verified}; reflex certified at 2% {reflex} at "
        f"{found['certified_depth']:.0%} of the depth."
    )
