"""``tune``: from a model and prompts to exits, in four stages that each resume: answers, features, heads, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adi.exits.artifact import Exits
from adi.exits.heads import Heads, shortlist
from adi.files import write_json
from adi.model.checkpoint import Model
from adi.training.answers import Answer, collect, interleave, is_held_out
from adi.training.features import choose_shortlist, write_shards
from adi.training.fit import FitOptions, fit
from adi.training.report import evaluate, report_json

TEXT_WINDOW = 256
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class TuneOptions:
    """How exits are made. ``depths`` None spreads seven over the model, denser towards its end.

    ``tokens`` counts answer tokens (the model's own) to train on; ``shortlist`` tokens that a head can name; ``rank`` of
    the adapters.
    """

    depths: tuple[int, ...] | None = None
    tokens: int = 100_000
    max_new_tokens: int = 160
    shortlist: int = 4096
    rank: int = 128
    epochs: int = 3
    learning_rate: float = 3e-3
    seed: int = 0


def tune(
    model: Model,
    out: Path,
    prompts: Sequence[Sequence[str]],
    options: TuneOptions,
    *,
    texts: Sequence[Path] = (),
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
        made_by: noted in the exits: the command and the data.
        progress: is told ``(stage, done, total, note)``.

    Raises:
        ValueError: options that do not fit the model, unreadable files, a head that adapters cannot start from.
    """
    backbone, work = model.backbone, out / "work"
    depths = _depths(options.depths, backbone.spec.layers)
    readout = backbone.readout()
    work.mkdir(parents=True, exist_ok=True)
    _start_fresh_if_changed(work, model, options)
    answers = _answers(model, work, prompts, texts, options, progress)
    train, held = [a for a in answers if not a.held_out], [a for a in answers if a.held_out]
    if not train or not held:
        raise ValueError(f"{len(train)} training and {len(held)} held-out sequences are too few; give more prompts or text.")
    ids_S = choose_shortlist(train, backbone.spec.vocabulary, options.shortlist)
    shards = write_shards(backbone, train, depths, ids_S, work / "features", lambda d, t: progress("features", d, t, ""))
    checks = write_shards(backbone, held, depths, ids_S, work / "held-out", lambda d, t: progress("held-out", d, t, ""))
    among = shortlist(readout, ids_S)
    fitting = FitOptions(epochs=options.epochs, learning_rate=options.learning_rate, rank=options.rank, seed=options.seed)
    note = lambda done, total, losses: progress("heads", done, total, _losses(losses))  # noqa: E731
    adapters = fit(readout, among, depths, shards, work / "checkpoint.pt", fitting, note)
    progress("report", 0, 1, "")
    reports, trigger, totals = evaluate(backbone, adapters, among, checks)
    progress("report", 1, 1, "")
    spec = backbone.spec
    exits = Exits(
        base=spec.fingerprint,
        base_name=spec.name,
        layers=spec.layers,
        width=spec.width,
        vocabulary=spec.vocabulary,
        depths=depths,
        trigger=trigger,
        heads=Heads(ids_S, adapters),
        report=report_json(reports, totals, sum(a.tokens for a in train)),
        made_by={**(made_by or {}), "options": asdict(options), "answers": _answers_hash(answers)},
    )
    exits.save(out)
    return exits


def _answers(
    model: Model,
    work: Path,
    prompts: Sequence[Sequence[str]],
    texts: Sequence[Path],
    options: TuneOptions,
    progress: Progress,
) -> list[Answer]:
    hf = getattr(model.backbone, "model", None)
    if hf is None:
        raise ValueError("tuning runs on the transformers engine; load the model with backend='hf'.")
    raw = model.tokenizer is None or not model.tokenizer.has_chat_template
    answers: list[Answer] = []
    if prompts:
        answers = collect(
            hf,
            lambda text: list(model.encode(text, raw=raw)),
            model.eos_ids,
            interleave(prompts),
            work / "answers.jsonl",
            tokens=options.tokens,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            progress=lambda done, total: progress("answers", min(done, total), total, ""),
        )
    return answers + [window for path in texts for window in _windows(model, path)]


def _windows(model: Model, path: Path) -> list[Answer]:
    """A text file cut into sequences; every token after a window's first is one to learn from."""
    if model.tokenizer is None:
        raise ValueError("text files need a tokenizer; load the model with one.")
    try:
        ids = model.tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the text {path}: {error}") from None
    names = [(f"{path.name}:{at}", ids[at : at + TEXT_WINDOW]) for at in range(0, len(ids), TEXT_WINDOW)]
    return [Answer(name, tuple(part), 1, True, is_held_out(name)) for name, part in names if len(part) > 1]


def _depths(chosen: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    if chosen is None:
        shares = (0.27, 0.4, 0.53, 0.67, 0.8, 0.87, 0.93)
        return tuple(sorted({min(max(1, round(share * layers)), layers - 1) for share in shares}))
    if not chosen or any(not 0 < d < layers for d in chosen) or len(set(chosen)) != len(chosen):
        raise ValueError(f"depths {chosen} are not possible: the model has {layers} layers, so choose among 1..{layers - 1}.")
    return tuple(sorted(chosen))


def _start_fresh_if_changed(work: Path, model: Model, options: TuneOptions) -> None:
    """A checkpoint only goes on under the options it was begun with; answers and features outlive a change."""
    key = json.loads(json.dumps([model.backbone.spec.fingerprint, asdict(options)]))
    note = work / "options.json"
    if note.exists() and json.loads(note.read_text()) != key:
        (work / "checkpoint.pt").unlink(missing_ok=True)
    write_json(note, key)


def _losses(losses: Mapping[int, float]) -> str:
    return "KL " + " ".join(f"{depth}:{loss:.2f}" for depth, loss in losses.items())


def _answers_hash(answers: Sequence[Answer]) -> str:
    return hashlib.blake2b(repr([a.ids for a in answers]).encode(), digest_size=8).hexdigest()
