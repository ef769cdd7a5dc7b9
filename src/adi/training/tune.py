"""``tune``: from a model and prompts to exits, in four stages that each resume: answers, features, heads, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.drafters.network import Drafter
from adi.errors import AdiError
from adi.exits.heads import Heads, Shortlist, shortlist
from adi.model.backbone import Backbone, ReadOut
from adi.model.hf import HfBackbone
from adi.model.load import Model
from adi.training.answers import (
    HELD_OUT_SHARE,
    Answer,
    answers_hash,
    collect,
    first_of,
    interleave,
    is_held_out,
    multiplies_faster_in_bfloat16,
    quicker_in_bfloat16,
)
from adi.training.categories import Categories
from adi.training.dataset import DrafterData, Tell, data_from_answers, data_from_talk, said, seen_in, windows_of
from adi.training.generate_data import GenerateOptions, share_of_own
from adi.training.report import evaluate, report_json
from adi.training.shards import choose_shortlist, write_shards
from adi.training.train_drafter import DraftOptions, as_halves, fit_drafter, judge
from adi.training.train_heads import FitOptions, changed, fit, fresh_checkpoint

WARM = 0.5  # learning rate of a warm start, against a cold one's
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class TuneOptions:
    """How exits are made. ``depths`` None spreads seven over the model, denser towards its end.

    ``tokens`` counts answer tokens (the model's own) to train on; ``shortlist`` tokens that a head can name; ``rank`` of
    the adapters. With ``talk_tokens`` nothing is answered: the drafter learns from so many tokens of texts that the model
    writes by itself (``training.talk``), the heads from the first ``tokens`` of them; ``own_prompts``: the share whose prompts
    it writes too (None: by model). ``warm_start``: the drafter and the answers that are there go on, in smaller steps.
    """

    depths: tuple[int, ...] | None = None
    tokens: int = 100_000
    max_new_tokens: int = 160
    shortlist: int = 4096
    rank: int = 128
    epochs: int = 3
    learning_rate: float = 3e-3
    drafter_epochs: int = 4
    talk_tokens: int = 0
    own_prompts: float | None = None
    warm_start: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "max_new_tokens", "shortlist", "rank", "epochs"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise AdiError(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1.")
        for name in ("drafter_epochs", "talk_tokens"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise AdiError(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 0.")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise AdiError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2**63 - 1.")
        if type(self.learning_rate) not in (int, float) or not 0 < self.learning_rate <= 1:
            raise AdiError(f"learning_rate is {self.learning_rate!r}; it must be above 0 and at most 1.")
        if self.own_prompts is not None and (type(self.own_prompts) not in (int, float) or not 0 <= self.own_prompts <= 1):
            raise AdiError(f"own_prompts is {self.own_prompts!r}; it must be from 0 to 1.")


def tune(
    model: Model,
    out: str | os.PathLike[str],
    prompts: Sequence[Sequence[str]],
    options: TuneOptions | None = None,
    *,
    texts: Sequence[str | os.PathLike[str]] = (),
    keep: Exits | None = None,
    voices: Sequence[Model] = (),
    categories: Mapping[str, str] | None = None,
    made_by: Mapping[str, Any] | None = None,
    progress: Progress = lambda stage, done, total, note: None,
) -> Exits:
    """Train exit heads for a frozen model and save them to ``out``; a stopped run goes on where it was.

    Args:
        model: a model on the transformers engine.
        out: gets the exits, and ``work/`` with answers, features and checkpoint.
        prompts: groups of prompts (one per file), shared out evenly.
        options: see ``TuneOptions``.
        texts: plain text files to learn from beside the answers.
        keep: exits of this model whose heads, trigger and shortlist stay as they are: only a drafter is trained; it begins
            with theirs under ``options.warm_start``.
        voices: the same model on the engines (or precisions) that drafts are for; each talks its share. By default ``model``.
        categories: of prompts, by their text; the report then says what was reached in each.
        made_by: noted in the exits: the command and the data.
        progress: is told ``(stage, done, total, note)``.

    Raises:
        ValueError: options that do not fit the model, unreadable files, a head that adapters cannot start from.
    """
    backbone, work, options = model.backbone, Path(out) / "work", options or TuneOptions()
    begin = _begin(keep, options)
    depths, readout = _depths(options.depths, backbone.spec.layers), _on_cpu(backbone.readout().tensors())
    windows = [window for path in texts for window in windows_of(model, Path(path))]
    talks = options.drafter_epochs > 0 and options.talk_tokens > 0
    given, kinds = interleave(prompts), _kinds(model, categories or {}, talks)
    if not talks:
        _enough([is_held_out(p) for p in given] + [w.held_out for w in windows])
    work.mkdir(parents=True, exist_ok=True)
    forced_read = lambda stage, done, total: progress(stage, done, total, "")  # noqa: E731
    lessons = _talked(model, voices, given, work, options, forced_read) if talks else None
    answers = [*(said(lessons) if lessons else _answers(model, work, prompts, options, progress)), *windows]
    _enough([a.held_out for a in answers])
    train, held = [a for a in answers if not a.held_out], [a for a in answers if a.held_out]
    among = _among(readout, train, backbone.spec.vocabulary, options, keep)
    made = {**(made_by or {}), "options": asdict(options), "answers": answers_hash(answers)}
    if keep is None:
        shown = (first_of(train, options.tokens), first_of(held, options.tokens)) if talks else (train, held)
        exits = replace(_heads(backbone, readout, depths, shown, among, work, options, progress, kinds), made_by=made)
    else:
        keep.check(backbone)
        exits = replace(keep, made_by={**keep.made_by, "drafter": {**made, **_began_with(keep, options)}})
    if options.drafter_epochs:
        lessons = lessons or data_from_answers(backbone, train, held, work, forced_read)
        drafter, judged = train_drafter(backbone, readout, among, lessons, work, options, progress, begin, kinds)
        spoken = lessons.said_after(keep.answers if keep is not None and options.warm_start else None)
        exits = replace(exits, drafter=drafter, answers=spoken, report={**exits.report, "drafter": judged})
    exits.save(out)
    return exits


def judge_drafter(
    model: Model,
    out: str | os.PathLike[str],
    prompts: Sequence[Sequence[str]],
    options: TuneOptions,
    *,
    keep: Exits,
    voices: Sequence[Model] = (),
    categories: Mapping[str, str] | None = None,
    made_by: Mapping[str, Any] | None = None,
    progress: Progress = lambda stage, done, total, note: None,
) -> Exits:
    """Measure the drafter of ``keep`` again, on ``options.talk_tokens`` tokens of fresh conversations, and save the exits with
    the new figures to ``out``; nothing is trained. All of the texts are test texts, so ``prompts`` must be none that training
    saw; texts that begin as one of the exits' datastore are left out. Arguments as for ``tune``.
    """
    backbone, work, begun = model.backbone, Path(out) / "work", interleave(prompts)
    keep.check(backbone)
    if keep.drafter is None or not options.talk_tokens:
        raise AdiError("judging needs exits with a drafter (--keep) and a number of tokens to judge them on (--talk).")
    readout, kinds = _on_cpu(backbone.readout().tensors()), _kinds(model, categories or {}, talks=True)
    among, drafter = shortlist(readout, keep.drafter.tensors()["ids_S"]), as_halves(keep.drafter)
    seen = None if keep.answers is None else seen_in(keep.answers)
    checks: dict[str, list[Path]] = {}
    generators = voices or (model,)
    share = replace(options, talk_tokens=-(-options.talk_tokens // len(generators)))
    for voice in generators:
        forced_read = lambda stage, done, total: progress(stage, done, total, "")  # noqa: E731
        found = _talked(model, (voice,), begun, work, share, forced_read, held_share=1.0)
        checks[voice.backbone.spec.precision] = found.checks
    embed = lambda ids: backbone.embed(ids).hidden_TD.cpu()  # noqa: E731
    judged = {
        name: judge(drafter, readout, among, embed, paths, kinds, seen, lambda d, t: progress("judge", d, t, ""))
        for name, paths in (*checks.items(), ("", [path for paths in checks.values() for path in paths]))
    }
    whole = judged.pop("")
    parts = {
        name: {key: found[key] for key in ("agreement_by_step", "accepted_in_a_row", "positions")}
        for name, found in judged.items()
    }
    old = {key: value for key, value in keep.report.get("drafter", {}).items() if key in ("answer_tokens", "settings")}
    note = {**(made_by or {}), "options": asdict(options)}
    exits = replace(
        keep,
        report={**keep.report, "drafter": {**whole, "by_precision": parts, **old}},
        made_by={**keep.made_by, "judged": note},
    )
    exits.save(out)
    return exits


def _kinds(model: Model, categories: Mapping[str, str], talks: bool) -> Categories:
    """The categories of the prompts that can be held out: of a talk all, else those that always are."""
    able = {prompt: category for prompt, category in categories.items() if talks or is_held_out(prompt)}
    return Categories.of(able, partial(model.encode, raw=_is_raw(model)))


def _begin(keep: Exits | None, options: TuneOptions) -> Drafter | None:
    """What the drafter begins with."""
    if not options.warm_start:
        return None
    if keep is None or keep.drafter is None:
        raise AdiError("a warm start needs exits that have a drafter: give keep=... (--keep).")
    return keep.drafter.map(Tensor.clone)


def _began_with(keep: Exits, options: TuneOptions) -> dict[str, Any]:
    return {"began_with": keep.made_by.get("drafter")} if options.warm_start else {}


def _talked(
    model: Model,
    voices: Sequence[Model],
    prompts: Sequence[str],
    work: Path,
    options: TuneOptions,
    forced_read: Tell,
    held_share: float = HELD_OUT_SHARE,
) -> DrafterData:
    """Lessons from texts that the model writes now."""
    own = share_of_own(model) if options.own_prompts is None else options.own_prompts
    talking = GenerateOptions(options.talk_tokens, options.max_new_tokens, own_prompts=own, seed=options.seed)
    talking = replace(talking, held_share=held_share)
    begun = [list(model.encode(p, raw=_is_raw(model))) for p in prompts]
    return data_from_talk(voices or (model,), begun, work, talking, forced_read)


def _among(readout: ReadOut, train: Sequence[Answer], vocabulary: int, options: TuneOptions, keep: Exits | None) -> Shortlist:
    """What is said most often in the answers, or what kept exits speak through."""
    if keep is None:
        return shortlist(readout, choose_shortlist(train, vocabulary, options.shortlist))
    if keep.drafter is None and keep.heads is None:
        raise AdiError("bare exits have no shortlist to keep; leave keep out.")
    return shortlist(readout, keep.drafter.ids_S if keep.drafter is not None else keep.heads.ids_S)  # type: ignore[union-attr]


def _heads(
    backbone: Backbone,
    readout: ReadOut,
    depths: tuple[int, ...],
    answers: tuple[Sequence[Answer], Sequence[Answer]],
    among: Shortlist,
    work: Path,
    options: TuneOptions,
    progress: Progress,
    kinds: Categories,
) -> Exits:
    """Features of the answers (to train on, and held out), an adapter for every depth, thresholds and a report."""
    (train, held), ids_S = answers, among.ids_S
    shards = write_shards(backbone, train, depths, ids_S, work / "features", lambda d, t: progress("features", d, t, ""))
    fresh_checkpoint(work / "checkpoint", [options, backbone.spec.fingerprint, ids_S.tolist(), [p.name for p in shards]])
    checks = write_shards(backbone, held, depths, ids_S, work / "held-out", lambda d, t: progress("held-out", d, t, ""))
    fitting = FitOptions(epochs=options.epochs, learning_rate=options.learning_rate, rank=options.rank, seed=options.seed)
    note = lambda done, total, losses: progress("heads", done, total, _losses(losses))  # noqa: E731
    adapters = fit(readout, among, depths, shards, work / "checkpoint.pt", fitting, note)
    progress("report", 0, 1, "")
    named = [kinds.named(answer) for answer in held] if kinds.known else ()
    reports, trigger, totals = evaluate(backbone, adapters, among, checks, named)
    progress("report", 1, 1, "")
    spec = backbone.spec
    return Exits(
        base=spec.fingerprint,
        base_name=spec.name,
        layers=spec.layers,
        width=spec.width,
        vocabulary=spec.vocabulary,
        depths=depths,
        trigger=trigger,
        heads=Heads(ids_S, adapters),
        report=report_json(reports, totals, sum(a.tokens for a in train)),
    )


def train_drafter(
    backbone: Any,
    readout: ReadOut,
    among: Shortlist,
    lessons: DrafterData,
    work: Path,
    options: TuneOptions,
    progress: Progress,
    begin: Drafter | None = None,
    kinds: Categories | None = None,
) -> tuple[Drafter, dict[str, Any]]:
    """A drafter that learned from the lessons, from ``begin`` on if it is given, and what it does on those held out."""
    quick = quicker_in_bfloat16(work / "drafter.dtype", lambda: multiplies_faster_in_bfloat16(torch.device("cpu")))
    rate = DraftOptions.learning_rate * (1.0 if begin is None else WARM)
    fitting = DraftOptions(epochs=options.drafter_epochs, learning_rate=rate, seed=options.seed, bfloat16=quick)
    made_of = [among.ids_S.tolist(), [p.name for p in lessons.shards], None if begin is None else begin.digest()]
    fresh_checkpoint(work / "drafter", [fitting, backbone.spec.fingerprint, *made_of])
    embed, mlp = lambda ids: backbone.embed(ids).hidden_TD.cpu(), backbone.last_mlp()
    note = lambda done, total, loss: progress("drafter", done, total, f"loss {loss:.2f}")  # noqa: E731
    drafter = fit_drafter(readout, among, embed, lessons.shards, work / "drafter.pt", fitting, note, mlp, begin)
    judged = judge(as_halves(drafter), readout, among, embed, lessons.checks, kinds)
    return drafter, {**judged, "answer_tokens": lessons.tokens, "settings": asdict(fitting)}


def _answers(
    model: Model, work: Path, prompts: Sequence[Sequence[str]], options: TuneOptions, progress: Progress
) -> list[Answer]:
    """The model's answers to the prompts; those in the folder are kept if this model gave them under these options."""
    if not isinstance(model.backbone, HfBackbone):
        raise AdiError("tuning runs on the transformers engine; load the model with backend='hf'.")
    if not prompts:
        return []
    raw = _is_raw(model)
    key = [model.backbone.spec.fingerprint, sorted(model.eos_ids), options.max_new_tokens, options.seed, raw]
    if changed(work / "answers.key", key):
        (work / "answers.jsonl").unlink(missing_ok=True)
    return collect(
        model.backbone.model,
        lambda text: list(model.encode(text, raw=raw)),
        model.eos_ids,
        interleave(prompts),
        work / "answers.jsonl",
        tokens=options.tokens,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        progress=lambda done, total: progress("answers", min(done, total), total, ""),
    )


def _is_raw(model: Model) -> bool:
    """Whether prompts are given to this model as they are."""
    return model.tokenizer is None or not model.tokenizer.has_chat_template


def _enough(held_out: Sequence[bool]) -> None:
    """ValueError unless there is something to train on and something to test on (about one prompt in twelve)."""
    held = sum(held_out)
    if not held or held == len(held_out):
        raise AdiError(
            f"{len(held_out)} prompts or stretches of text are too few: {held} of them would be held out to test on, and there "
            "must be some of each kind. Give more (a hundred or so)."
        )


def _depths(chosen: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    if chosen is None:
        shares = (0.27, 0.4, 0.53, 0.67, 0.8, 0.87, 0.93)
        return tuple(sorted({min(max(1, round(share * layers)), layers - 1) for share in shares}))
    if not chosen or any(not 0 < d < layers for d in chosen) or len(set(chosen)) != len(chosen):
        raise AdiError(f"depths {chosen} are not possible: the model has {layers} layers, so choose among 1..{layers - 1}.")
    return tuple(sorted(chosen))


def _on_cpu(r: ReadOut) -> ReadOut:
    """Heads are small: they are fitted on the processor, wherever the model runs."""
    bias_V = None if r.bias_V is None else r.bias_V.cpu()
    return replace(r, gain_D=r.gain_D.cpu(), shift_D=r.shift_D.cpu(), weight_VD=r.weight_VD.cpu(), bias_V=bias_V)


def _losses(losses: Mapping[int, float]) -> str:
    return "KL " + " ".join(f"{depth}:{loss:.2f}" for depth, loss in losses.items())
