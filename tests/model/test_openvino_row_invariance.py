"""Rows of the compiled engine: their bits hang neither on their number, nor on their company, nor on where blocks are cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openvino")

from adi.model.backbone import Rows, States
from adi.model.openvino import OpenVinoBackbone, export_and_open
from adi.model.openvino.engine import evened
from adi.model.openvino.graph import BLOCK_TOKENS
from adi.model.openvino.row_invariance import merged_rows, rows_are_invariant, settle_rows
from adi.model.openvino.segments import BUCKETS
from engines import IDS, PRECISIONS, PROMPT, Cached, engine, folder_of, model_of, prefilled
from families import LAYERS


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rows_bits_do_not_depend_on_its_company(made: Cached, precision: str) -> None:
    backbone = engine(made, "llama", precision)
    assert rows_are_invariant(backbone)
    layers, rng, stops = backbone.spec.layers, random.Random(1), backbone.spec.stops
    plain = prefilled(backbone, IDS[:PROMPT])
    wanted = [backbone.forward([Rows(plain, i, (IDS[i],), None)], 0, layers)[0].hidden_TD for i in range(PROMPT, PROMPT + 9)]
    logits_TV = torch.cat([backbone.logits(row) for row in wanted])
    for count in range(1, 10):
        caches = [prefilled(backbone, ids) for ids in (IDS[:PROMPT], IDS[20:33], IDS[3:53])]
        hidden: list[Any] = [None] * 3
        depths = sorted({*rng.sample(stops, 2), layers})
        ids = (IDS[PROMPT : PROMPT + count], IDS[: rng.randrange(1, 4)], IDS[7:8])
        order = rng.sample(range(3), 3)
        for lo, hi in zip((0, *depths), depths, strict=False):
            rows = [Rows(caches[i], (PROMPT, 13, 50)[i], ids[i], hidden[i]) for i in order]
            for i, states in zip(order, backbone.forward(rows, lo, hi), strict=True):
                hidden[i] = states.hidden_TD
        assert torch.equal(hidden[0], torch.cat(wanted[:count]))
        assert torch.equal(backbone.logits(hidden[0]), logits_TV[:count])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [(1, 1), (9, 9), (32, 32), (33, 40), (40, 40), (73, 80), (128, 128), (129, 144), (257, 288), (5000, 5024)],
)
def test_long_passes_are_filled_up(rows: int, wanted: int) -> None:
    assert evened(rows) == wanted
    assert wanted - rows < BLOCK_TOKENS, "what is filled in has one block of KV memory"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_fills_a_pass_up_changes_no_bits_and_takes_no_memory(made: Cached, precision: str) -> None:
    backbone = engine(made, "llama", precision)
    layers, whole, parts = backbone.spec.layers, backbone.new_cache(), backbone.new_cache()
    spare = backbone.pool.used
    (states,) = backbone.forward([Rows(whole, 0, IDS[:51], None)], 0, layers)
    assert states.hidden_TD.shape[0] == 51
    assert {rows for rows, _, _ in backbone._inputs} >= {56}
    assert backbone.pool.used == spare + 2
    split = [backbone.forward([Rows(parts, lo, IDS[lo:hi], None)], 0, layers)[0].hidden_TD for lo, hi in ((0, 16), (16, 51))]
    assert torch.equal(states.hidden_TD, torch.cat(split))


def test_the_check_notices_rows_that_vary(made: Cached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backbone = engine(made, "llama")
    logits = backbone.logits
    monkeypatch.setattr(backbone, "logits", lambda hidden_TD: logits(hidden_TD) + 1e-6 * (hidden_TD.shape[0] > 4))
    assert not rows_are_invariant(backbone)
    assert not settle_rows(backbone, tmp_path)


def test_lone_rows_run_in_company_where_another_kernel_takes_them(
    made: Cached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone = engine(made, "llama")
    monkeypatch.setattr(backbone, "least_rows", 1)
    plain = backbone._forward

    def lone_rows_differ(rows: Any, lo: int, hi: int, mlp: bool, bucket: int) -> Any:
        states = plain(rows, lo, hi, mlp, bucket)
        lone = sum(len(r.ids) for r in rows) == 1
        return [States(s.hidden_TD + 1e-3, s.before_TD, s.mlp_TF) for s in states] if lone else states

    monkeypatch.setattr(backbone, "_forward", lone_rows_differ)
    assert not rows_are_invariant(backbone)
    assert settle_rows(backbone, tmp_path)
    assert backbone.least_rows == 2
    assert rows_are_invariant(backbone)
    monkeypatch.setattr(backbone, "least_rows", 1)
    monkeypatch.setattr("adi.model.openvino.row_invariance.rows_are_invariant", None)  # the note answers now
    assert settle_rows(backbone, tmp_path)
    assert backbone.least_rows == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_however_the_blocks_are_cut_the_bits_are_the_same(made: Cached, precision: str) -> None:
    """Full depth in one segment, and through the segments of a policy, over prompts attended as a whole and row by row."""
    engine(made, "llama", precision)
    wanted = None
    for stops in ((), (2,), (1, 3), tuple(range(1, LAYERS))):
        backbone = OpenVinoBackbone.open(folder_of("llama", precision))
        backbone.prepare(stops)
        cache = backbone.new_cache()
        long = tuple(i % 64 for i in range(100))
        found = [
            backbone.forward([Rows(cache, 0, long[:80], None)], 0, LAYERS)[0].hidden_TD,
            backbone.forward([Rows(cache, 80, long[80:], None)], 0, LAYERS)[0].hidden_TD,
        ]
        wanted = found if wanted is None else wanted
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def unopened() -> OpenVinoBackbone:
    """An engine that has opened no bucket: the check of rows, which opens them, was done by one before it."""
    export_and_open(model_of("llama"), name="llama", precision="int8")
    backbone = export_and_open(model_of("llama"), name="llama", precision="int8")
    assert backbone._segments.open == []
    return backbone


def test_buckets_open_in_the_background_and_change_no_bits(made: Cached) -> None:
    backbone = unopened()
    segments = backbone._segments
    backbone.prepare(())
    assert segments._opening is None, "nothing opens before there is a short pass"
    cache = prefilled(backbone, IDS[:PROMPT])
    assert segments._opening is None
    counts = range(1, 10)
    segments._wanted.clear()
    without = [backbone.forward([Rows(cache, PROMPT, IDS[PROMPT : PROMPT + n], None)], 0, LAYERS)[0].hidden_TD for n in counts]
    scores = [backbone.logits(hidden_TD) for hidden_TD in without]
    assert segments.open == []
    backbone.prepare((), drafts=True, wait=True)
    buckets = [max(backbone.least_rows, bucket) for bucket in BUCKETS]  # on some processors a lone row runs in company
    assert segments.open == buckets
    for n, wanted, logits_TV in zip(counts, without, scores, strict=True):
        (states,) = backbone.forward([Rows(cache, PROMPT, IDS[PROMPT : PROMPT + n], None)], 0, LAYERS)
        assert torch.equal(states.hidden_TD, wanted)
        assert torch.equal(backbone.logits(wanted), logits_TV)
        assert backbone.greedy(wanted) == logits_TV.argmax(-1).tolist()
    assert {bucket for _, _, bucket in segments._segments} == {0, *buckets}


def test_a_bucket_opens_with_the_first_short_pass(made: Cached) -> None:
    backbone = unopened()
    backbone.prepare((2,))
    cache = prefilled(backbone, IDS[:PROMPT])
    backbone.forward([Rows(cache, PROMPT, IDS[PROMPT : PROMPT + 1], None)], 0, LAYERS)
    backbone._segments.wait()
    assert backbone._segments.open == [backbone.least_rows], "full depth needs a bucket for lone rows only"
    assert {(lo, hi) for lo, hi, bucket in backbone._segments._segments if bucket} == {(0, 2), (2, LAYERS)}


def test_where_copies_would_change_bits_there_are_none(made: Cached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with GLM 4 or Cohere 2: bits go before speed."""
    engine(made, "llama")
    looks: list[tuple[int, ...]] = []

    def invariant(backbone: OpenVinoBackbone, *given: Any, **options: Any) -> bool:
        looks.append(backbone.copies.rows)
        return not backbone.copies.rows

    monkeypatch.setattr("adi.model.openvino.row_invariance.rows_are_invariant", invariant)
    for expected in ([(), BUCKETS], []):  # the second is told by the note
        backbone = OpenVinoBackbone.open(folder_of("llama"))
        looks.clear()
        assert settle_rows(backbone, tmp_path)
        assert looks == expected
        assert backbone.least_rows == 1
        backbone.prepare((), drafts=True, wait=True)
        assert backbone.copies.rows == ()
        cache = prefilled(backbone, IDS[:PROMPT])
        assert len(backbone.forward([Rows(cache, PROMPT, IDS[PROMPT : PROMPT + 3], None)], 0, LAYERS)[0]) == 3


def test_copies_are_looked_at_where_memory_holds_them_first(
    made: Cached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A note that was made without copies says nothing of those that a later load has room for."""
    engine(made, "llama")
    invariant = lambda backbone, *_, **__: not backbone.copies.rows  # noqa: E731
    monkeypatch.setattr("adi.model.openvino.row_invariance.rows_are_invariant", invariant)
    assert settle_rows(OpenVinoBackbone.open(folder_of("llama"), memory=0), tmp_path)
    backbone = OpenVinoBackbone.open(folder_of("llama"))
    assert settle_rows(backbone, tmp_path)
    backbone.prepare((), drafts=True, wait=True)
    assert backbone.copies.rows == ()


def test_how_many_rows_of_several_texts_may_share_a_pass_is_found_once(
    made: Cached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone = engine(made, "llama")
    plain = backbone._forward

    def long_passes_differ(rows: Any, lo: int, hi: int, mlp: bool, bucket: int) -> Any:
        states = plain(rows, lo, hi, mlp, bucket)
        long = sum(len(r.ids) for r in rows) > 40
        return [States(s.hidden_TD + 1e-3, s.before_TD, s.mlp_TF) for s in states] if long else states

    assert merged_rows(backbone, tmp_path / "before") == 64
    monkeypatch.setattr(backbone, "_forward", long_passes_differ)
    assert merged_rows(backbone, tmp_path) == 32
    monkeypatch.setattr(backbone, "_forward", plain)
    assert merged_rows(backbone, tmp_path) == 32, "the note answers now"
    (tmp_path / "rows.json").write_text('{"other": 3}')
    logits = backbone.logits
    monkeypatch.setattr(backbone, "logits", lambda hidden_TD: logits(hidden_TD) + 1e-6 * (hidden_TD.shape[0] > 8))
    assert merged_rows(backbone, tmp_path) == BUCKETS[-1]
