"""``audit``: loads a model at each precision, checks it, joins the report."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adi.arguments import whole
from adi.artifact import Exits, bare_exits, load_exits, shipped_for
from adi.decoding.teacher_forcing import encoded
from adi.errors import UsageError
from adi.measure.audit.check import Size, check
from adi.measure.bench.systems import backend_for
from adi.measure.pages import render
from adi.measure.provenance import provenance
from adi.model.hub import Notice
from adi.model.load import Model, check_engine, load
from adi.prompts import read_prompts, spread

FORMAT, VERSION = "adi-audit", 2
RANDOM_IDS = 24  # of a prompt where no tokenizer could read a text
BARE = (0.5, 0.75)  # shares of the depth at which exits are put where a model has none
Given = Exits | str | os.PathLike[str] | Callable[[Model], Exits] | None


def audit(
    source: Any = "smollm2-135m",
    exits: Given = None,
    *,
    precisions: Sequence[str] = ("auto",),
    backend: str = "auto",
    device: str = "auto",
    prompts: Sequence[Any] | None = None,
    limit: int = 4,
    max_new_tokens: int = 48,
    draws: int = 400,
    seed: int = 0,
    command: str = "",
    notice: Notice = lambda _: None,
) -> dict[str, Any]:
    """Check on this machine that verified decoding changes nothing; the report, whose ``passed`` says whether it held.

    (a) Replay: states, KV memory and logits of a drafted and rolled-back run against one full pass. (b) Greedy: verified texts
    against full depth's, ties told apart. (c) Sampling: draws over a restricted vocabulary against their exact law. (d) Faults:
    wrong drafts, rollbacks to every length, interruptions, then the same text. docs/exactness.md says what each would catch.

    Args:
        source: as for ``load``, once for each of ``precisions``; or a ``Model``, checked as it is.
        exits: trained exits or their folder, or a function of the model; None takes those shipped for it, else bare ones.
        prompts: texts or token ids; by default ``limit`` bench prompts, random ids without a tokenizer; cut to the context.
        max_new_tokens, draws: how long the texts are, and how many draws each way of drafting makes.

    Raises:
        AdiError: for options that are out of range, and whatever ``load`` and ``load_exits`` raise.
    """
    limit, max_new_tokens = whole("limit", limit, 1), whole("max_new_tokens", max_new_tokens, 1)
    _check_precisions(backend, precisions)
    exits = load_exits(exits) if isinstance(exits, (str, os.PathLike)) else exits  # judged before a model is read
    items = spread(read_prompts("bench"), limit) if prompts is None else []
    chosen: list[Any] = [item.prompt for item in items] if prompts is None else list(prompts)[:limit]
    if not chosen:
        raise UsageError(f"prompts is {prompts!r:.40}; give at least one.")
    size, engines = Size(max_new_tokens, whole("draws", draws, 1), seed), []
    for precision in precisions if not isinstance(source, Model) else ("auto",):
        model = source if isinstance(source, Model) else _loaded(source, backend, precision, device, notice)
        found = _exits(model, exits)
        found.check(model.backbone)
        if prompts is None and model.tokenizer is None:
            items, chosen = [], _random_ids(model.backbone.spec.vocabulary, limit, seed)
        engines.append(check(model, found, _encoded(model, chosen, max_new_tokens), size, notice))
        name, base = model.backbone.spec.name, found.base_name
        del model, found
        gc.collect()
    violations = [violation for engine in engines for violation in engine["violations"]]
    return {
        "format": FORMAT,
        "version": VERSION,
        **provenance(command, items),
        "model": name,
        "exits": base,
        **asdict(size),
        "passed": not violations,
        "violations": violations,
        "engines": engines,
    }


def _check_precisions(backend: str, precisions: Sequence[str]) -> None:
    """UsageError for one that there is not, before the first is loaded."""
    if isinstance(precisions, str) or not precisions:
        raise UsageError(f"precisions is {precisions!r}; give a list of at least one, such as ['fp32'].")
    for precision in precisions:
        check_engine(backend_for(backend, precision), precision)


def audit_page(report: Mapping[str, Any]) -> str:
    """The page of an audit's report as HTML text."""
    verdict = "passed" if report["passed"] else f"{len(report['violations'])} violations"
    return render("audit.html", title=f"Audit of {report['model']}: {verdict}", report=report)


def _loaded(source: Any, backend: str, precision: str, device: str, notice: Notice) -> Model:
    return load(source, backend=backend_for(backend, precision), precision=precision, device=device, notice=notice)


def _exits(model: Model, given: Given) -> Exits:
    if isinstance(given, Exits):
        return given
    if callable(given):
        return given(model)
    if given is not None:
        return load_exits(given)
    if (found := shipped_for(model.backbone.spec.fingerprint)) is not None:
        return found
    layers, looped = model.backbone.spec.layers, model.backbone.spec.loop is not None
    if layers < 2:
        raise UsageError(f"{model.source} has one block and nowhere to stop early, so there is nothing to audit.")
    return bare_exits(model, None if looped else sorted({min(max(1, round(layers * share)), layers - 1) for share in BARE}))


def _random_ids(vocabulary: int, count: int, seed: int) -> list[tuple[int, ...]]:
    dice = random.Random(seed)
    return [tuple(dice.randrange(vocabulary) for _ in range(RANDOM_IDS)) for _ in range(count)]


def _encoded(model: Model, prompts: Sequence[Any], new: int) -> list[tuple[int, ...]]:
    """Token ids, cut to what the context leaves beside ``new`` tokens."""
    context = model.backbone.spec.context
    room = None if context is None else max(1, context - new)
    return [ids[:room] for ids in encoded(model, prompts)]
