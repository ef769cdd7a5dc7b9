"""What every exit shows of known texts: all signals, and whether its token was full depth's; and what each signal costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.decoding.teacher_forcing import ForcedPass, KnownText, forced_pass, full_tokens
from adi.exits.probe import Probe, networks_of
from adi.exits.signals import SIGNALS, Prediction, lumped_entropy
from adi.measure.trigger_study.pass_seconds import median_seconds
from adi.model.load import Model
from adi.progress import Progress, no_progress

REPEATS = 15
TEMPERATURES = tuple(round(2 ** (step / 4), 4) for step in range(-5, 6))  # 0.42 to 2.4, a fifth apart
CHUNK = 256


@dataclass(frozen=True)
class ExitTable:
    """N rows at one depth.

    ``signals`` by name, ``[N]``; whether the exit's token was full depth's; whether the row belongs to a text that
    calibrates (the others test); the entropy with the tail as one token; and the head at each of ``TEMPERATURES``, ``[N, G]``:
    its surprise in nats at full depth's token, and the probability of the exit's own token.
    """

    signals: dict[str, Tensor]
    right_N: Tensor
    calibrates_N: Tensor
    lumped_N: Tensor
    surprise_NG: Tensor
    top_NG: Tensor

    @classmethod
    def joined(cls, parts: Sequence[ExitTable]) -> ExitTable:
        """The rows of all parts, in order."""
        signals = {name: torch.cat([part.signals[name] for part in parts]) for name in parts[0].signals}
        columns = [column.name for column in fields(cls) if column.name != "signals"]
        return cls(signals, **{name: torch.cat([getattr(part, name) for part in parts]) for name in columns})


def exit_tables(
    model: Model, exits: Exits, texts: Sequence[KnownText], calibrates: Sequence[bool], progress: Progress = no_progress
) -> dict[int, ExitTable]:
    """A table for each depth, the texts' rows in order; ``calibrates`` holds for each text what it is for."""
    read, parts = exits.reader(model.backbone), {depth: list[ExitTable]() for depth in exits.depths}
    for i, seen in enumerate(forced_pass(model.backbone, texts, exits.depths, details=True)):
        full_N = full_tokens(model.backbone, seen.deep_ND)
        for depth in exits.depths:
            head = read(depth, seen.hidden[depth])
            signals = {n: v.float().cpu() for n, v in signals_of(head, seen, depth, exits.probe).items()}
            right_N = head.tokens_T.cpu() == full_N
            marks_N, lumped_N = torch.full_like(right_N, calibrates[i]), lumped_entropy(head).float().cpu()
            parts[depth].append(ExitTable(signals, right_N, marks_N, lumped_N, *at_temperatures(head, full_N)))
        progress(i + 1, len(texts), "reading answers at every exit")
    return {depth: ExitTable.joined(rows) for depth, rows in parts.items()}


def signals_of(head: Prediction, seen: ForcedPass, depth: int, probe: Probe | None = None) -> dict[str, Tensor]:
    """Every signal at every row, ``[N]`` each; those of an MLP or a probe only where there is one."""
    given = _inputs(head, seen, depth, probe)
    return {name: signal.measure(*given[signal.reads]) for name, signal in SIGNALS.items() if signal.reads in given}


def _inputs(head: Prediction, seen: ForcedPass, depth: int, probe: Probe | None) -> dict[str, tuple[Any, ...]]:
    """What signals of each kind are measured on."""
    hidden_ND = seen.hidden[depth]
    given: dict[str, tuple[Any, ...]] = {"head": (head,), "states": (seen.before[depth], hidden_ND)}
    if depth in seen.mlp:
        given["mlp"] = (seen.mlp[depth],)
    return given | dict.fromkeys(networks_of(probe), (probe, depth, hidden_ND, lambda: head))


def reads_head(name: str) -> bool:
    """Whether a signal cannot be had without the exit's head."""
    return SIGNALS[name].reads == "head" or name == "joint_probe"


def signal_seconds(model: Model, exits: Exits, text: KnownText) -> dict[int, dict[str, float]]:
    """Seconds to measure each signal of one row, by depth, the head included where it is read; "head" is the head alone."""
    row = replace(text, ids=text.ids[: text.first + 1])
    (seen,) = forced_pass(model.backbone, [row], exits.depths, details=True)
    return {depth: _signal_seconds(model, exits, seen, depth) for depth in exits.depths}


def _signal_seconds(model: Model, exits: Exits, seen: ForcedPass, depth: int) -> dict[str, float]:
    read = functools.partial(exits.reader(model.backbone), depth, seen.hidden[depth])
    given = _inputs(read(), seen, depth, exits.probe)
    names = [name for name, signal in SIGNALS.items() if signal.reads in given]
    work = [functools.partial(SIGNALS[name].measure, *given[SIGNALS[name].reads]) for name in names]
    head, *alone = median_seconds([read, *work], REPEATS)
    return {"head": head} | {name: seconds + head * reads_head(name) for name, seconds in zip(names, alone, strict=True)}


def at_temperatures(head: Prediction, token_N: Tensor) -> tuple[Tensor, Tensor]:
    """``surprise_NG`` and ``top_NG`` of ``softmax(log p / T)`` over shortlist and tail (temperature scaling, Guo et al. 2017).

    What is not in the shortlist is the tail, one class.
    """
    logs_NS = head.log_probs_TS.float().cpu()
    tail_N = head.tail_T
    logs_NC = logs_NS if tail_N is None else torch.cat([logs_NS, tail_N.float().cpu()[:, None]], 1)
    place_N = token_N
    if head.ids_S is not None:
        ids_S = head.ids_S.cpu()
        found_N = torch.searchsorted(ids_S, token_N).clamp_max(len(ids_S) - 1)
        place_N = torch.where(ids_S[found_N] == token_N, found_N, len(ids_S))
    own_N, top_N = logs_NC.gather(1, place_N[:, None])[:, 0], logs_NS.amax(1)
    total_NG = torch.stack([torch.cat([(p / heat).logsumexp(1) for p in logs_NC.split(CHUNK)]) for heat in TEMPERATURES], 1)
    heat_G = torch.tensor(TEMPERATURES)
    return total_NG - own_N[:, None] / heat_G, (top_N[:, None] / heat_G - total_NG).exp()
