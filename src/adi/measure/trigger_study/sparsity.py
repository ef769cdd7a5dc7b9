"""``adi study sparsity``: does it tell whether an exit is right, which units of a sparse layer speak, and beyond entropy?

Small looped models learn products with resets under each rule of ``training.looped``, beside two controls: prototypes that
stay random, and a dense MLP with ReLU. An exit (the answer after a turn) is right where it is that of the last turn. Signals
are judged within each turn, so that depth itself tells nothing; what they add to entropy by logistic regressions on half of
the items, judged on the other half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn

from adi.exits.signals import Prediction, active_share, entropy, route_jump, route_margin, top_probability
from adi.files import write_json
from adi.measure.statistics import logistic_weights, weighted_auroc
from adi.model.load import load_looped
from adi.model.looped import LoopedForCausalLM
from adi.model.sparse import Router
from adi.progress import Progress, no_progress
from adi.schema import Natural, Positive, Record, claim, read_json_as
from adi.tasks.registry import task_named
from adi.training.train_looped import TrainSettings, train_looped

Rule = Literal["entropy+", "entropy-", "utility", "price", "frozen", "relu"]
RULES: tuple[Rule, ...] = get_args(Rule)
SETTINGS, TASK = "study.json", "products-S3"
ACTIVE = 0.25  # the share of units at which activity is compared
SIGNALS = ("active_share", "active_share_at_equal", "route_margin", "route_jump")
ADDED = {**{name: (name,) for name in SIGNALS}, "all": SIGNALS}
HEAD = ("entropy", "top_probability")
BASES = {
    "entropy": ("entropy",),
    "head": HEAD,
    "head and gate": (*HEAD, "gate"),
    "these and difficulty": (*HEAD, "gate", "distance"),
}
RESAMPLES = 200
Rows = dict[str, np.ndarray]  # signals and "right", each [turns, items, places]


class SparsitySettings(Record, frozen=True):
    """The grid of a sparsity study, and the size of each part."""

    rules: tuple[Rule, ...] = RULES
    seeds: tuple[Natural, ...] = (0, 1, 2)
    steps: Positive = 360
    batch: Positive = 24
    items: Positive = 300

    def parts(self) -> Iterator[tuple[Rule, int]]:
        """Seed by seed, so that a stopped study has whole comparisons."""
        for seed in self.seeds:
            for rule in self.rules:
                yield rule, seed

    def training(self, rule: Rule, seed: int) -> TrainSettings:
        """How a part is trained."""
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "turns": 8}
        start = {"rope_theta": 100.0, "initializer_range": 0.1, "embedding_range": 1.0}
        return TrainSettings(
            task=TASK,
            model={**shape, **start, "sparse": "relu" if rule == "relu" else "mlp"},
            steps=self.steps,
            batch=self.batch,
            learning_rate=3e-3,
            warmup=30,
            shaping="none" if rule == "frozen" or rule == "relu" else rule,
            active=ACTIVE,
            seed=seed,
        )


class Judged(TypedDict):
    """What a part's file holds."""

    rule: str
    seed: int
    accuracy_by_turn: list[float]
    right_by_turn: list[float]
    active_by_turn: list[float]
    alone: dict[str, Any]
    gains: dict[str, Any]


def study_sparsity(settings: SparsitySettings, folder: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Train and judge every part that ``folder`` does not hold; the table of all. UsageError where it was begun with others."""
    claim(folder / SETTINGS, settings)
    parts = list(settings.parts())
    for n, (rule, seed) in enumerate(parts):
        path = folder / f"{rule}-{seed}.json"
        if not path.exists():
            made, within = folder / f"{rule}-{seed}", _within(progress, n, len(parts), rule)
            done = (made / "model.safetensors").exists()
            model = load_looped(made) if done else train_looped(settings.training(rule, seed), made, within)
            write_json(path, {"rule": rule, "seed": seed, **judged(model, settings.items, seed)})
    return summary([dict(read_json_as(folder / f"{rule}-{seed}.json", Judged, "part of the study")) for rule, seed in parts])


def _within(progress: Progress, part: int, parts: int, rule: str) -> Progress:
    """The progress of one part as that of all."""
    return lambda done, total, what: progress(part * total + done, parts * total, f"{rule}: {what}")


@torch.no_grad()
def judged(model: LoopedForCausalLM, count: int, seed: int) -> dict[str, Any]:
    """One trained model: accuracy and activity by turn, and how well each signal tells an exit that is right."""
    drawn = task_named(TASK).batch(count, (seed,), test=True)
    rows, answers_RBT = read(model, torch.tensor(drawn.ids_BT))
    rows["distance"] = np.broadcast_to(np.log1p(drawn.difficulty_BT), rows["right"].shape)
    fits_B = np.arange(count) % 2 == 0
    fit = functools.cache(functools.partial(fitted, rows, fits_B))
    return {
        "accuracy_by_turn": (answers_RBT == drawn.labels_BT).mean((1, 2)).tolist(),
        "right_by_turn": rows["right"].mean((1, 2)).tolist(),
        "active_by_turn": rows["active_share"].mean((1, 2)).tolist(),
        "alone": {name: alone(rows, name, fits_B) for name in (*HEAD, "gate", *SIGNALS)},
        "gains": {base: {name: gain(fit, given, names) for name, names in ADDED.items()} for base, given in BASES.items()},
    }


def read(model: LoopedForCausalLM, ids_BT: Tensor) -> tuple[Rows, np.ndarray]:
    """Every signal after each turn but the first and the last, and whether the answer is the last turn's; all answers."""
    taps, routes = list[Tensor](), [m for m in model.modules() if isinstance(m, Router)]
    watched: list[nn.Module] = [*routes] or [block.mlp.gate_proj for block in model.model.turn.layers]  # type: ignore[union-attr, misc]
    hooks = [module.register_forward_hook(lambda _, given, out: taps.append(out)) for module in watched]
    try:
        out = model(ids_BT, output_turns=True)
    finally:
        for hook in hooks:
            hook.remove()
    route_RBTF = torch.stack([torch.cat(taps[i : i + len(watched)], -1) for i in range(0, len(taps), len(watched))])
    answers_RBT, inner = out.turn_logits.argmax(-1), slice(1, -1)
    head, here = Prediction(out.turn_logits[inner].log_softmax(-1)), route_RBTF[inner]
    at_equal = torch.stack([route > np.quantile(route.numpy(), 1 - ACTIVE) for route in here]).float().mean(-1)
    found = {
        "entropy": entropy(head),
        "top_probability": top_probability(head),
        "gate": out.halt_logits[inner],
        "active_share": active_share(here),
        "active_share_at_equal": at_equal,
        "route_margin": route_margin(here),
        "route_jump": route_jump(here, route_RBTF[:-2]),
        "right": answers_RBT[inner] == answers_RBT[-1],
    }
    return {name: value.numpy() for name, value in found.items()}, answers_RBT.numpy()


def alone(rows: Rows, name: str, fits_B: np.ndarray) -> dict[str, Any]:
    """AUROC of a signal on held-out items, within each turn and over all turns, each weighed by its pairs; ``high``: whether
    high means sure, as the fitting items say."""
    fit, test = (_judged(rows["right"][:, part], rows[name][:, part]) for part in (fits_B, ~fits_B))
    high = fit.pooled >= 0.5
    return {
        "high": bool(high),
        "auroc": test.pooled if high else 1 - test.pooled,
        "by_turn": [None if a is None else a if high else 1 - a for a in test.by_turn],
    }


def gain(fit: Callable[[tuple[str, ...]], Fitted], base: tuple[str, ...], names: tuple[str, ...]) -> dict[str, Any]:
    """What signals add to a base: the likelihood ratio on items that fit, with its degrees of freedom; the difference of AUROC
    on the others, and what resampled items give."""
    less, more = fit(base), fit((*base, *names))
    gain_S = more.auroc_S - less.auroc_S
    return {
        "base": float(less.auroc_S[0]),
        "more": float(gain_S[0]),
        "drawn": gain_S[1:].tolist(),
        "likelihood_ratio": 2 * (more.likelihood - less.likelihood),
        "degrees": more.weights - less.weights,
    }


@dataclass(frozen=True)
class Fitted:
    """Logistic regressions of being right, one in each turn: the logarithm of the likelihood and the number of weights; AUROC
    on held-out items, of these and then of resampled ones."""

    likelihood: float
    weights: int
    auroc_S: np.ndarray


def fitted(rows: Rows, fits_B: np.ndarray, names: tuple[str, ...]) -> Fitted:
    """On values, squares and cubes of these signals."""
    scores, likelihood, weights = np.zeros(rows["right"].shape), 0.0, 0
    for turn, right_BT in enumerate(rows["right"]):
        columns = [np.ones(right_BT.size)]
        for name in names:
            value = rows[name][turn].astype(np.float64)
            value = (value - value[fits_B].mean()) / max(value[fits_B].std(), 1e-9)
            columns += [(value.clip(-4, 4) ** power).ravel() for power in (1, 2, 3)]
        x_NF, fits_N = np.stack(columns, 1), np.repeat(fits_B, right_BT.shape[1])
        weight_F = logistic_weights(x_NF[fits_N], right_BT.ravel()[fits_N])
        logit_N = x_NF @ weight_F
        scores[turn], weights = logit_N.reshape(right_BT.shape), weights + len(weight_F)
        likelihood -= float(np.logaddexp(0, np.where(right_BT.ravel(), -logit_N, logit_N))[fits_N].sum())
    items = int((~fits_B).sum())
    drawn_SB = np.random.default_rng(0).multinomial(items, np.full(items, 1 / items), RESAMPLES)
    weight_SB = np.concatenate([np.ones((1, items)), drawn_SB])
    return Fitted(likelihood, weights, _judged(rows["right"][:, ~fits_B], scores[:, ~fits_B], weight_SB).drawn_S)


@dataclass(frozen=True)
class _Judged:
    pooled: float
    by_turn: list[float | None]
    drawn_S: np.ndarray


def _judged(right_RBT: np.ndarray, score_RBT: np.ndarray, weight_SB: np.ndarray | None = None) -> _Judged:
    """AUROC within turns, pooled by their pairs; the same under weights of the items."""
    weight_SB = np.ones((1, right_RBT.shape[1])) if weight_SB is None else weight_SB
    weight_SN = np.repeat(weight_SB, right_RBT.shape[2], 1)
    found = [weighted_auroc(s.ravel(), r.ravel(), weight_SN) for s, r in zip(score_RBT, right_RBT, strict=True)]
    won_S, pairs_S = (sum(part) for part in zip(*found, strict=True))
    by_turn = [float(won[0] / pairs[0]) if pairs[0] else None for won, pairs in found]
    drawn_S = np.divide(won_S, pairs_S, out=np.full(len(weight_SN), 0.5), where=np.asarray(pairs_S) > 0)
    return _Judged(float(drawn_S[0]), by_turn, drawn_S)


def summary(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds for each rule."""
    rules = list(dict.fromkeys(part["rule"] for part in parts))
    seeds = len({part["seed"] for part in parts})
    return {"active": ACTIVE, "seeds": seeds, "rules": [_of_rule(rule, parts) for rule in rules]}


def _of_rule(rule: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mine, random = ([part for part in parts if part["rule"] == name] for name in (rule, "frozen"))
    active = [part["active_by_turn"] for part in mine]
    return {
        "rule": rule,
        "accuracy": fmean(part["accuracy_by_turn"][-1] for part in mine),
        "active": fmean(map(fmean, active)),
        "active_by_turn": np.mean(active, 0).tolist(),
        "right_by_turn": np.mean([part["right_by_turn"] for part in mine], 0).tolist(),
        "alone": {
            name: {
                "auroc": fmean(part["alone"][name]["auroc"] for part in mine),
                "high": [part["alone"][name]["high"] for part in mine],
            }
            for name in mine[0]["alone"]
        },
        "gains": {base: {name: _gained(base, name, mine, random) for name in ADDED} for base in BASES},
    }


def _gained(base: str, name: str, mine: Sequence[Mapping[str, Any]], random: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What signals add, with the interval of 95% over seeds and items, both resampled; and how far that is ahead of what they
    add where prototypes are random, from the same seeds on the same items (None without)."""
    from scipy.stats import chi2

    each, others = ([part["gains"][base][name] for part in some] for some in (mine, random))
    ratio, degrees = (sum(one[key] for one in each) for key in ("likelihood_ratio", "degrees"))
    seeds = [one["more"] for one in each]
    chosen_NS = np.random.default_rng(0).integers(0, len(each), (len(each), RESAMPLES))
    drawn_S = np.take_along_axis(np.array([one["drawn"] for one in each]), chosen_NS, 0).mean(0)
    found = {
        "more": fmean(seeds),
        "interval": np.quantile(drawn_S, (0.025, 0.975)).tolist(),
        "seeds": seeds,
        "likelihood_ratio": ratio,
        "degrees": degrees,
        "p": float(chi2.sf(ratio, degrees)),
        "ahead": None,
    }
    if len(others) == len(each):
        ahead_S = drawn_S - np.take_along_axis(np.array([one["drawn"] for one in others]), chosen_NS, 0).mean(0)
        ahead = fmean(seeds) - fmean(one["more"] for one in others)
        found["ahead"] = [ahead, *np.quantile(ahead_S, (0.025, 0.975)).tolist()]
    return found
