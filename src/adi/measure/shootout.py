"""``triggers``: how well each signal tells, at each depth, whether the exit's token is the full model's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adi.exits.artifact import Exits, Reader
from adi.exits.signals import SIGNALS, Measured, Prediction
from adi.measure.cost import seconds
from adi.measure.walk import Walk, answer, walk
from adi.model.backbone import Rows, States
from adi.model.checkpoint import Model

BINS = 10
COMBINATION = "weighted"


@dataclass(frozen=True)
class Score:
    """One signal at one depth, on held-out rows.

    ``auroc`` is the chance that a row where the exit is right looks surer than one where it is wrong (None when all rows
    are alike). ``calibration_error`` is the expected calibration error (Naeini et al. 2015) of the chance of being right
    that the signal implies, after isotonic regression on other sequences. ``microseconds`` is what asking costs for one
    row, the head included where the signal reads one; ``share_of_block`` that as a share of one block.
    """

    signal: str
    depth: int
    agreement: float
    auroc: float | None
    calibration_error: float | None
    microseconds: float
    share_of_block: float


@dataclass(frozen=True)
class Labelled:
    """All rows at one depth: signals ``[N]`` by name, whether the exit was right, and which half they belong to."""

    signals: dict[str, Tensor]
    right_N: Tensor
    fit_N: Tensor


def study_triggers(
    model: Model,
    exits: Exits,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 96,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Score every signal, and their logistic combination, at every exit, on the model's own answers to ``prompts``.

    Needs at least four prompts (half of them calibrate, half test) and scipy (the extra ``stats``): ValueError.
    """
    if len(prompts) < 4:
        raise ValueError(f"{len(prompts)} prompts are too few: half calibrate and half test, so give at least 4.")
    _require_scipy()
    read = exits.reader(model.backbone)
    walks: list[Walk] = []
    for i, prompt in enumerate(prompts):
        walks.append(walk(model, answer(model, prompt, max_new_tokens), exits.depths))
        progress(i + 1, len(prompts))
    scores = []
    for depth in exits.depths:
        rows = _rows(walks, depth, read)
        cost = _costs(model, read, depth, walks[0].at[depth])
        block = _block_seconds(model, depth)
        rows.signals[COMBINATION] = _combined(rows)
        for name, values_N in rows.signals.items():
            high = name == COMBINATION or SIGNALS[name].sure_is_high
            sure_N = values_N if high else -values_N
            scores.append(
                Score(
                    signal=name,
                    depth=depth,
                    agreement=float(rows.right_N.float().mean()),
                    auroc=auroc(sure_N[~rows.fit_N], rows.right_N[~rows.fit_N]),
                    calibration_error=_calibration_error(sure_N, rows),
                    microseconds=1e6 * cost[name],
                    share_of_block=cost[name] / block,
                )
            )
    return scores


def auroc(sure_N: Tensor, right_N: Tensor) -> float | None:
    """Area under the ROC curve by rank sums (Mann-Whitney), ties counting half; None when only one class is there."""
    from scipy.stats import rankdata

    positives = int(right_N.sum())
    negatives = len(right_N) - positives
    if not positives or not negatives:
        return None
    ranks = rankdata(sure_N.double().numpy())
    above = float(ranks[right_N.numpy()].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def expected_calibration_error(chance_N: Tensor, right_N: Tensor, bins: int = BINS) -> float:
    """Mean distance between stated chance and observed rate over equal-width bins, weighted by their rows."""
    place_N = (chance_N * bins).long().clamp(0, bins - 1)
    total = 0.0
    for b in range(bins):
        here = place_N == b
        if here.any():
            total += float((chance_N[here].mean() - right_N[here].float().mean()).abs() * here.sum())
    return total / len(chance_N)


def _rows(walks: Sequence[Walk], depth: int, read: Reader) -> Labelled:
    collected: dict[str, list[Tensor]] = {}
    right, half = [], []
    for i, seen in enumerate(walks):
        said = read(depth, seen.at[depth].hidden_TD)
        for name, values_N in signals_of(said, seen.at[depth]).items():
            collected.setdefault(name, []).append(values_N.float().cpu())
        best = said.log_probs_TS.argmax(-1)
        tokens = best if said.ids_S is None else said.ids_S[best]
        right.append((tokens == seen.token_N).cpu())
        half.append(torch.full((len(seen.token_N),), i % 2 == 0))
    return Labelled({n: torch.cat(v) for n, v in collected.items()}, torch.cat(right), torch.cat(half))


def signals_of(said: Prediction | Measured, states: States) -> dict[str, Tensor]:
    """Every signal at every row, ``[T]`` each; those of an MLP only where its activations are there."""
    values = {}
    for name, signal in SIGNALS.items():
        if signal.reads == "head":
            values[name] = signal.measure(said)
        elif signal.reads == "states":
            values[name] = signal.measure(states.before_TD, states.hidden_TD)
        elif states.mlp_TF is not None:
            values[name] = signal.measure(states.mlp_TF)
    return values


def _combined(rows: Labelled) -> Tensor:
    """The chance of being right from all signals together: logistic regression on the fitting half."""
    x = torch.stack([v.double() for v in rows.signals.values()], 1)
    x = (x - x[rows.fit_N].mean(0)) / x[rows.fit_N].std(0).clamp_min(1e-9)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    y = rows.right_N.double()
    weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x[rows.fit_N] @ weights, y[rows.fit_N])
        value = value + 1e-3 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (x @ weights.detach()).sigmoid().float()


def _calibration_error(sure_N: Tensor, rows: Labelled) -> float | None:
    """Isotonic regression of being right on the signal (fitting half), then its calibration error (testing half)."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    fit, test = rows.fit_N, ~rows.fit_N
    if not fit.any() or not test.any():
        return None
    known, place, rows_at = np.unique(sure_N[fit].double().numpy(), return_inverse=True, return_counts=True)
    right = np.bincount(place, weights=rows.right_N[fit].double().numpy())
    levels = isotonic_regression(right / rows_at, weights=rows_at).x  # equal signals get one chance
    chance = torch.from_numpy(np.interp(sure_N[test].double().numpy(), known, levels))
    return expected_calibration_error(chance, rows.right_N[test])


def _costs(model: Model, read: Reader, depth: int, states: States) -> dict[str, float]:
    """Seconds to ask each signal about one row, the head included where it is read."""
    one = slice(0, 1)
    row = States(states.hidden_TD[one], states.before_TD[one], None if states.mlp_TF is None else states.mlp_TF[one])
    said = read(depth, row.hidden_TD)
    head = seconds(lambda: read(depth, row.hidden_TD), 15)
    costs = {}
    for name, signal in SIGNALS.items():
        if signal.reads == "head":
            costs[name] = head + seconds(functools.partial(signal.measure, said), 15)
        elif signal.reads == "states":
            costs[name] = seconds(functools.partial(signal.measure, row.before_TD, row.hidden_TD), 15)
        elif row.mlp_TF is not None:
            costs[name] = seconds(functools.partial(signal.measure, row.mlp_TF), 15)
    others = sum(c for n, c in costs.items() if SIGNALS[n].reads != "head")
    costs[COMBINATION] = head + others + sum(c - head for n, c in costs.items() if SIGNALS[n].reads == "head")
    return costs


def _block_seconds(model: Model, depth: int) -> float:
    """One block, for one row: the first ``depth`` of them over their number."""
    backbone, cache = model.backbone, model.backbone.new_cache()
    backbone.forward([Rows(cache, 0, tuple(i % backbone.spec.vocabulary for i in range(64)), None)], 0, depth)
    return seconds(lambda: backbone.forward([Rows(cache, 64, (0,), None)], 0, depth), 9) / depth


def _require_scipy() -> None:
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise ValueError("this study needs an extra: pip install 'adi-lm[stats]'")
