"""What every exit shows of known texts: all signals, and whether the exit's token was full depth's; and what asking costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.exits.signals import SIGNALS, Asked, Measured, Prediction, lumped_entropy
from adi.measure.forced_pass import Text, forced_pass
from adi.measure.trigger_study.confidence import Heated, heated
from adi.measure.trigger_study.cost import seconds
from adi.model.backbone import Rows, States
from adi.model.load import Model

REPEATS = 15


@dataclass(frozen=True)
class ExitTable:
    """N rows at one depth: signals ``[N]`` by name, whether the exit was right, whether the row belongs to a text that
    calibrates (the others test), the entropy with the tail as one token, and the head at other temperatures."""

    signals: dict[str, Tensor]
    right_N: Tensor
    calibrates_N: Tensor
    lumped_N: Tensor
    heat: Heated


def gather(
    model: Model,
    exits: Exits,
    texts: Sequence[Text],
    calibrates: Sequence[bool],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, ExitTable]:
    """Readings by depth, the texts' rows in order; ``calibrates`` says of each text what it is for."""
    read = exits.reader(model.backbone)
    parts: dict[int, list[ExitTable]] = {depth: [] for depth in exits.depths}
    for i, text in enumerate(texts):
        seen = forced_pass(model, text, exits.depths)
        for depth, states in seen.at.items():
            said = read(depth, states.hidden_TD)
            best_N = said.log_probs_TS.argmax(-1)
            right_N = ((best_N if said.ids_S is None else said.ids_S[best_N]) == seen.token_N).cpu()
            signals = {n: v.float().cpu() for n, v in signals_of(said, states, exits.probe, depth).items()}
            lumped_N = lumped_entropy(said).float().cpu()
            marks_N = torch.full_like(right_N, calibrates[i])
            parts[depth].append(ExitTable(signals, right_N, marks_N, lumped_N, heated(said, seen.token_N)))
        progress(i + 1, len(texts))
    return {depth: _joined(rows) for depth, rows in parts.items()}


def _joined(parts: Sequence[ExitTable]) -> ExitTable:
    signals = {name: torch.cat([part.signals[name] for part in parts]) for name in parts[0].signals}
    heat = Heated(*(torch.cat([getattr(part.heat, name) for part in parts], 1) for name in ("surprise_GN", "top_GN")))
    rows = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("right_N", "calibrates_N", "lumped_N")}
    return ExitTable(signals, heat=heat, **rows)


def signals_of(said: Prediction | Measured, states: States, probe: Asked | None = None, depth: int = 0) -> dict[str, Tensor]:
    """Every signal at every row, ``[T]`` each; those of an MLP or a probe only where there is one."""
    values = {}
    for name, signal in SIGNALS.items():
        if signal.reads == "head":
            values[name] = signal.measure(said)
        elif signal.reads == "states":
            values[name] = signal.measure(states.before_TD, states.hidden_TD)
        elif signal.reads == "mlp" and states.mlp_TF is not None:
            values[name] = signal.measure(states.mlp_TF)
        elif signal.reads == "probe" and probe is not None:
            values[name] = signal.measure(probe, depth, states.hidden_TD, lambda: said)
    return values


def reads_head(name: str) -> bool:
    """Whether a signal cannot be had without the exit's head."""
    return SIGNALS[name].reads == "head" or name == "joint_probe"


def asking_seconds(model: Model, exits: Exits, text: Text) -> dict[int, dict[str, float]]:
    """Seconds to ask each signal about one row, by depth, the head included where it is read; "head" is the head alone."""
    seen, read = forced_pass(model, text, exits.depths), exits.reader(model.backbone)
    return {depth: _asking(exits, read, depth, states) for depth, states in seen.at.items()}


def _asking(exits: Exits, read: Callable[[int, Tensor], Prediction | Measured], depth: int, states: States) -> dict[str, float]:
    one = slice(0, 1)
    row = States(states.hidden_TD[one], states.before_TD[one], None if states.mlp_TF is None else states.mlp_TF[one])
    said = read(depth, row.hidden_TD)
    costs = {"head": seconds(lambda: read(depth, row.hidden_TD), REPEATS)}
    for name in signals_of(said, row, exits.probe, depth):
        signal = SIGNALS[name]
        given: dict[str, tuple[object, ...]] = {
            "head": (said,),
            "states": (row.before_TD, row.hidden_TD),
            "mlp": (row.mlp_TF,),
            "probe": (exits.probe, depth, row.hidden_TD, lambda: said),
        }
        alone = seconds(functools.partial(signal.measure, *given[signal.reads]), REPEATS)
        costs[name] = alone + (costs["head"] if reads_head(name) else 0.0)
    return costs


def block_seconds(model: Model, depth: int) -> float:
    """One block, for one row: the first ``depth`` of them over their number."""
    backbone, cache = model.backbone, model.backbone.new_cache()
    backbone.forward([Rows(cache, 0, tuple(i % backbone.spec.vocabulary for i in range(64)), None)], 0, depth)
    found = seconds(lambda: backbone.forward([Rows(cache, 64, (0,), None)], 0, depth), 9) / depth
    if (close := getattr(cache, "close", None)) is not None:
        close()
    return found
