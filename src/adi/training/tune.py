"""``tune``: from a model and prompts to exits, in stages that each resume: text, heads, drafter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from adi.arguments import real, settle, whole
from adi.artifact import Exits, require_model
from adi.decoding.teacher_forcing import KnownText
from adi.drafters.network import Drafter
from adi.errors import FileError, UsageError
from adi.exits.heads import Heads, shortlist
from adi.model.backbone import Backbone, ReadOut
from adi.model.load import Model
from adi.progress import Progress, no_progress
from adi.training.generate_data import GenerateOptions, generate_dataset, share_of_own
from adi.training.report import judge_drafter, judge_heads, report_json, seen_in
from adi.training.shards import Teacher, choose_shortlist, read_shard, texts_in, write_forced_shards
from adi.training.texts import (
    HELD_OUT_SHARE,
    Categories,
    answer_tokens,
    datastore_of,
    first_of,
    interleave,
    is_held_out,
    windows_of,
)
from adi.training.train_drafter import DraftOptions, as_halves, fit_drafter
from adi.training.train_heads import HeadOptions, fit_heads
from adi.training.trainer import fresh_checkpoint, quicker_in_bfloat16

WARM = 0.5  # learning rate of a warm start, against a cold one's
SHARES_OF_DEPTH = (0.27, 0.4, 0.53, 0.67, 0.8, 0.87, 0.93)


@dataclass(frozen=True)
class TuneOptions:
    """How exits are made. ``depths`` None spreads seven over the model, denser towards its end.

    ``tokens`` counts answer tokens (the model's own) to train on; ``shortlist`` tokens that a head can name; ``rank`` of
    the adapters. By default every prompt is answered once at most. With ``generate_tokens`` the drafter learns from so many
    tokens of conversations, the heads from the first ``tokens`` of them: prompts come again, sampled anew, and the model
    writes the share ``own_prompts`` of them itself (None: by model). ``warm_start``: the drafter and the datastore that are
    there go on, in smaller steps.
    """

    depths: tuple[int, ...] | None = None
    tokens: int = 100_000
    max_new_tokens: int = 160
    shortlist: int = 4096
    rank: int = 128
    epochs: int = 3
    learning_rate: float = 3e-3
    drafter_epochs: int = 4
    generate_tokens: int = 0
    own_prompts: float | None = None
    warm_start: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (*dict.fromkeys(COUNTS, 1).items(), ("drafter_epochs", 0), ("generate_tokens", 0)):
            settle(self, **{name: whole(name, getattr(self, name), least)})
        settle(self, seed=whole("seed", self.seed, 0, (1 << 63) - 1))
        settle(self, learning_rate=real("learning_rate", self.learning_rate, "above 0 and at most 1", lambda r: 0 < r <= 1))
        if self.own_prompts is not None:
            settle(self, own_prompts=real("own_prompts", self.own_prompts, "from 0 to 1", lambda s: 0 <= s <= 1))


COUNTS = ("tokens", "max_new_tokens", "shortlist", "rank", "epochs")


def tune(
    model: Model,
    out: str | os.PathLike[str],
    prompts: Sequence[Sequence[str]],
    options: TuneOptions | None = None,
    *,
    texts: Sequence[str | os.PathLike[str]] = (),
    keep: Exits | None = None,
    generators: Sequence[Model] = (),
    categories: Mapping[str, str] | None = None,
    made_by: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Exits:
    """Train exit heads and a drafter for a frozen model and save them to ``out``; a stopped run goes on where it was.

    Args:
        model: a model on the transformers engine.
        out: gets the exits, and ``work/`` with texts, states and checkpoints.
        prompts: groups of prompts (one per file), shared out evenly. About one in twelve is only tested on.
        options: see ``TuneOptions``.
        texts: plain text files to learn from beside the answers.
        keep: exits of this model whose heads, trigger and shortlist stay as they are: only a drafter is trained; it begins
            with theirs under ``options.warm_start``.
        generators: the same model on the engines (or precisions) that drafts are for; each generates its share of the text.
            By default ``model``.
        categories: of prompts, by their text; the report then has the figures of each.
        made_by: noted in the exits: the command and the data.
        progress: called with done, total and what is being done.

    Raises:
        AdiError: options that do not fit the model, unreadable files, a head that adapters cannot start from.
    """
    require_model(model)
    options = options or TuneOptions()
    run = _Tuning(model, Path(out) / "work", options, generators or (model,), keep, categories or {}, progress)
    begin = begin_of(keep, options)
    run.read_data(prompts, [window for path in texts for window in windows_of(model, Path(path))])
    made = {**(made_by or {}), "options": asdict(options), "texts": _digest([*run.train, *run.held])}
    if keep is None:
        exits = replace(run.heads(), made_by=made)
    else:
        began_with = {"began_with": keep.made_by.get("drafter")} if options.warm_start else {}
        exits = replace(keep, made_by={**keep.made_by, "drafter": {**made, **began_with}})
    if options.drafter_epochs:
        drafter, judged = run.drafter(begin)
        answers = datastore_of(texts_in(run.train))
        if options.warm_start and keep is not None and keep.answers is not None:
            answers = keep.answers.and_more(answers)
        exits = replace(exits, drafter=drafter, answers=answers, report={**exits.report, "drafter": judged})
    exits.save(out)
    return exits


def remeasure(
    model: Model,
    out: str | os.PathLike[str],
    prompts: Sequence[Sequence[str]],
    options: TuneOptions,
    *,
    keep: Exits,
    generators: Sequence[Model] = (),
    categories: Mapping[str, str] | None = None,
    made_by: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Exits:
    """Measure the drafter of ``keep`` again, on ``options.generate_tokens`` tokens of fresh conversations, and save the exits
    with the new figures to ``out``; nothing is trained. All of these texts are test texts, so ``prompts`` must be none that
    training saw; texts that begin as one of the exits' datastore are left out. Other arguments as for ``tune``.
    """
    if keep.drafter is None or not options.generate_tokens:
        raise UsageError(
            f"generate_tokens is {options.generate_tokens}; measuring again needs exits with a drafter (--keep) and how many "
            "tokens to generate (--talk)."
        )
    run = _Tuning(model, Path(out) / "work", options, generators or (model,), keep, categories or {}, progress)
    run.read_data(prompts, held_share=1.0)
    teacher, seen = run.teacher(), None if keep.answers is None else seen_in(keep.answers)
    judge = partial(judge_drafter, as_halves(keep.drafter), teacher, run.backbone.embed, categories=run.categories, seen=seen)
    whole, by_precision = judge(run.held, progress=progress), {}
    for name in dict.fromkeys(engine.backbone.spec.precision for engine in run.generators):
        found = judge([path for path in run.held if path.parent.name.endswith(name)], progress=progress)
        by_precision[name] = {key: found[key] for key in ("agreement_by_step", "accepted_in_a_row", "positions")}
    trained = {k: v for k, v in keep.report.get("drafter", {}).items() if k in ("answer_tokens", "settings")}
    made = {**keep.made_by, "measured": {**(made_by or {}), "options": asdict(options), "texts": _digest(run.held)}}
    report = {**keep.report, "drafter": {**whole, "by_precision": by_precision, **trained}}
    exits = replace(keep, report=report, made_by=made)
    exits.save(out)
    return exits


class _Tuning:
    """The stages of one run: what they share, and the shards of its text, to train on and held out."""

    def __init__(
        self,
        model: Model,
        work: Path,
        options: TuneOptions,
        generators: Sequence[Model],
        keep: Exits | None,
        categories: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self.model, self.backbone, self.work, self.options = model, model.backbone, work, options
        self.generators, self.keep, self.progress = generators, keep, progress
        if keep is not None:
            keep.check(self.backbone)
        self.depths = _chosen_depths(options.depths, self.backbone.spec.layers)
        self.readout = on_cpu(self.backbone.readout().tensors())
        raw = model.tokenizer is None or not model.tokenizer.has_chat_template
        self.encode: Callable[[str], tuple[int, ...]] = lambda text: tuple(model.encode(text, raw=raw))
        self.categories = Categories.of(categories, self.encode)
        self.train: list[Path] = []
        self.held: list[Path] = []

    def read_data(
        self, prompts: Sequence[Sequence[str]], windows: Sequence[KnownText] = (), held_share: float = HELD_OUT_SHARE
    ) -> None:
        """Generate the text, or find it; and states of the stretches of plain text."""
        options, given = self.options, [self.encode(prompt) for prompt in interleave(prompts)]
        sides = [[w for w in windows if is_held_out(w.ids, held_share) is side] for side in (False, True)]
        if not options.generate_tokens:
            _enough([is_held_out(ids, held_share) for ids in given] + [False] * len(sides[0]) + [True] * len(sides[1]))
        _refuse_old(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        if given or options.generate_tokens:
            own = share_of_own(self.model) if options.own_prompts is None else options.own_prompts
            generating = GenerateOptions(
                tokens=options.generate_tokens or options.tokens,
                max_new_tokens=options.max_new_tokens,
                own_prompts=own if options.generate_tokens else 0.0,
                repeat=options.generate_tokens > 0,
                seed=options.seed,
                held_share=held_share,
            )
            self.train, self.held = generate_dataset(self.generators, given, self.work, generating, self.progress)
        engine = self.generators[0].backbone
        for shards, name, side in ((self.train, "windows", sides[0]), (self.held, "held-windows", sides[1])):
            shards += write_forced_shards(engine, side, self.work / name, progress=self.progress) if side else []
        if held_share < 1 or not self.held:
            _enough([False] * len(self.train) + [True] * len(self.held))

    def teacher(self) -> Teacher:
        """The full model over the tokens that it predicts most often, or over the shortlist of the exits that are kept."""
        if self.keep is None:
            ids_S = choose_shortlist(self.train, self.backbone.spec.vocabulary, self.options.shortlist)
        elif (known := self.keep.drafter or self.keep.heads) is not None:
            ids_S = known.ids_S
        else:
            raise UsageError(f"bare exits of {self.keep.base_name} have no shortlist to keep; leave keep out.")
        return teacher_of(self.backbone, self.readout, ids_S, self.held[0])

    def heads(self) -> Exits:
        """An adapter for every depth, thresholds and a report, from states of the text at these depths."""
        backbone, options, spec, teacher = self.backbone, self.options, self.backbone.spec, self.teacher()
        most = options.tokens if options.generate_tokens else answer_tokens(texts_in([*self.train, *self.held]))
        train, held = (first_of(texts_in(paths), most) for paths in (self.train, self.held))
        shards = write_forced_shards(backbone, train, self.work / "states", self.depths, self.progress)
        what = "reading held-out states"
        checks = write_forced_shards(backbone, held, self.work / "held-states", self.depths, self.progress, what)
        how = HeadOptions(epochs=options.epochs, learning_rate=options.learning_rate, rank=options.rank, seed=options.seed)
        made_of = [how, spec.fingerprint, teacher.among.ids_S.tolist(), [path.name for path in shards]]
        checkpoint = fresh_checkpoint(self.work / "heads.pt", made_of)
        adapters = fit_heads(teacher, self.depths, shards, checkpoint, how, self.progress)
        reports, trigger, totals = judge_heads(backbone, teacher, adapters, checks, self.categories, self.progress)
        report = report_json(reports, totals, answer_tokens(train))
        return Exits.of(spec, self.depths, trigger, heads=Heads(teacher.among.ids_S, adapters), report=report)

    def drafter(self, begin: Drafter | None) -> tuple[Drafter, dict[str, Any]]:
        """A drafter, from ``begin`` on if it is given, and its figures on held-out text."""
        teacher, options, backbone = self.teacher(), self.options, self.backbone
        quick = quicker_in_bfloat16(self.work / "drafter.dtype")
        rate = DraftOptions.learning_rate * (1.0 if begin is None else WARM)
        how = DraftOptions(epochs=options.drafter_epochs, learning_rate=rate, seed=options.seed, bfloat16=quick)
        made_of = [how, backbone.spec.fingerprint, teacher.among.ids_S.tolist(), _digest(self.train)]
        checkpoint = fresh_checkpoint(self.work / "drafter.pt", [*made_of, None if begin is None else begin.digest()])
        mlp = backbone.last_mlp()
        drafter = fit_drafter(teacher, self.backbone.embed, self.train, checkpoint, how, self.progress, mlp, begin)
        judged = judge_drafter(
            as_halves(drafter), teacher, self.backbone.embed, self.held, self.categories, progress=self.progress
        )
        return drafter, {**judged, "answer_tokens": answer_tokens(texts_in(self.train)), "settings": asdict(how)}


def teacher_of(backbone: Backbone, readout: ReadOut, ids_S: Tensor, states: Path) -> Teacher:
    """The full model over these tokens; a shard of its ``states`` shows whether it bends its logits."""
    plain = Teacher(readout, shortlist(readout, ids_S))
    rows = read_shard(states)
    some = rows.rows(rows.total_N.argsort(descending=True)[:8])
    actual_RV = backbone.logits(some.deep_ND.float().to(backbone.spec.device)).cpu()
    return plain.fitted(some.deep_ND, actual_RV[:, plain.among.ids_S])


def begin_of(keep: Exits | None, options: TuneOptions) -> Drafter | None:
    """What the drafter begins with; UsageError for a warm start from nothing."""
    if keep is not None and not options.drafter_epochs:
        raise UsageError(f"drafter_epochs is {options.drafter_epochs}, and of kept exits only the drafter is trained; give 1.")
    if not options.warm_start:
        return None
    if keep is None or keep.drafter is None:
        raise UsageError(f"warm_start is {options.warm_start}; it needs exits that have a drafter: give keep=... (--keep).")
    return keep.drafter


def _refuse_old(work: Path) -> None:
    if any((work / name).exists() for name in ("answers.jsonl", "features", "tracks")) or any(work.glob("talk-*")):
        raise FileError(
            f"the texts in {work} were made by an older adi, whose held-out texts could share prompts with those trained on; "
            "delete that folder, or choose another --out."
        )


def _digest(shards: Sequence[Path]) -> str:
    """A short name for these shards, whose own names say what they hold."""
    names = [f"{path.parent.name}/{path.name}" for path in shards]
    return hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()


def _enough(held_out: Sequence[bool]) -> None:
    """UsageError unless there is something to train on and something to test on (about one prompt in twelve)."""
    held = sum(held_out)
    if not held or held == len(held_out):
        raise UsageError(
            f"{len(held_out)} prompts or stretches of text are too few: {held} of them would be held out to test on, and there "
            "must be some of each kind. Give more (a hundred or so)."
        )


def default_depths(layers: int) -> tuple[int, ...]:
    """Seven depths at most, denser towards the end."""
    return tuple(sorted({min(max(1, round(share * layers)), layers - 1) for share in SHARES_OF_DEPTH}))


def _chosen_depths(chosen: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    if chosen is None:
        return default_depths(layers)
    if not chosen or any(not 0 < d < layers for d in chosen) or len(set(chosen)) != len(chosen):
        raise UsageError(f"depths {chosen} are not possible: the model has {layers} layers, so choose among 1..{layers - 1}.")
    return tuple(sorted(chosen))


def on_cpu(r: ReadOut) -> ReadOut:
    """Heads are small: they are fitted on the processor, wherever the model runs."""
    bias_V = None if r.bias_V is None else r.bias_V.cpu()
    return replace(r, gain_D=r.gain_D.cpu(), shift_D=r.shift_D.cpu(), weight_VD=r.weight_VD.cpu(), bias_V=bias_V)
