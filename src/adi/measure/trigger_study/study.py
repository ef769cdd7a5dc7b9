"""``triggers``: how well each signal tells, at each exit, whether its token is full depth's; and which rule pays.

Rows of some texts calibrate (and choose), rows of others test; texts are split by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.errors import AdiError
from adi.measure.forced_pass import answers
from adi.measure.trigger_study.confidence import TEMPERATURES, auroc, expected_calibration_error, isotonic
from adi.measure.trigger_study.cost import measure_cost
from adi.measure.trigger_study.exit_table import ExitTable, asking_seconds, block_seconds, gather, reads_head
from adi.measure.trigger_study.simulate import PassSeconds
from adi.measure.trigger_study.threshold_search import Estimate, Field, compare, sure
from adi.model.load import Model

COMBINATION = "weighted"
STATES_A_CHANCE = ("top_probability", "state_probe", "joint_probe", COMBINATION)
TAIL_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
COSTED_ROWS = (1, 2, 3, 4, 6, 8)
COST_REPEATS = 31


@dataclass(frozen=True)
class SignalScore:
    """One signal at one depth, on testing rows.

    ``auroc`` is the chance that a row where the exit is right looks surer than one where it is wrong (None when all rows
    are alike). ``calibration_error`` is the expected calibration error of the chance of being right that the signal implies
    after isotonic regression on calibrating rows, ``raw_calibration_error`` that of the signal itself where it states a chance.
    ``microseconds`` is what asking costs for one row, the head included where it is read; ``share_of_block`` that as a
    share of one block.
    """

    signal: str
    depth: int
    agreement: float
    auroc: float | None
    calibration_error: float | None
    microseconds: float
    share_of_block: float
    raw_calibration_error: float | None = None


@dataclass(frozen=True)
class ConfidenceCalibration:
    """The head's own confidence at one depth: expected calibration error on testing rows as it is, at the temperature that
    surprises calibrating rows least, and after isotonic regression on them."""

    depth: int
    temperature: float
    before: float
    scaled: float
    isotonic: float


@dataclass(frozen=True)
class Tail:
    """Entropy at one depth with the tail as if spread over ``tokens`` tokens, from one to all there are (``entropy``), and its
    AUROC."""

    depth: int
    tokens: float
    auroc: float | None


@dataclass(frozen=True)
class Oracle:
    """What a trigger that knows could do, on testing rows: ``settled`` is the share of rows where this exit and all deeper
    ones say full depth's token, and no shallower one does; under full depth where none does. ``mean_depth`` would suffice then.
    ``first_right`` and ``mean_first_depth`` are the same where deeper exits may disagree again."""

    settled: Mapping[int, float]
    mean_depth: float
    first_right: Mapping[int, float]
    mean_first_depth: float


@dataclass(frozen=True)
class Study:
    """All of it; ``full_tokens_per_second`` is full depth's, worked out from the same costs as the ``estimates``."""

    scores: list[SignalScore]
    calibrations: list[ConfidenceCalibration]
    tails: list[Tail]
    oracle: Oracle
    estimates: list[Estimate]
    full_tokens_per_second: float
    passes: PassSeconds
    calibrating_tokens: int
    testing_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def study_triggers(
    model: Model,
    exits: Exits,
    prompts: Sequence[str],
    *,
    calibrate: Sequence[str] = (),
    max_new_tokens: int = 96,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Study:
    """Score every signal at every exit on the model's own answers to ``prompts``, and rules by the tokens per second they give.

    ``calibrate`` are other prompts, on which calibrations, thresholds and stops are chosen; without any, every other one of
    ``prompts`` is taken. Needs at least two of each kind (four prompts) and scipy (the extra ``stats``): ValueError.
    """
    marks = [True] * len(calibrate) + [False] * len(prompts)
    if not calibrate:
        marks = [i % 2 == 0 for i in range(len(prompts))]
    if sum(marks) < 2 or len(marks) - sum(marks) < 2:
        raise AdiError(
            f"{len(prompts)} prompts and {len(calibrate)} to calibrate on are too few: some calibrate and some test, so give "
            "at least 4, or 2 of each."
        )
    _require_scipy()
    texts = answers(model, [*calibrate, *prompts], max_new_tokens)
    readings = gather(model, exits, texts, marks, progress)
    asking = asking_seconds(model, exits, texts[0])
    layers = model.backbone.spec.layers
    passes = PassSeconds.of(measure_cost(model.backbone, COSTED_ROWS, COST_REPEATS), layers)
    lengths = [len(text.ids) - text.start for text in texts]
    field = Field(readings, lengths, marks, asking, passes, layers)
    testing = ~next(iter(readings.values())).calibrates_N
    return Study(
        scores=[score for depth in readings for score in _scores(model, depth, readings[depth], asking[depth])],
        calibrations=[_calibration(depth, rows) for depth, rows in readings.items()],
        tails=[tail for depth, rows in readings.items() for tail in _tails(depth, rows, _tail_size(exits))],
        oracle=oracle({depth: rows.right_N[testing] for depth, rows in readings.items()}, layers),
        estimates=compare(field),
        full_tokens_per_second=1 / passes.full(layers, 1),
        passes=passes,
        calibrating_tokens=int((~testing).sum()),
        testing_tokens=int(testing.sum()),
    )


def oracle(right: Mapping[int, Tensor], layers: int) -> Oracle:
    """From whether each exit was right, ``[N]`` by depth."""
    depths = sorted(right)
    right_NE = torch.stack([right[depth] for depth in depths], 1)
    lasting_NE = right_NE.flip(1).cumprod(1).flip(1).bool()

    def spread(first_NE: Tensor) -> tuple[dict[int, float], float]:
        none_N = ~first_NE.any(1)
        place_N = first_NE.int().argmax(1)
        shares = {depth: float(((place_N == i) & ~none_N).float().mean()) for i, depth in enumerate(depths)}
        shares[layers] = float(none_N.float().mean())
        return shares, sum(depth * share for depth, share in shares.items())

    return Oracle(*spread(lasting_NE), *spread(right_NE))


def _scores(model: Model, depth: int, rows: ExitTable, asking: Mapping[str, float]) -> list[SignalScore]:
    """Every signal, and the logistic combination of those that are not learned."""
    plain = {name: values for name, values in rows.signals.items() if not name.endswith("_probe")}
    values = {**rows.signals, COMBINATION: combined(plain, rows)}
    heads = [asking[name] - asking["head"] for name in plain if reads_head(name)]
    whole = asking["head"] + sum(heads) + sum(asking[name] for name in plain if not reads_head(name))
    costs, block = {**asking, COMBINATION: whole}, block_seconds(model, depth)
    test_N = ~rows.calibrates_N
    scores = []
    for name, values_N in values.items():
        raw = expected_calibration_error(values_N[test_N], rows.right_N[test_N]) if name in STATES_A_CHANCE else None
        scores.append(
            SignalScore(
                signal=name,
                depth=depth,
                agreement=float(rows.right_N[test_N].float().mean()),
                auroc=auroc(sure(name, values_N)[test_N], rows.right_N[test_N]),
                calibration_error=_isotonic_error(sure(name, values_N), rows),
                microseconds=1e6 * costs[name],
                share_of_block=costs[name] / block,
                raw_calibration_error=raw,
            )
        )
    return scores


def combined(signals: Mapping[str, Tensor], rows: ExitTable) -> Tensor:
    """The chance of being right from these signals together: logistic regression on the calibrating rows."""
    fit_N = rows.calibrates_N
    x = torch.stack([v.double() for v in signals.values()], 1)
    x = (x - x[fit_N].mean(0)) / x[fit_N].std(0).clamp_min(1e-9)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    y = rows.right_N.double()
    weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x[fit_N] @ weights, y[fit_N])
        value = value + 1e-3 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (x @ weights.detach()).sigmoid().float()


def _isotonic_error(sure_N: Tensor, rows: ExitTable) -> float:
    fit, test = rows.calibrates_N, ~rows.calibrates_N
    chance = isotonic(sure_N[fit], rows.right_N[fit]).of(sure_N[test])
    return expected_calibration_error(chance, rows.right_N[test])


def _calibration(depth: int, rows: ExitTable) -> ConfidenceCalibration:
    fit, test = rows.calibrates_N, ~rows.calibrates_N
    best = int(rows.heat.surprise_GN[:, fit].mean(1).argmin())
    return ConfidenceCalibration(
        depth=depth,
        temperature=TEMPERATURES[best],
        before=expected_calibration_error(rows.signals["top_probability"][test], rows.right_N[test]),
        scaled=expected_calibration_error(rows.heat.top_GN[best, test], rows.right_N[test]),
        isotonic=_isotonic_error(rows.signals["top_probability"], rows),
    )


def _tails(depth: int, rows: ExitTable, size: int) -> list[Tail]:
    """A tail of probability q adds ``q log k`` to the entropy when spread over k tokens rather than kept as one."""
    test_N, found = ~rows.calibrates_N, []
    for share in TAIL_SHARES if size > 1 else ():
        value_N = rows.lumped_N + share * (rows.signals["entropy"] - rows.lumped_N)
        found.append(Tail(depth, size**share, auroc(-value_N[test_N], rows.right_N[test_N])))
    return found


def _tail_size(exits: Exits) -> int:
    return 0 if exits.heads is None else exits.vocabulary - len(exits.heads.ids_S)


def _require_scipy() -> None:
    import importlib.util

    if importlib.util.find_spec("scipy") is None:
        raise AdiError("this study needs an extra: pip install 'adi-lm[stats]'")
