"""Does a row's result depend on the rows beside it? Measured, because it depends on the kernels a machine gets."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adi.errors import FileError
from adi.files import read_json, write_json
from adi.machine import processor_hash
from adi.model.backbone import CHUNK, MERGED_ROWS, Rows
from adi.model.openvino.engine import OpenVinoBackbone
from adi.model.openvino.kv_pool import PagedCache
from adi.model.openvino.manifest import BFLOAT16
from adi.model.openvino.segments import BUCKETS

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS = 9
MERGED = (MERGED_ROWS, 32, 16)  # of several texts in one pass; to be found fit, or else as many as the longest bucket has
PAST = 28  # so that rows cross from the first block of KV memory into the second
PROMPT, PARTS = 200, (4, 40, 150)  # the length of a prompt, and the longest of its passes
SEED = 0


def rows_are_invariant(backbone: OpenVinoBackbone, most: int = MOST_ROWS, stops: Sequence[int] | None = None) -> bool:
    """Whether passes of 1 to ``most`` rows give the bits of state and logits that tokens one at a time give.

    The passes stop at random depths on the way, of all there are or of ``stops``, and are shared with a second sequence of
    random length. Takes some tens of passes.
    """
    allowed = [depth for depth in (backbone.spec.stops if stops is None else stops) if depth < backbone.spec.layers]
    import torch

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
        got_TD = _in_company(backbone, cache, mate, ids, past, count, rng.sample(allowed, rng.randrange(len(allowed) + 1)), rng)
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
    depths: Sequence[int],
    rng: random.Random,
) -> Tensor:
    """States of ``count`` rows after ``past``, stopped at ``depths``, beside rows of another sequence."""
    ends = (*sorted(depths), backbone.spec.layers)
    mates = ids[: rng.randrange(1, 4)]
    hidden_TD, mate_TD = None, None
    for lo, hi in zip((0, *ends), ends, strict=False):
        rows = [Rows(mate, past, mates, mate_TD), Rows(cache, past, ids[past : past + count], hidden_TD)]
        mate_TD, hidden_TD = (states.hidden_TD for states in backbone.forward(rows, lo, hi))
    assert hidden_TD is not None
    return hidden_TD


def settle_rows(backbone: OpenVinoBackbone, folder: Path) -> bool:
    """Make rows invariant if that can be had, by running lone rows in company if need be; whether they are.

    Found with a stop half-way, once on each kind of machine and for as many copies as memory holds, and kept beside the
    export: ``least_rows``, below zero where it holds without copies for fixed numbers of rows only, which are then forgone
    (with some families' rotary angles and gates the plugin fuses a graph of fixed shapes otherwise), or 0 where rows depend on
    their company whatever their number.
    """
    copies = backbone.copies
    room = min(len(BUCKETS), copies.memory_bytes // max(1, copies.copy_bytes))
    what = f"buckets {BUCKETS}, or none" if room == len(BUCKETS) else f"room for {room} of the buckets {BUCKETS}"
    least = _noted(backbone, folder, what, (-2, -1, 0, 1, 2), lambda: _least_rows(backbone))
    backbone.least_rows = max(1, abs(least))
    if least < 0:
        backbone.forgo_copies()
    return least != 0


def merged_rows(backbone: OpenVinoBackbone, folder: Path) -> int:
    """How many rows of two texts may share a pass and keep the bits that they have apart: found once on each kind of machine,
    with ``least_rows`` settled, and kept beside the export."""

    def find() -> int:
        return next((most for most in MERGED if _alike_apart(backbone, most)), BUCKETS[-1])

    return _noted(backbone, folder, "merged", (*MERGED, BUCKETS[-1]), find)


def prompt_chunk(backbone: OpenVinoBackbone, folder: Path) -> int:
    """``Spec.chunk``: 1 where a prompt has the same bits in whatever passes it is read, found once on each kind of machine,
    with ``least_rows`` settled, and kept beside the export; else that of any engine."""
    return _noted(backbone, folder, "prompts", (1, CHUNK), lambda: 1 if _parts_are_invariant(backbone) else CHUNK)


def _parts_are_invariant(backbone: OpenVinoBackbone) -> bool:
    """Whether states and KV memory of a prompt, the states of blocks of it and beside others, are the same in one pass and in
    passes of few and of many rows."""
    import torch

    rng, layers = random.Random(SEED), backbone.spec.layers
    length = min(PROMPT, backbone.spec.context or PROMPT)
    ids = tuple(rng.randrange(backbone.spec.vocabulary) for _ in range(length))

    def read(most: int) -> tuple[Tensor, list[Tensor | None]]:
        parts, start = [], 0
        with backbone.new_cache() as cache, backbone.new_cache() as mate:
            while start < length:
                rest = length - start
                rows = min(rest, rng.randrange(2, most + 1)) if most else rest
                rows += rest - rows == 1
                given = [Rows(cache, start, ids[start : start + rows], None, True), Rows(mate, 0, ids[:1], None)]
                parts.append(backbone.forward(given if most else given[:1], 0, layers)[0].hidden_TD)
                start += rows
            return torch.cat(parts), [backbone.peek(cache, block, length) for block in range(layers)]

    whole_TD, kept = read(0)
    for most in PARTS:
        parts_TD, memory = read(most)
        if not torch.equal(parts_TD, whole_TD):
            return False
        if not all(a is None or b is None or torch.equal(a, b) for a, b in zip(kept, memory, strict=True)):
            return False
    return True


def _noted(backbone: OpenVinoBackbone, folder: Path, what: str, allowed: Sequence[int], find: Callable[[], int]) -> int:
    """What was found on this kind of machine, by the note beside the export, or is found now and noted."""
    note = folder / "rows.json"
    found = read_json(note, "note about row invariance") if note.exists() else {}
    found = found if isinstance(found, dict) else {}
    kept = "" if backbone.spec.kv_precision == "auto" else f", KV memory in {backbone.spec.kv_precision}"
    kept += ", bfloat16" * backbone.spec.precision.endswith(BFLOAT16)
    machine = f"{processor_hash(what + kept)}-{backbone.spec.threads}"
    if isinstance(found.get(machine), bool) or found.get(machine) not in allowed:
        found[machine] = find()
        with contextlib.suppress(FileError):  # a folder that cannot be written is looked at again next time
            if folder.is_dir():  # not deleted meanwhile
                write_json(note, found)
    return int(found[machine])


def _alike_apart(backbone: OpenVinoBackbone, rows: int) -> bool:
    """Whether so many rows, two prompts, have the same states and logits together and apart."""
    import torch

    rng, context = random.Random(SEED), backbone.spec.context or rows
    counts = (min(rows - rows // 3, context), min(rows // 3, context))
    texts = [tuple(rng.randrange(backbone.spec.vocabulary) for _ in range(count)) for count in counts]

    def states(*which: tuple[int, ...]) -> list[Tensor]:
        given = [Rows(backbone.new_cache(), 0, text, None) for text in which]
        return [part.hidden_TD for part in backbone.forward(given, 0, backbone.spec.layers)]

    apart_TD, together_TD = torch.cat([*states(texts[0]), *states(texts[1])]), torch.cat(states(*texts))
    if not torch.equal(apart_TD, together_TD):
        return False
    return torch.equal(torch.cat([backbone.logits(row_D[None]) for row_D in apart_TD]), backbone.logits(apart_TD))


def _least_rows(backbone: OpenVinoBackbone) -> int:
    """How many rows a pass must have for its rows not to depend on each other: 1, 2, or 0 for no number; below zero where that
    is so without copies alone."""
    half = (max(1, backbone.spec.layers // 2),)
    for least in (1, 2):
        backbone.least_rows = least
        if rows_are_invariant(backbone, stops=half):
            backbone.prepare((), drafts=True, wait=True)  # and with buckets, once for all
            return least if rows_are_invariant(backbone, stops=half) else -least
    return 0
