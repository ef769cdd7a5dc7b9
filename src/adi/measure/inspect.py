"""``inspect``: what adaptive depth could give on this model and machine, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adi.artifact import require_model
from adi.decoding.teacher_forcing import KnownText, forced_pass, full_tokens, own_answers
from adi.errors import UsageError
from adi.measure.trigger_study.pass_seconds import PassSeconds, measure_passes
from adi.model.backbone import Spec
from adi.model.load import Model
from adi.progress import Progress, no_progress

COPY_ROWS = (1, 3, 8)
COPY_REPEATS = 15
ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)
LONGEST_DRAFT = 8
SHORTLIST_COST = 0.1  # of the model's own head


@dataclass(frozen=True)
class Ceiling:
    """The best speed-up that drafting at ``depth`` with ``acceptance`` can give, and the draft length that gives it."""

    depth: int
    acceptance: float
    draft_tokens: int
    speedup: float


@dataclass(frozen=True)
class Headroom:
    """``agreement`` maps depths to the share of tokens where the model's own final head, put there untrained, predicts the
    full model's greedy token."""

    spec: Spec
    cost: PassSeconds
    agreement: dict[int, float]
    tokens: int
    ceilings: tuple[Ceiling, ...]
    advice: str
    copies: CopiesGain | None = None


@dataclass(frozen=True)
class CopiesGain:
    """Copies of the weights for fixed numbers of rows on the compiled engine: megabytes of each and allowed for all, the
    numbers of rows that have one, and for ``COPY_ROWS`` how many times as fast passes in turn are with them."""

    copy_mb: int
    memory_mb: int
    rows: tuple[int, ...]
    gains: tuple[float, ...]


def speedup(acceptance: float, draft_tokens: int, draft_cost: float, verify_cost: float) -> float:
    """Expected tokens per unit of cost, full depth's token costing one: (1 - a^(k+1)) / (1 - a) / (k c + v).

    Leviathan et al. 2023, theorem 3.8, with a verification that costs ``verify_cost`` full passes.
    """
    a, k = acceptance, draft_tokens
    tokens = k + 1.0 if a >= 1 else (1 - a ** (k + 1)) / (1 - a)
    return tokens / (k * draft_cost + verify_cost)


def ceiling(passes: PassSeconds, depth: int, acceptance: float) -> Ceiling:
    """The best draft length at this depth and acceptance, from measured passes.

    A draft runs ``depth`` blocks on one row and a head of a tenth of the model's own (a shortlist); verification runs
    the missing blocks on k + 1 rows and the head on all of them, and the last row's first blocks.
    """
    full, shallow = passes.full(), passes.through(depth, 1)
    draft = (shallow + SHORTLIST_COST * passes.head(1)) / full
    options = []
    for k in range(1, LONGEST_DRAFT + 1):
        verify = (shallow + passes.through(passes.layers - depth, k + 1) + passes.head(k + 1)) / full
        options.append(Ceiling(depth, acceptance, k, speedup(acceptance, k, draft, verify)))
    return max(options, key=lambda c: c.speedup)


def inspect(model: Model, prompts: Sequence[str], *, max_new_tokens: int = 64, progress: Progress = no_progress) -> Headroom:
    """Measure passes on this machine, and the bare head's agreement at every depth on the model's own answers.

    AdiError for a model of one block.
    """
    require_model(model)
    backbone, spec = model.backbone, model.backbone.spec
    depths = _spread(spec.layers)
    if not depths:
        raise UsageError(f"{spec.name} has one block: there is no depth to stop at.")
    progress(0, len(prompts), "answers")
    texts = [KnownText.of_answer(a.prompt_ids, a.token_ids) for a in own_answers(model, prompts, max_new_tokens)]
    right, tokens = dict.fromkeys(depths, 0), 0
    for i, seen in enumerate(forced_pass(backbone, texts, depths)):
        token_N = full_tokens(backbone, seen.deep_ND)
        tokens += len(token_N)
        for depth in depths:
            right[depth] += int((full_tokens(backbone, seen.hidden[depth]) == token_N).sum())
        progress(i + 1, len(prompts), "answers")
    passes = measure_passes(backbone)
    agreement = {depth: right[depth] / tokens for depth in depths}
    grid = tuple(ceiling(passes, d, a) for d in _few(depths) for a in ACCEPTANCES)
    return Headroom(spec, passes, agreement, tokens, grid, _advice(passes, agreement), _copies_gain(backbone))


def _copies_gain(backbone: Any) -> CopiesGain | None:
    """None on an engine that makes none."""
    if not hasattr(backbone, "copies"):
        return None
    backbone.prepare((), drafts=True, wait=True)
    with_copies = measure_passes(backbone, COPY_ROWS, COPY_REPEATS)
    with backbone.without_copies():
        without = measure_passes(backbone, COPY_ROWS, COPY_REPEATS)
    copies = backbone.copies
    gains = tuple(b / a for a, b in zip(with_copies.blocks_seconds, without.blocks_seconds, strict=True))
    return CopiesGain(copies.copy_bytes // 10**6, copies.memory_bytes // 10**6, copies.rows, gains)


def _advice(passes: PassSeconds, agreement: dict[int, float]) -> str:
    """What the figures mean, in plain sentences."""
    layers = passes.layers
    bare = max((ceiling(passes, d, min(a, 0.99)) for d, a in agreement.items()), key=lambda c: c.speedup)
    third = ceiling(passes, max(1, layers // 3), 0.7)
    head = passes.head_seconds[0] / passes.block_seconds[0]
    verdict = ", not worth drafting with" if bare.speedup < 1.05 else ""
    return (
        f"Untrained, the best exit is depth {bare.depth}, which predicts the full model's token {agreement[bare.depth]:.0%} of "
        f"the time: at best {bare.speedup:.2f} x{verdict}. Trained exits that agree 70% of the time after {third.depth} of "
        f"{layers} blocks could reach {third.speedup:.2f} x with drafts of {third.draft_tokens}, but on a frozen model no "
        "exit trigger that was measured has paid. What pays is drafts from n-grams of the text, which need no training, and a "
        f"trained drafter (adi tune). The model's own head costs as much as {head:.1f} blocks; a drafter needs a lighter one."
    )


def _spread(layers: int) -> tuple[int, ...]:
    """At most 15 depths, even, the last block but one among them."""
    step = max(1, layers // 15)
    return tuple(range(layers - step, 0, -step))[::-1] if layers > 1 else ()


def _few(depths: Sequence[int]) -> list[int]:
    return sorted({depths[round(i * (len(depths) - 1) / 4)] for i in range(5)})
