"""Does a row's result depend on the rows beside it? Measured, because it depends on the kernels a machine gets."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from adi.model.backbone import Rows
from adi.model.openvino.engine import OpenVinoBackbone
from adi.model.openvino.pool import PagedCache

MOST_ROWS = 9
PAST = 28  # so that rows cross from the first block of KV memory into the second
SEED = 0


def rows_are_invariant(backbone: OpenVinoBackbone, most: int = MOST_ROWS) -> bool:
    """Whether passes of 1 to ``most`` rows give the bits of state and logits that tokens one at a time give.

    The passes stop at random depths on the way and are shared with a second sequence of random length. Takes some tens of
    passes.
    """
    rng = random.Random(SEED)
    ids = tuple(rng.randrange(backbone.spec.vocabulary) for _ in range(min(PAST + most, backbone.spec.context or PAST + most)))
    past, layers = max(1, len(ids) - most), backbone.spec.layers
    plain = _prefilled(backbone, ids, past)
    wanted_TD = torch.cat(
        [backbone.forward([Rows(plain, i, ids[i : i + 1], None)], 0, layers)[0].hidden_TD for i in range(past, len(ids))]
    )
    wanted_TV = torch.cat([backbone.logits(row_D[None]) for row_D in wanted_TD])
    cache, mate = _prefilled(backbone, ids, past), _prefilled(backbone, ids[::-1], past)
    for count in range(1, len(ids) - past + 1):
        got_TD = _in_company(backbone, cache, mate, ids, past, count, rng)
        if not (torch.equal(got_TD, wanted_TD[:count]) and torch.equal(backbone.logits(got_TD), wanted_TV[:count])):
            return False
    return True


def _prefilled(backbone: OpenVinoBackbone, ids: tuple[int, ...], past: int) -> PagedCache:
    cache = backbone.new_cache()
    backbone.forward([Rows(cache, 0, ids[:past], None)], 0, backbone.spec.layers)
    return cache


def _in_company(
    backbone: OpenVinoBackbone,
    cache: PagedCache,
    mate: PagedCache,
    ids: tuple[int, ...],
    past: int,
    count: int,
    rng: random.Random,
) -> Tensor:
    """States of ``count`` rows after ``past``, stopped at random depths, beside rows of another sequence."""
    stops = backbone.spec.stops
    depths = sorted({*rng.sample(stops, rng.randrange(len(stops) + 1)), stops[-1]})
    mates = ids[: rng.randrange(1, 4)]
    hidden_TD, mate_TD = None, None
    for lo, hi in zip((0, *depths), depths, strict=False):
        rows = [Rows(mate, past, mates, mate_TD), Rows(cache, past, ids[past : past + count], hidden_TD)]
        mate_TD, hidden_TD = (states.hidden_TD for states in backbone.forward(rows, lo, hi))
    assert hidden_TD is not None
    return hidden_TD
