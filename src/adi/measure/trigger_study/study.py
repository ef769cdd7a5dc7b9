"""``triggers``: how well each signal, at each exit, predicts that the exit's token is full depth's; and which rule pays.

Rows of some texts calibrate (and choose), rows of others test; texts are split by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adi.artifact import Exits, require_model
from adi.decoding.teacher_forcing import KnownText, own_answers
from adi.errors import UsageError
from adi.measure.statistics import auroc, expected_calibration_error, isotonic_curve, logistic_weights
from adi.measure.trigger_study.exit_table import TEMPERATURES, ExitTable, exit_tables, reads_head, signal_seconds
from adi.measure.trigger_study.pass_seconds import PassSeconds, measure_passes
from adi.measure.trigger_study.threshold_search import RuleEstimate, SearchData, best_rules, confidence
from adi.model.load import Model
from adi.progress import Progress, no_progress

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
class TailSpread:
    """Entropy at one depth with the tail as if spread over ``tokens`` tokens, from one to all there are (``entropy``), and its
    AUROC."""

    depth: int
    tokens: float
    auroc: float | None


@dataclass(frozen=True)
class Oracle:
    """What a trigger that knows could do, on testing rows: ``settled`` is the share of rows where this exit and all deeper
    ones predict full depth's token, and no shallower one does; under full depth where none does. ``mean_depth`` would suffice
    then. ``first_right`` and ``mean_first_depth`` are the same where deeper exits may disagree again."""

    settled: Mapping[int, float]
    mean_depth: float
    first_right: Mapping[int, float]
    mean_first_depth: float


@dataclass(frozen=True)
class TriggerStudy:
    """All of it; ``full_tokens_per_second`` is full depth's, computed from the same measured passes as the ``estimates``."""

    scores: list[SignalScore]
    calibrations: list[ConfidenceCalibration]
    tails: list[TailSpread]
    oracle: Oracle
    estimates: list[RuleEstimate]
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
    progress: Progress = no_progress,
) -> TriggerStudy:
    """How well each signal predicts that an exit is right, what measuring it costs, and how many tokens per second rules give.

    ``calibrate`` are other prompts, on which calibrations, thresholds and stops are chosen; without any, every other one of
    ``prompts`` is taken. AdiError for fewer than two prompts of each kind (four in all).
    """
    require_model(model, exits)
    marks = [True] * len(calibrate) + [False] * len(prompts)
    if not calibrate:
        marks = [i % 2 == 0 for i in range(len(prompts))]
    if sum(marks) < 2 or len(marks) - sum(marks) < 2:
        raise UsageError(
            f"{len(prompts)} prompts and {len(calibrate)} to calibrate on are too few: some calibrate and some test, so give "
            "at least 4, or 2 of each."
        )
    answers = own_answers(model, [*calibrate, *prompts], max_new_tokens)
    texts = [KnownText.of_answer(given.prompt_ids, given.token_ids) for given in answers]
    tables = exit_tables(model, exits, texts, marks, progress)
    seconds = signal_seconds(model, exits, texts[0])
    passes = measure_passes(model.backbone, COSTED_ROWS, COST_REPEATS)
    tail = 0 if exits.heads is None else exits.vocabulary - len(exits.heads.ids_S)
    testing = ~next(iter(tables.values())).calibrates_N
    return TriggerStudy(
        scores=[score for depth in tables for score in _scores(depth, tables, seconds[depth], passes)],
        calibrations=[_calibration(depth, rows) for depth, rows in tables.items()],
        tails=[spread for depth, rows in tables.items() for spread in _tails(depth, rows, tail)],
        oracle=oracle({depth: rows.right_N[testing] for depth, rows in tables.items()}, passes.layers),
        estimates=best_rules(SearchData(tables, [len(given.token_ids) for given in answers], marks, seconds, passes)),
        full_tokens_per_second=1 / passes.full(),
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


def _scores(
    depth: int, tables: Mapping[int, ExitTable], seconds: Mapping[str, float], passes: PassSeconds
) -> list[SignalScore]:
    """Every signal, and the logistic combination of those that are not learned."""
    rows = tables[depth]
    plain = {name: values for name, values in rows.signals.items() if not name.endswith("_probe")}
    heads = [seconds[name] - seconds["head"] for name in plain if reads_head(name)]
    whole = seconds["head"] + sum(heads) + sum(seconds[name] for name in plain if not reads_head(name))
    costs, block = {**seconds, COMBINATION: whole}, passes.through(depth, 1) / depth
    test_N = ~rows.calibrates_N
    right_N = rows.right_N[test_N]
    return [
        SignalScore(
            signal=name,
            depth=depth,
            agreement=float(right_N.float().mean()),
            auroc=auroc(confidence(name, values_N, tables)[test_N], right_N),
            calibration_error=isotonic_error(confidence(name, values_N, tables), rows),
            microseconds=1e6 * costs[name],
            share_of_block=costs[name] / block,
            raw_calibration_error=expected_calibration_error(values_N[test_N], right_N) if name in STATES_A_CHANCE else None,
        )
        for name, values_N in {**rows.signals, COMBINATION: combined(plain, rows)}.items()
    ]


def combined(signals: Mapping[str, Tensor], rows: ExitTable) -> Tensor:
    """The chance of being right from these signals together: logistic regression on the calibrating rows."""
    fit_N = rows.calibrates_N
    x = torch.stack([v.double() for v in signals.values()], 1)
    x = (x - x[fit_N].mean(0)) / x[fit_N].std(0).clamp_min(1e-9)
    x_NF = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1).numpy()
    weight_F = logistic_weights(x_NF[fit_N], rows.right_N[fit_N].double().numpy(), ridge=2e-3)
    return torch.from_numpy(x_NF @ weight_F).float().sigmoid()


def isotonic_error(score_N: Tensor, rows: ExitTable) -> float:
    """Expected calibration error on testing rows of the chance that isotonic regression on calibrating rows gives."""
    fit, test = rows.calibrates_N, ~rows.calibrates_N
    return expected_calibration_error(isotonic_curve(score_N[fit], rows.right_N[fit]).chance(score_N[test]), rows.right_N[test])


def _calibration(depth: int, rows: ExitTable) -> ConfidenceCalibration:
    test = ~rows.calibrates_N
    best = int(rows.surprise_NG[rows.calibrates_N].mean(0).argmin())
    return ConfidenceCalibration(
        depth=depth,
        temperature=TEMPERATURES[best],
        before=expected_calibration_error(rows.signals["top_probability"][test], rows.right_N[test]),
        scaled=expected_calibration_error(rows.top_NG[test, best], rows.right_N[test]),
        isotonic=isotonic_error(rows.signals["top_probability"], rows),
    )


def _tails(depth: int, rows: ExitTable, size: int) -> list[TailSpread]:
    """A tail of probability q adds ``q log k`` to the entropy when spread over k tokens rather than kept as one."""
    test_N, found = ~rows.calibrates_N, []
    for share in TAIL_SHARES if size > 1 else ():
        value_N = rows.lumped_N + share * (rows.signals["entropy"] - rows.lumped_N)
        found.append(TailSpread(depth, size**share, auroc(-value_N[test_N], rows.right_N[test_N])))
    return found
