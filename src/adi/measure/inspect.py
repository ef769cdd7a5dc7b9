"""``inspect``: what adaptive depth could give on this model and machine, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adi.errors import AdiError
from adi.measure.forced_pass import answer, forced_pass
from adi.measure.trigger_study.cost import Cost, measure_cost
from adi.model.backbone import Spec
from adi.model.load import Model

ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)
LONGEST_DRAFT = 8


@dataclass(frozen=True)
class Ceiling:
    """The best speed-up that drafting at ``depth`` with ``acceptance`` can give, and the draft length that gives it."""

    depth: int
    acceptance: float
    draft_tokens: int
    speedup: float


@dataclass(frozen=True)
class Headroom:
    """``agreement`` maps depths to the share of tokens where the model's own final head, put there untrained, says the
    full model's greedy token."""

    spec: Spec
    cost: Cost
    agreement: dict[int, float]
    tokens: int
    ceilings: tuple[Ceiling, ...]
    advice: str


def speedup(acceptance: float, draft_tokens: int, draft_cost: float, verify_cost: float) -> float:
    """Expected tokens per unit of cost, full depth's token costing one: (1 - a^(k+1)) / (1 - a) / (k c + v).

    Leviathan et al. 2023, theorem 3.8, with a verification that costs ``verify_cost`` full passes.
    """
    a, k = acceptance, draft_tokens
    tokens = k + 1.0 if a >= 1 else (1 - a ** (k + 1)) / (1 - a)
    return tokens / (k * draft_cost + verify_cost)


def ceiling(cost: Cost, layers: int, depth: int, acceptance: float) -> Ceiling:
    """The best draft length at this depth and acceptance, from measured costs.

    A draft runs ``depth`` blocks on one row and a head of a tenth of the model's own (a shortlist); verification runs
    the missing blocks on k + 1 rows and the head on all of them, and the first row's first blocks.
    """
    full, share = cost.full_seconds, depth / layers
    draft = (share * cost.blocks_seconds[0] + 0.1 * cost.head_seconds[0]) / full
    options = []
    for k in range(1, LONGEST_DRAFT + 1):
        rest = (1 - share) * _at(cost.rows, cost.blocks_seconds, k + 1) + _at(cost.rows, cost.head_seconds, k + 1)
        verify = (rest + share * cost.blocks_seconds[0]) / full
        options.append(Ceiling(depth, acceptance, k, speedup(acceptance, k, draft, verify)))
    return max(options, key=lambda c: c.speedup)


def inspect(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Headroom:
    """Measure costs on this machine, and the bare head's agreement at every depth on the model's own answers."""
    spec = model.backbone.spec
    depths = _spread(spec.layers)
    if not depths:
        raise AdiError(f"{spec.name} has one block: there is no depth to stop at.")
    right: dict[int, int] = dict.fromkeys(depths, 0)
    tokens = 0
    for i, prompt in enumerate(prompts):
        text = answer(model, prompt, max_new_tokens)
        seen = forced_pass(model, text, depths)
        for depth, states in seen.at.items():
            right[depth] += int((model.backbone.logits(states.hidden_TD).argmax(-1) == seen.token_N).sum())
        tokens += len(seen.token_N)
        progress(i + 1, len(prompts))
    cost = measure_cost(model.backbone)
    agreement = {depth: right[depth] / tokens for depth in depths}
    grid = tuple(ceiling(cost, spec.layers, d, a) for d in _few(depths) for a in ACCEPTANCES)
    return Headroom(spec, cost, agreement, tokens, grid, _advice(spec, cost, agreement))


def _advice(spec: Spec, cost: Cost, agreement: dict[int, float]) -> str:
    """A plain sentence from the figures."""
    bare = max((ceiling(cost, spec.layers, d, min(a, 0.99)) for d, a in agreement.items()), key=lambda c: c.speedup)
    middle = ceiling(cost, spec.layers, max(1, spec.layers // 3), 0.7)
    untrained = (
        f"Untrained, the best exit is depth {bare.depth}, which says the full model's token {agreement[bare.depth]:.0%} of the "
        f"time: at best {bare.speedup:.2f} x"
    )
    verdict = ", not worth drafting with" if bare.speedup < 1.05 else ""
    trained = (
        f"Exits that agree 70% of the time after {middle.depth} of {spec.layers} blocks could reach {middle.speedup:.2f} x "
        f"with drafts of {middle.draft_tokens}."
    )
    head = cost.head_seconds[0] / cost.block_seconds[0]
    light = f"The model's own head costs as much as {head:.1f} blocks, so exits need lighter ones."
    return f"{untrained}{verdict}. {trained} {light}"


def _at(rows: Sequence[int], values: Sequence[float], count: int) -> float:
    """The measured value at ``count`` rows, on the line between its neighbours (and past the last along the last slope)."""
    for (r0, v0), (r1, v1) in zip(zip(rows, values, strict=True), list(zip(rows, values, strict=True))[1:], strict=False):
        if count <= r1 or r1 == rows[-1]:
            return v0 + (v1 - v0) * (count - r0) / (r1 - r0)
    return values[0]


def _spread(layers: int) -> tuple[int, ...]:
    """At most 15 depths, even, the last block but one among them."""
    step = max(1, layers // 15)
    return tuple(range(layers - step, 0, -step))[::-1] if layers > 1 else ()


def _few(depths: Sequence[int]) -> list[int]:
    return sorted({depths[round(i * (len(depths) - 1) / 4)] for i in range(5)}) if depths else []
