"""What an exposure study found: slopes with intervals, differences between prices, controls, devaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adi.measure.exposure.facts import LENGTH, Facts
from adi.measure.exposure.observe import MENTIONS, frequency
from adi.measure.exposure.settings import ExposureSettings, Part, Shape
from adi.measure.exposure.slopes import Slope, Table, partial_slope
from adi.measure.halting_controls import middle, resamples

DEPTHS = ("settled", "halted")
SURE = 0.1  # nats: questions that full depth answers with less surprise are equal for it
Parts = Sequence[tuple[Part, dict[str, Any]]]


def report(settings: ExposureSettings, parts: Parts) -> dict[str, Any]:
    """The figures of a study, by shape and price; seeds are pooled, each with a level and items of its own."""
    shapes = []
    for shape in settings.shapes:
        prices = []
        for price in settings.prices:
            mine = [(part, kept) for part, kept in parts if (part.shape, part.price) == (shape, price)]
            prices.append({"price": price, **_of_price(settings, mine)})
        shapes.append({"shape": shape, "prices": prices, **_against_free(settings, shape, parts)})
    return {"format": "adi-exposure", "version": 1, **settings.to_json(), "shapes": rounded(shapes)}


def rounded(value: Any) -> Any:
    """The same with all fractions to five digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


class Answers:
    """What was observed of the items of one part, as arrays; ``rows["settled"]`` and so on."""

    def __init__(self, settings: ExposureSettings, part: Part, texts: int, columns: dict[str, Any]) -> None:
        facts = Facts(part.seed, settings.most_exposures)
        self.columns = {name: np.asarray(values) for name, values in columns.items() if name != "step"}
        item = self.columns["item"]
        self.columns["exposures"] = np.array([i.exposures for i in facts.items])[item]
        self.columns["masked"] = np.array([i.masked for i in facts.items])[item]
        self.columns["frequency"] = frequency(facts, texts)[item]

    def __getitem__(self, name: str) -> np.ndarray:
        found: np.ndarray = self.columns[name]
        return found

    def table(self, mine: np.ndarray) -> Table:
        """Exposure as log2(1 + n), and what is held equal."""
        hops = [self["hops"] == n for n in np.unique(self["hops"][mine])[1:]]
        equal = [self["surprise_full"], self["entropy"], np.log(self["frequency"]), self["place"] / LENGTH, *hops]
        return Table(np.log2(1 + self["exposures"][mine]), np.column_stack(equal)[mine].astype(np.float64), self["item"][mine])


def _rows(settings: ExposureSettings, parts: Parts, name: str = "items") -> list[Answers]:
    return [Answers(settings, part, kept["texts"], kept[name]) for part, kept in parts]


def worked_out(rows: Answers) -> np.ndarray:
    """Questions of several hops, which can be worked out, and whose answers were not masked."""
    return np.asarray((rows["hops"] > 1) & ~rows["masked"])


def equal(rows: Answers) -> np.ndarray:
    """Of these, those that full depth answers rightly and without surprise."""
    return np.asarray(worked_out(rows) & (rows["surprise_full"] < SURE) & (rows["right_full"] == 1))


def remembered(rows: Answers) -> np.ndarray:
    """Questions of one hop, which can only be remembered."""
    return np.asarray((rows["hops"] == 1) & ~rows["masked"])


KINDS = {"worked_out": worked_out, "equal": equal, "remembered": remembered}


def slope(seeds: Sequence[Answers], chosen: Any, depths: Sequence[np.ndarray]) -> Slope | None:
    """The partial slope of depth on log2(1 + exposures), all seeds together; None without enough to go by."""
    kept = [(rows, depth, mine) for rows, depth in zip(seeds, depths, strict=True) if (mine := chosen(rows)).sum() > 20]
    if not kept:
        return None
    tables = Table.joined([rows.table(mine) for rows, _, mine in kept])
    return partial_slope(tables, np.concatenate([depth[mine] for _, depth, mine in kept]).astype(np.float64))


def _json(found: Slope | None) -> Any:
    return None if found is None else found.to_json()


def _of_price(settings: ExposureSettings, parts: Parts) -> dict[str, Any]:
    seeds = _rows(settings, parts)
    slopes = {
        kind: {depth: _json(slope(seeds, chosen, [rows[depth] for rows in seeds])) for depth in DEPTHS}
        for kind, chosen in KINDS.items()
    }
    by_seed = [slope([rows], worked_out, [rows["settled"]]) for rows in seeds]
    return {
        "slopes": slopes,
        "by_seed": [None if one is None else one.value for one in by_seed],
        "levels": [{"hops": name, **row} for name, hops in (("1", (1,)), ("2 to 4", (2, 3, 4))) for row in levels(seeds, hops)],
        "masked": _masked(settings, seeds),
        "mentions": _mentions(parts),
        "emergence": _emergence(settings, parts),
        "devaluation": _devaluation(parts),
        "knowledge": {
            **{name: [kept["knowledge"][name] for _, kept in parts] for name in ("reach", "verdict")},
            "rows": next(kept["knowledge"]["rows"] for _, kept in parts),
        },
        "top": _top(settings, seeds),
    }


def _top(settings: ExposureSettings, seeds: Sequence[Answers]) -> dict[str, Any]:
    """How much earlier the most familiar questions of several hops are settled than those never met: levels are dealt within
    each number of hops, so means compare; of each hop, and of all, with intervals over items."""
    found, every = {}, []
    for hops in (2, 3, 4):
        ends = []
        for exposures in (settings.most_exposures, 0):
            mine = [worked_out(rows) & (rows["hops"] == hops) & (rows["exposures"] == exposures) for rows in seeds]
            ends.append(_item_means(seeds, mine))
        few_S, none_S = (values[resamples(len(values), hops + n)].mean(1) for n, values in enumerate(ends))
        every.append((float(ends[0].mean() - ends[1].mean()), few_S - none_S))
        found[str(hops)] = {"change": every[-1][0], "interval": middle(every[-1][1])}
    changes, resampled = zip(*every, strict=True)
    return found | {"all": {"change": float(np.mean(changes)), "interval": middle(np.mean(resampled, 0))}}


def levels(seeds: Sequence[Answers], hops: Sequence[int]) -> list[dict[str, float]]:
    """Means by number of exposures."""
    names = (*DEPTHS, "surprise_first", "surprise_full", "right_first", "right_full")
    found = []
    for exposures in np.unique(np.concatenate([rows["exposures"] for rows in seeds])):
        mine = [(rows["exposures"] == exposures) & ~rows["masked"] & np.isin(rows["hops"], hops) for rows in seeds]
        means = {name: np.concatenate([r[name][m] for r, m in zip(seeds, mine, strict=True)]) for name in names}
        if len(means["settled"]):
            found.append({"exposures": int(exposures), **{name: float(values.mean()) for name, values in means.items()}})
    return found


def _masked(settings: ExposureSettings, seeds: Sequence[Answers]) -> dict[str, Any]:
    """Items shown as often, with and without their answers in the loss: means, and the difference of settled depth."""
    level = Facts(0, settings.most_exposures).masked_level
    sides = {
        "masked": [(rows["hops"] > 1) & rows["masked"] for rows in seeds],
        "learned": [worked_out(rows) & (rows["exposures"] == level) for rows in seeds],
        "never_met": [worked_out(rows) & (rows["exposures"] == 0) for rows in seeds],
    }
    found = {name: _item_means(seeds, mine) for name, mine in sides.items()}
    return {"exposures": level, **{name: {"mean": float(v.mean()), "interval": _interval(v)} for name, v in found.items()}}


def _item_means(seeds: Sequence[Answers], mine: Sequence[np.ndarray]) -> np.ndarray:
    """Settled depth, a mean for each item."""
    parts = []
    for rows, chosen in zip(seeds, mine, strict=True):
        _, place = np.unique(rows["item"][chosen], return_inverse=True)
        parts.append(np.bincount(place, rows["settled"][chosen]) / np.bincount(place))
    return np.concatenate(parts)


def _interval(values: np.ndarray) -> list[float]:
    return middle(values[resamples(len(values))].mean(1))


def _mentions(parts: Parts) -> list[dict[str, Any]]:
    """Fresh questions, by how often they were asked in this text: depth, and its difference from the first mention."""
    found = []
    columns = [{name: np.asarray(values) for name, values in kept["repeats"].items()} for _, kept in parts]
    for mention in MENTIONS:
        row: dict[str, Any] = {"mention": mention}
        for depth in DEPTHS:
            first = np.concatenate([c[depth][c["mention"] == 1] for c in columns])
            now = np.concatenate([c[depth][c["mention"] == mention] for c in columns])
            row[depth] = {"mean": float(now.mean()), "change": float((now - first).mean()), "interval": _interval(now - first)}
        row["surprise_full"] = float(np.concatenate([c["surprise_full"][c["mention"] == mention] for c in columns]).mean())
        found.append(row)
    return found


def _emergence(settings: ExposureSettings, parts: Parts) -> list[dict[str, Any]]:
    """The slope of settled depth, and the first turn's surprise at the most familiar and at new items, over training."""
    found = []
    for n in range(min((len(kept["emergence"]) for _, kept in parts), default=0)):
        seeds = [Answers(settings, part, kept["texts"], kept["emergence"][n]) for part, kept in parts]
        ends = {}
        for name, level in (("familiar", settings.most_exposures), ("new", 0)):
            mine = [worked_out(rows) & (rows["exposures"] == level) for rows in seeds]
            ends[name] = float(np.concatenate([r["surprise_first"][m] for r, m in zip(seeds, mine, strict=True)]).mean())
        made = slope(seeds, worked_out, [rows["settled"] for rows in seeds])
        found.append({"step": parts[0][1]["emergence"][n]["step"], "slope": _json(made), "surprise_first": ends})
    return found


def _devaluation(parts: Parts) -> dict[str, Any]:
    """Means over seeds of each row; delays of each seed."""
    runs, rows = [kept["devaluation"] for _, kept in parts], []
    for same in zip(*(run["rows"] for run in runs), strict=True):
        row = {name: same[0][name] for name in ("examples", "group")}
        rows.append(row | {name: np.mean([s[name] for s in same], 0).tolist() for name in same[0] if name not in row})
    lags = [_lag(run["rows"]) for run in runs]
    return {
        "rows": rows,
        "lag": {"by_seed": lags, "mean": float(np.mean(lags)), "interval": _t_interval(lags)},
        "delays": [run["delay"] for run in runs],
        "thresholds": [run["certified_threshold"] for run in runs],
    }


def _t_interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95% interval of a mean over seeds; None for one."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [mean - float(half), mean + float(half)]


def _lag(rows: Sequence[dict[str, Any]]) -> float:
    """By what share of old answers the first turn is behind the last at changed facts, mean over numbers of examples."""
    return float(np.mean([row["old"][0] - row["old"][-1] for row in rows if row["group"] == "fact" and row["examples"]]))


def _against_free(settings: ExposureSettings, shape: Shape, parts: Parts) -> dict[str, Any]:
    """Differences of slopes to the model of price 0: of models trained under a price, and of gates trained alone."""
    free = [(part, kept) for part, kept in parts if (part.shape, part.price) == (shape, 0.0)]
    if not free:
        return {}
    base = _rows(settings, free)
    at_free = {depth: slope(base, worked_out, [rows[depth] for rows in base]) for depth in DEPTHS}
    trained, gates = [], []
    for price in filter(None, settings.prices):
        rows = _rows(settings, [(part, kept) for part, kept in parts if (part.shape, part.price) == (shape, price)])
        made = {depth: slope(rows, worked_out, [r[depth] for r in rows]) for depth in DEPTHS}
        alone = slope(base, worked_out, [np.asarray(kept["gate_only"][f"{price:g}"]) for _, kept in free])
        trained.append({"price": price, **{depth: _difference(made[depth], at_free[depth]) for depth in DEPTHS}})
        gates.append({"price": price, "halted": _json(alone), "trained_minus_gate_only": _difference(made["halted"], alone)})
    return {"minus_price_0": trained, "gate_only": gates}


def _difference(a: Slope | None, b: Slope | None) -> Any:
    return None if a is None or b is None else a.minus(b).to_json()
