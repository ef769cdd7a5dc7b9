"""``train_model``: a decoder's own blocks learn, under a price on depth, to say early what it says at full depth.

The teacher is the model as it was, from its last states (``shards``). Two losses a step: on answers of the workload the
divergence of each exit from the teacher, weighed by the halting distribution of least free energy (``price``); and on other
text, and now and then on the workload, the divergence of full depth from the teacher, so that nothing else is lost.
Distillation: Hinton et al. 2015; exits trained with the blocks: Teerapittayanon et al. 2016, Schuster et al. 2022. Embeddings,
final norm and head stay as they are, so what reads the last states (a drafter) still fits.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812
from msgspec import Meta
from torch import Tensor

from adi.arguments import real, settle, whole
from adi.artifact import Exits, require_model
from adi.decoding.teacher_forcing import KnownText
from adi.errors import ModelError, UsageError
from adi.exits.heads import Adapter, Heads, fresh_adapter, predict, shortlist
from adi.files import write_json
from adi.model.arrays import digest
from adi.model.backbone import Backbone
from adi.model.hf import HfBackbone
from adi.model.hf.splitting import decoder_of
from adi.model.hub import quiet_transformers
from adi.model.load import Model
from adi.progress import Progress, no_progress
from adi.prompts import read_prompts
from adi.schema import read_json_as
from adi.training.generate_data import GenerateOptions, generate_dataset, share_of_own
from adi.training.price import posterior
from adi.training.report import judge_heads, report_json
from adi.training.shards import Shard, Teacher, choose_shortlist, read_shard, texts_in, write_forced_shards
from adi.training.texts import TEXT_WINDOW, Categories, answer_tokens
from adi.training.train_heads import divergence
from adi.training.trainer import OptimizerOptions, Update, fresh_checkpoint, quicker_in_bfloat16, train

CURVE = "curve.json"
SPAN = 16  # steps between two checkpoints
KEPT_TOKENS = 0.5  # of a step on the workload, that the loss of full depth has
FROM_WORKLOAD = 0.3  # share of those steps whose text is the workload's
ADAPTER_RATE = 5.0  # learning rate of exits, against that of the blocks
DEEP_RATE = 0.5  # of the blocks above the deepest exit
StepSeconds = Annotated[float, Meta(gt=0, le=1e9)]
SPARE_SECONDS = 1.2  # a step with its update, against its losses alone


@dataclass(frozen=True)
class ModelOptions:
    """How a model's blocks are trained.

    ``depths`` of exits, None: a third and half. ``steps``, None: as many as fit in ``minutes``. ``price`` in nats for a full
    pass, ``tau`` and ``floor`` as in ``training.price``. ``keep`` is the weight of full depth's loss, ``tokens`` those of the
    workload in a step, ``rank`` and ``shortlist`` the exits'. ``every`` so many minutes a point of the curve is measured (0: at
    begin and end only).
    """

    depths: tuple[int, ...] | None = None
    steps: int | None = None
    minutes: float = 180.0
    price: float = 1.0
    tau: float = 1.0
    floor: float = 0.5
    keep: float = 4.0
    learning_rate: float = 3e-4
    tokens: int = 1024
    rank: int = 128
    shortlist: int = 4096
    every: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, minutes=real("minutes", self.minutes, "above 0", lambda m: m > 0))
        settle(self, price=real("price", self.price, "from 0 to 100", lambda p: 0 <= p <= 100))
        if self.steps is not None:
            settle(self, steps=whole("steps", self.steps, 1))

    def depths_of(self, layers: int) -> tuple[int, ...]:
        """The depths of exits in a model of so many blocks; UsageError for some that it lacks."""
        chosen = self.depths if self.depths is not None else (max(1, round(layers / 3)), max(1, round(layers / 2)))
        if any(not 0 < d < layers for d in chosen):
            raise UsageError(f"depths {chosen} are not possible in a model of {layers} blocks; choose among 1..{layers - 1}.")
        return tuple(sorted({*chosen}))


@dataclass(frozen=True)
class _Text:
    """One text with what the teacher makes of it: ids ``[T]``, whether a row answers ``[T]``, last states ``[T, D]``, totals
    ``[T]`` and greedy tokens ``[T]``."""

    ids_T: Tensor
    answer_T: Tensor
    deep_TD: Tensor
    total_T: Tensor
    token_T: Tensor

    @classmethod
    def all_of(cls, shards: Sequence[Path]) -> list[_Text]:
        return [one for path in shards for one in cls._split(read_shard(path))]

    @classmethod
    def _split(cls, shard: Shard) -> list[_Text]:
        columns = (shard.ids_N.long(), shard.answer_N, shard.deep_ND, shard.total_N, shard.token_N.long())
        return [cls(*parts) for parts in zip(*(column.split(shard.lengths) for column in columns), strict=True)]


@dataclass(frozen=True)
class _Batch:
    """Texts side by side, filled up on the right, which no causal row sees: ids and whether a row is text ``[B, T]``, and the
    teacher's columns of all N rows of text, one after the other."""

    ids_BT: Tensor
    text_BT: Tensor
    rows: _Text

    @classmethod
    def of(cls, texts: Sequence[_Text]) -> _Batch:
        ids_BT = torch.nn.utils.rnn.pad_sequence([one.ids_T for one in texts], batch_first=True)
        text_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([[len(one.ids_T)] for one in texts])
        return cls(ids_BT, text_BT, _Text(*(torch.cat([vars(one)[name] for one in texts]) for name in vars(texts[0]))))


def batches(texts: Sequence[_Text], tokens: int, count: int, dice: torch.Generator, whole: bool = False) -> list[list[_Text]]:
    """``count`` groups of texts of like length, at most ``tokens`` each (or one text), each text once before any again; with
    ``whole`` as many more as take in all texts."""
    found: list[list[_Text]] = []
    while len(found) < count:
        order = [texts[i] for i in torch.randperm(len(texts), generator=dice).tolist()]
        groups: list[list[_Text]] = [[]]
        for one in sorted(order, key=lambda text: len(text.ids_T) // 32):
            if groups[-1] and (len(groups[-1]) + 1) * max(len(o.ids_T) for o in (*groups[-1], one)) > tokens:
                groups.append([])
            groups[-1].append(one)
        found += [groups[i] for i in torch.randperm(len(groups), generator=dice).tolist()]
    return found if whole else found[:count]


class _Enough(Exception):  # noqa: N818, no error: a pass has come to its deepest exit
    pass


class Learner:
    """A copy of a model whose blocks learn, with an exit at each of some depths; what it was is the ``teacher``."""

    def __init__(
        self, backbone: HfBackbone, teacher: Teacher, options: ModelOptions, bfloat16: bool, begin: Heads | None = None
    ) -> None:
        self.backbone, self.teacher, self.options, self.bfloat16 = backbone, teacher, options, bfloat16
        self.model = copy.deepcopy(backbone.model).requires_grad_(False)
        self.blocks = decoder_of(self.model)[1]
        if len({*map(id, self.blocks)}) < len(self.blocks):
            raise ModelError(f"{backbone.spec.name} is looped; train it with: adi train SETTINGS.toml --out DIR.")
        self.depths = options.depths_of(len(self.blocks))
        dice = torch.Generator().manual_seed(options.seed)
        self.adapters = {depth: _adapter(depth, teacher, options, dice, begin) for depth in self.depths}
        self.cost_R = torch.tensor([*self.depths, len(self.blocks)]) / len(self.blocks)

    def groups(self) -> list[dict[str, Any]]:
        """What learns, and how fast: the blocks below the deepest exit, those above, the exits."""
        split, rate = max(self.depths, default=len(self.blocks)), self.options.learning_rate
        # an RMS norm has no shift, and the merged head no place for one
        fixed = () if self.teacher.readout.norm == "layer" else ("shift_D",)
        exits = [t for a in self.adapters.values() for name, t in a.tensors().items() if name not in fixed]
        low, high = ([p for block in part for p in block.parameters()] for part in (self.blocks[:split], self.blocks[split:]))
        parts = ((low, rate), (high, rate * DEEP_RATE), (exits, rate * ADAPTER_RATE))
        return [{"params": [t.requires_grad_() for t in tensors], "lr": at} for tensors, at in parts if tensors]

    def run(self, batch: _Batch, full: bool) -> tuple[dict[int, Tensor], Tensor | None]:
        """States of all N rows of text at each exit, ``[N, D]``, and with ``full`` the logits ``[N, V]``."""
        seen: dict[int, Tensor] = {}

        def note(module: Any, args: Any, out: Any, depth: int) -> None:
            seen[depth] = (out[0] if isinstance(out, tuple) else out)[batch.text_BT]
            if not full and depth == self.depths[-1]:
                raise _Enough

        handles = [self.blocks[d - 1].register_forward_hook(partial(note, depth=d)) for d in self.depths]
        try:
            return seen, self.model(input_ids=batch.ids_BT, use_cache=False).logits[batch.text_BT]
        except _Enough:
            return seen, None
        finally:
            for handle in handles:
                handle.remove()

    def exit_loss(self, texts: Sequence[_Text]) -> Tensor:
        """Divergence of the exits from the teacher at rows that answer, weighed by q*; full depth counts as having none."""
        batch = _Batch.of(texts)
        rows, at, options = batch.rows, batch.rows.answer_T, self.options
        with self.autocast():
            seen, _ = self.run(batch, full=False)
            logs = self.teacher.logs(rows.deep_TD[at], rows.total_T[at])
            losses = [divergence(predict(self.adapters[d], self.teacher.among, seen[d][at]), *logs) for d in self.depths]
            loss_RN = torch.stack([*losses, torch.zeros_like(losses[0])]).float()
        weight_RN = posterior(loss_RN.detach(), self.cost_R, options.price, options.tau)
        weight_RN = (1 - options.floor) * weight_RN + options.floor / len(loss_RN)
        return (weight_RN * loss_RN).sum(0).mean()

    def keep_loss(self, texts: Sequence[_Text]) -> Tensor:
        """Divergence of full depth from the teacher, at all rows and over the whole vocabulary, times ``keep``."""
        batch = _Batch.of(texts)
        with self.autocast():
            _, logits_NV = self.run(batch, full=True)
            assert logits_NV is not None
            wanted_NV = self.backbone.logits(batch.rows.deep_TD.float())
        divergence_N = F.kl_div(
            logits_NV.float().log_softmax(-1), wanted_NV.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        return self.options.keep * divergence_N.mean()

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16)

    def updates(self, workload: Sequence[_Text], general: Sequence[_Text], dice: torch.Generator) -> list[Update]:
        """The steps of one span."""
        tokens = self.options.tokens
        early = batches(workload, tokens, SPAN, dice) if self.depths else [[]] * SPAN
        kept = [batches(texts, int(tokens * KEPT_TOKENS), SPAN, dice) for texts in (general, workload)]
        which = (torch.rand(SPAN, generator=dice) < FROM_WORKLOAD).tolist()
        return [
            [*([partial(self.exit_loss, early[n])] if self.depths else ()), partial(self.keep_loss, kept[int(which[n])][n])]
            for n in range(SPAN)
        ]

    @torch.no_grad()
    def judge(self, held: Sequence[_Text], windows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """On held-out answers the share of tokens at which each exit agrees with this model's full depth, and with the teacher;
        the same of full depth; perplexity of ``windows``."""
        found: dict[str, list[Tensor]] = {}
        for texts in batches(held, self.options.tokens, 1, torch.Generator(), whole=True):
            batch = _Batch.of(texts)
            at = batch.rows.answer_T
            with self.autocast():
                seen, logits_NV = self.run(batch, full=True)
                assert logits_NV is not None
                said = {d: predict(self.adapters[d], self.teacher.among, seen[d][at]).tokens_T for d in self.depths}
            full_N, teacher_N = logits_NV[at].argmax(-1), batch.rows.token_T[at]
            for name, token_N in ({"full": full_N} | {str(d): said[d] for d in self.depths}).items():
                found.setdefault(f"{name} full", []).append(token_N == full_N)
                found.setdefault(f"{name} teacher", []).append(token_N == teacher_N)
        share = {name: round(torch.cat(parts).float().mean().item(), 4) for name, parts in found.items()}
        exits = {str(d): {by: share[f"{d} {by}"] for by in ("full", "teacher")} for d in self.depths}
        return {"exits": exits, "full": share["full teacher"], "perplexity": self.perplexity(windows)}

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float | None:
        """Of the tokens of these windows, the first of each apart; None without any."""
        losses = []
        for window in windows:
            ids_1T = torch.tensor([list(window)])
            with self.autocast():
                logits_TV = self.model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
            losses.append(F.cross_entropy(logits_TV.float(), ids_1T[0, 1:], reduction="none"))
        return math.exp(torch.cat(losses).mean()) if losses else None


def train_model(
    model: Model,
    answers: Sequence[KnownText],
    general: Sequence[KnownText],
    out: Path,
    options: ModelOptions | None = None,
    *,
    held: Sequence[KnownText],
    windows: Sequence[Sequence[int]] = (),
    keep: Exits | None = None,
    categories: Categories | None = None,
    made_by: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Exits:
    """Train a copy of a model so that exits agree with full depth on ``answers``; a stopped run resumes to the bit.

    ``out`` gets an ordinary checkpoint (``save_pretrained``, with the tokenizer), its exits, ``curve.json`` (agreement on
    ``held`` and perplexity of ``windows`` as training went on), and ``work/`` with teacher's states and checkpoint. With more
    steps than before a finished folder goes on, at the learning rate of its new share of them.

    Args:
        model: on the transformers engine, in float32; it stays as it is, and is the teacher.
        answers: the model's own answers to prompts of the workload; ``first`` says where an answer begins.
        general: other text of the model, which keeps the rest as it was.
        held: answers to other prompts of the workload.
        windows: token ids of plain text, to measure perplexity.
        keep: exits of ``model``: its exits begin with their heads, and drafter and datastore go along.
        categories, made_by: for the report, and noted in the exits.

    Raises:
        AdiError: a looped model, depths that it lacks, no text, a loss that is no number (the last checkpoint stays).
    """
    require_model(model)
    if not isinstance(model.backbone, HfBackbone) or model.backbone.spec.precision != "fp32":
        spec = model.backbone.spec
        raise UsageError(
            f"{spec.name} runs on {spec.backend} in {spec.precision}; load it with backend='hf', precision='fp32'."
        )
    options, work, backbone = options or ModelOptions(), out / "work", model.backbone
    options.depths_of(backbone.spec.layers)
    bfloat16 = quicker_in_bfloat16(work / "model.dtype")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        shards = _shards(backbone, work, {"answers": answers, "held": held, "general": general}, progress)
    texts = {name: _Text.all_of(paths) for name, paths in shards.items()}
    teacher = _teacher(backbone, choose_shortlist(shards["answers"], backbone.spec.vocabulary, options.shortlist))
    learner = Learner(backbone, teacher, options, bfloat16, None if keep is None else keep.heads)
    steps = _steps(learner, texts, work / "step_seconds.json")
    names = {name: [path.name for path in paths] for name, paths in shards.items()}
    begin = digest([t for adapter in learner.adapters.values() for t in adapter.tensors().values()])
    key = [replace(options, steps=None, minutes=1.0, every=0.0), backbone.spec.fingerprint, names, bfloat16, begin]
    checkpoint = fresh_checkpoint(work / "model.pt", key)
    curve = _Curve(out / CURVE, learner, texts["held"], windows, -(-steps // SPAN), fresh=not checkpoint.exists())
    how = OptimizerOptions(curve.spans, options.learning_rate, (0.9, 0.98), 1.0, options.seed)

    def updates(_: Path, dice: torch.Generator) -> list[Update]:
        return learner.updates(texts["answers"], texts["general"], dice)

    train(learner.groups(), [work], checkpoint, how, updates, progress, "training the model", curve.after)
    made = {**(made_by or {}), "model": {"options": asdict(options) | {"steps": steps}, "teacher": backbone.spec.fingerprint}}
    return _finish(model, learner, held, out, keep, categories or Categories(), made, progress)


def general_text(engine: Model, work: Path, tokens: int = 50_000, progress: Progress = no_progress) -> list[KnownText]:
    """What keeps a model as it was: so many tokens of its own talk, about built-in prompts and those that it writes itself, and
    the built-in prompts as plain text."""
    raw = engine.tokenizer is None or not engine.tokenizer.has_chat_template
    items = [item.prompt for item in read_prompts("train")]
    prompts = [engine.encode(prompt, raw=raw) for prompt in items]
    options = GenerateOptions(tokens=tokens, max_new_tokens=160, own_prompts=share_of_own(engine), held_share=0.0)
    talk = texts_in(generate_dataset([engine], prompts, work, options, progress)[0])
    ids = engine.encode("\n\n".join(items), raw=True)
    return [*talk, *(KnownText(ids[at : at + TEXT_WINDOW]) for at in range(0, len(ids), TEXT_WINDOW))]


def _shards(
    backbone: Backbone, work: Path, texts: Mapping[str, Sequence[KnownText]], progress: Progress
) -> dict[str, list[Path]]:
    """The teacher's states of all texts."""
    found = {}
    for name, given in texts.items():
        if not given:
            raise UsageError(f"there are 0 texts of {name} to train on or to test with; give more prompts.")
        found[name] = write_forced_shards(backbone, given, work / name, progress=progress, what=f"reading {name}")
    return found


def _adapter(depth: int, teacher: Teacher, options: ModelOptions, dice: torch.Generator, begin: Heads | None) -> Adapter:
    """A fresh one, or that of the model as it is at the nearest depth."""
    if begin is None:
        return fresh_adapter(teacher.readout, options.rank, dice)
    known = begin.adapters[min(begin.adapters, key=lambda other: abs(other - depth))]
    return Adapter(**{name: tensor.float().clone() for name, tensor in known.tensors().items()})


def _teacher(backbone: Backbone, ids_S: Tensor) -> Teacher:
    readout = backbone.readout().tensors()
    plain = Teacher(readout, shortlist(readout, ids_S))
    some = torch.randn(8, backbone.spec.width, generator=torch.Generator().manual_seed(0)) * 10
    return plain.fitted(some, backbone.logits(some)[:, ids_S])


def _steps(learner: Learner, texts: Mapping[str, Sequence[_Text]], note: Path) -> int:
    """How many steps; what one takes is measured once, and noted for a run that resumes or is given more minutes."""
    options = learner.options
    if options.steps is None and not note.exists():
        some = learner.updates(texts["answers"], texts["general"], torch.Generator().manual_seed(0))[:3]
        learner.groups()
        times = []
        for update in some:
            begun = time.perf_counter()
            for loss_of in update:
                loss_of().backward()
            times.append(time.perf_counter() - begun)
        write_json(note, SPARE_SECONDS * sorted(times)[1])
    return options.steps or max(SPAN, int(options.minutes * 60 / read_json_as(note, StepSeconds, "note of a step's seconds")))


class Point(TypedDict):
    """Of the curve: ``minutes`` of training, and what ``Learner.judge`` found."""

    steps: int
    minutes: float
    exits: dict[str, dict[str, float]]
    full: float
    perplexity: float | None


class _Curve:
    """Measured points as training goes on, in a file; each once, so a resumed run adds what is missing."""

    def __init__(
        self, path: Path, learner: Learner, held: Sequence[_Text], windows: Sequence[Sequence[int]], spans: int, fresh: bool
    ) -> None:
        self.path, self.learner, self.held, self.windows, self.spans = path, learner, held, windows, spans
        self.points: list[dict[str, Any]] = []
        if not fresh and path.exists():
            self.points = [dict(point) for point in read_json_as(path, list[Point], "curve")]
        self.minutes = self.points[-1]["minutes"] if self.points else 0.0
        self.begun: float | None = None

    def after(self, done: int) -> None:
        """A point where so many minutes went by, at the begin and at the end; what measuring takes is not counted."""
        now, since = time.monotonic(), 0.0
        if self.begun is not None:
            since = (now - self.begun) / 60
        every = self.learner.options.every
        due = done in (0, self.spans) or (every > 0 and since >= every)
        if due and (not self.points or self.points[-1]["steps"] < done * SPAN):
            self.minutes += since
            point = {"steps": done * SPAN, "minutes": round(self.minutes, 2)}
            self.points.append(point | self.learner.judge(self.held, self.windows))
            write_json(self.path, self.points)
            self.begun = None
        if self.begun is None:
            self.begun = time.monotonic()


def _finish(
    model: Model,
    learner: Learner,
    held: Sequence[KnownText],
    out: Path,
    keep: Exits | None,
    categories: Categories,
    made_by: Mapping[str, Any],
    progress: Progress,
) -> Exits:
    """Save the checkpoint, and its exits with thresholds and figures from held-out answers."""
    trained = learner.model.requires_grad_(False)
    fresh = out / "work" / "saving"  # one place, so that a killed run leaves no heap of them
    with quiet_transformers():
        trained.save_pretrained(fresh)
        if model.tokenizer is not None:
            model.tokenizer.hf.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.replace(out / path.name)
    backbone = HfBackbone(trained, str(out))
    teacher = _teacher(backbone, learner.teacher.among.ids_S)
    adapters = {d: Adapter(**{n: t.detach() for n, t in a.tensors().items()}) for d, a in learner.adapters.items()}
    shards = write_forced_shards(backbone, held, out / "work" / "held-after", learner.depths, progress, "reading held after")
    reports, trigger, totals = judge_heads(backbone, teacher, adapters, shards, categories, progress)
    exits = Exits.of(
        backbone.spec,
        learner.depths,
        trigger,
        heads=Heads(teacher.among.ids_S, adapters),
        report=report_json(reports, totals, answer_tokens(held)) | drafter_report(keep),
        made_by=made_by,
        drafter=None if keep is None else keep.drafter,
        answers=None if keep is None else keep.answers,
        habits=None if keep is None else keep.habits,
    )
    exits.save(out)
    return exits


def drafter_report(keep: Exits | None) -> dict[str, Any]:
    """What was measured of the drafter that goes along."""
    return {} if keep is None or "drafter" not in keep.report else {"drafter": keep.report["drafter"]}
