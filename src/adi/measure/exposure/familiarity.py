"""Does a real model decide what is familiar at shallower depth? Measured as it is, without any training.

The depth of a token is that from which on the model's own head, put there untrained, predicts what full depth predicts
("prediction depth", Baldock et al. 2021), in one teacher-forced pass. Familiar is: what was in this context before, what is in
a history of other texts, the model's own text against its tokens shuffled. Surprise, entropy and frequency are held equal.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from adi.artifact import require_model
from adi.decoding.teacher_forcing import ForcedPass, KnownText, forced_pass, full_logits, full_tokens, own_answers
from adi.errors import UsageError
from adi.measure.exposure.slopes import Table, partial_slope
from adi.measure.halting_controls import middle, resamples
from adi.model.load import Model
from adi.model.prompt import Prompt
from adi.progress import Progress, no_progress

REPEATS, GRAM, EVERY = 4, 4, 3
Columns = dict[str, np.ndarray]


def familiarity(
    model: Model,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 48,
    past: Sequence[Sequence[int]] = (),
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Partial slopes of depth, in blocks, on log2 of the number of times in this context, on log2(1 + count) of the 4-gram that
    ends in the token among other texts (``past``, else the answers to the other prompts), and on being in its own order.

    Each answer is read ``REPEATS`` times in a row, and once shuffled. Intervals are over prompts. UsageError for fewer than
    four answers, and for a model too shallow to have exits.
    """
    require_model(model)
    layers = model.backbone.spec.layers
    depths = tuple(range(EVERY, layers, EVERY)) or tuple(range(1, layers))
    if not depths:
        raise UsageError(f"{model.backbone.spec.name} has {layers} block: there is no depth before it.")
    progress(0, 0, "answers")
    answers = [a for a in own_answers(model, prompts, max_new_tokens) if len(a.token_ids) > GRAM]
    if len(answers) < 4:
        raise UsageError(
            f"{len(answers)} of {len(prompts)} answers have more than {GRAM} tokens; at least 4 must, so give more."
        )
    own = [tuple(answer.token_ids) for answer in answers]
    texts = [KnownText.of_answer(a.prompt_ids, ids * REPEATS) for a, ids in zip(answers, own, strict=True)]
    shuffled = [tuple(random.Random(n).sample(ids, len(ids))) for n, ids in enumerate(own)]
    texts += [KnownText.of_answer(a.prompt_ids, ids) for a, ids in zip(answers, shuffled, strict=True)]
    said = [*(ids * REPEATS for ids in own), *shuffled]
    rows = []
    for n, seen in enumerate(forced_pass(model.backbone, texts, depths)):
        rows.append(_read(model, seen, said[n], depths))
        progress(n + 1, len(texts), "texts")
    return {"layers": layers, "depths": list(depths), "answers": len(own), **figures(own, rows, past)}


def _read(model: Model, seen: ForcedPass, ids: Sequence[int], depths: Sequence[int]) -> Columns:
    """Depth, surprise and entropy of each token of a text."""
    backbone = model.backbone
    full_N = full_tokens(backbone, seen.deep_ND)
    same_EN = np.array([(full_tokens(backbone, seen.hidden[d]) == full_N).numpy() for d in depths])
    logs_NV = torch.cat([logits.float().log_softmax(-1).cpu() for logits in full_logits(backbone, seen.deep_ND)])
    return {
        "depth": settled(same_EN, depths, model.backbone.spec.layers),
        "surprise": -logs_NV.gather(1, torch.tensor(ids)[:, None])[:, 0].double().numpy(),
        "entropy": -torch.xlogy(logs_NV.exp(), logs_NV.exp()).sum(1).double().numpy(),
        "predicted": full_N.numpy(),
    }


def settled(same_EN: np.ndarray, depths: Sequence[int], layers: int) -> np.ndarray:
    """The least depth from which on all exits agree with full depth; ``layers`` where the last one does not."""
    agreeing_N = np.cumprod(same_EN[::-1], 0).sum(0)
    return np.asarray(np.array([*depths, layers])[len(depths) - agreeing_N])


def figures(own: Sequence[tuple[int, ...]], rows: Sequence[Columns], past: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Slopes and means from what was read: first the texts of repeated answers, then the shuffled ones."""
    frequency = Counter(token for ids in own for token in ids)
    counts = Counter(gram for ids in past for gram in _grams(ids))
    each = [Counter(_grams(ids)) for ids in own]
    everywhere = sum(each, Counter[tuple[int, ...]]())
    made: dict[str, list[np.ndarray]] = {}
    for n, ids in enumerate(own):
        length, text = len(ids), rows[n]
        known = counts if past else everywhere - each[n]
        shuffled = rows[len(own) + n]
        place = np.arange(length)
        columns = {
            "prompt": np.full((REPEATS + 1) * length, n),
            "mention": np.concatenate([np.repeat(np.arange(1, REPEATS + 1), length), np.ones(length)]),
            "shuffled": np.repeat([0, 1], [REPEATS * length, length]),
            "count": np.tile([known[ids[max(0, t - GRAM + 1) : t + 1]] for t in range(length)], REPEATS + 1),
            "frequency": np.array([frequency[int(token)] + 1 for token in [*text["predicted"], *shuffled["predicted"]]]),
            "place": np.tile(place / length, REPEATS + 1),
            **{name: np.concatenate([text[name], shuffled[name]]) for name in ("depth", "surprise", "entropy")},
        }
        for name, values in columns.items():
            made.setdefault(name, []).append(values)
    whole = {name: np.concatenate(parts) for name, parts in made.items()}
    return {
        "repetition": _slope(whole, np.log2(whole["mention"]), whole["shuffled"] == 0),
        "count": _slope(whole, np.log2(1 + whole["count"]), (whole["shuffled"] == 0) & (whole["mention"] == 1)),
        "own_order": _slope(whole, 1.0 - whole["shuffled"], whole["mention"] == 1),
        "by_mention": [_means(whole, (whole["shuffled"] == 0) & (whole["mention"] == k)) for k in range(1, REPEATS + 1)],
        "shuffled": _means(whole, whole["shuffled"] == 1),
        "counted": _means(whole, (whole["shuffled"] == 0) & (whole["mention"] == 1) & (whole["count"] > 0)),
    }


def _grams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[t - GRAM : t]) for t in range(GRAM, len(ids) + 1)]


def _slope(whole: Columns, wanted: np.ndarray, mine: np.ndarray) -> dict[str, Any] | None:
    """The partial slope, with what is held equal; None where nothing varies."""
    if wanted[mine].std() < 1e-9:
        return None
    equal = np.column_stack([whole["surprise"], whole["entropy"], np.log(whole["frequency"]), whole["place"]])[mine]
    table = Table(wanted[mine], equal, whole["prompt"][mine])
    bare = Table(wanted[mine], equal[:, :0], whole["prompt"][mine])
    alone = partial_slope(bare, whole["depth"][mine].astype(np.float64)).value
    return {**partial_slope(table, whole["depth"][mine].astype(np.float64)).to_json(), "with_nothing_held_equal": alone}


def _means(whole: Columns, mine: np.ndarray) -> dict[str, Any]:
    if not mine.any():
        return {"tokens": 0}
    place = np.unique(whole["prompt"][mine], return_inverse=True)[1]
    depth_P = np.bincount(place, whole["depth"][mine]) / np.bincount(place)
    means = {name: float(whole[name][mine].mean()) for name in ("depth", "surprise", "entropy")}
    return {"tokens": int(mine.sum()), **means, "interval": middle(depth_P[resamples(len(depth_P))].mean(1))}
