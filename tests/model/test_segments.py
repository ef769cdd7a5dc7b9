"""Shape buckets open in the background, whatever goes wrong with one of them; huge pages are asked for our memory only."""

from __future__ import annotations

import mmap
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openvino")

from adi.model.backbone import Rows
from adi.model.openvino import OpenVinoBackbone
from adi.model.openvino.huge_pages import HugePages, mapped, without
from adi.model.openvino.segments import BUCKETS, Segments
from engines import IDS, PROMPT, Cached, engine, folder_of, prefilled


@pytest.fixture
def backbone(made: Cached) -> OpenVinoBackbone:
    engine(made, "llama")
    return OpenVinoBackbone.open(folder_of("llama"))


def failing(times: int) -> Any:
    """``Segments._open`` that fails at first, as it does when memory runs out while a graph is compiled."""
    plain, left = Segments._open, [times]

    def open_(self: Segments, bucket: int, stops: tuple[int, ...]) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("no memory left for this graph")
        plain(self, bucket, stops)

    return open_


def open_all(backbone: OpenVinoBackbone) -> None:
    segments = backbone._segments
    with segments.lock:
        segments.start()
    assert segments._opening is not None
    segments._opening.join()


@pytest.mark.filterwarnings("ignore:no graph for")
def test_one_bucket_that_fails_does_not_keep_the_others_shut(
    backbone: OpenVinoBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segments, "_open", failing(1))
    with pytest.raises(RuntimeError, match="no memory left for this graph"):
        backbone.prepare((), drafts=True, wait=True)
    assert backbone._segments.open == list(BUCKETS[1:])
    backbone.prepare((), drafts=True, wait=True)
    assert backbone._segments.open == list(BUCKETS), "what failed is tried again when it is asked for again"


def test_a_bucket_that_fails_in_the_background_is_a_warning(
    backbone: OpenVinoBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segments, "_open", failing(1))
    backbone.prepare(())
    with pytest.warns(RuntimeWarning, match="no graph for 1 rows, so passes are slower: no memory left"):
        open_all(backbone)


def test_a_pass_opens_only_what_it_could_run_on(backbone: OpenVinoBackbone) -> None:
    """A batch at full depth does not share its first second with the compiling of what a lone row runs on."""
    backbone.prepare(())
    with backbone.new_cache() as cache:
        backbone.forward([Rows(cache, 0, (1, 2, 3), None)], 0, 6)
        assert backbone._segments._opening is None
        assert not backbone._segments.open
        backbone.forward([Rows(cache, 3, (1,), None)], 0, 6)
    backbone._segments.wait()
    assert backbone._segments.open == list(BUCKETS[:1])


def test_what_two_sessions_request_of_a_bucket_is_opened_for_both(backbone: OpenVinoBackbone) -> None:
    segments = backbone._segments
    with segments.lock:
        segments.request((2, 4), BUCKETS)
        segments.request((), BUCKETS[:1])
        segments.start()
    segments.wait()
    assert segments.open == list(BUCKETS)
    spans = {(lo, hi) for lo, hi, bucket in segments._segments if bucket == BUCKETS[0]}
    assert spans == {(0, 2), (2, 4), (4, 6)}


def test_copies_of_the_weights_are_made_as_far_as_memory_holds_them(made: Cached) -> None:
    engine(made, "llama")
    copy_bytes = engine(made, "llama").copies.copy_bytes
    for copies, rows in ((0, ()), (1.5, BUCKETS[:1]), (2, BUCKETS[:2]), (3, BUCKETS)):
        backbone = OpenVinoBackbone.open(folder_of("llama"), memory=int(copies * copy_bytes))
        backbone.prepare((), drafts=True, wait=True)
        assert backbone.copies.rows == rows
        with backbone.without_copies():
            assert backbone.copies.rows == ()
        assert backbone.copies.rows == rows


def test_without_room_for_copies_a_stop_cuts_the_segments_that_are_there(made: Cached) -> None:
    engine(made, "llama")
    alone, roomy = (OpenVinoBackbone.open(folder_of("llama"), memory=memory) for memory in (0, 1 << 30))
    wanted = [(0, 3), (3, 6)]
    for backbone in (alone, roomy):
        backbone.prepare(())
        assert sorted(backbone._segments._parts[0]) == wanted
        backbone.prepare((2, 4))
        backbone.prepare((5,))
    assert sorted(alone._segments._parts[0]) == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert sorted(roomy._segments._parts[0]) == [(0, 2), (0, 3), (0, 5), (2, 4), (3, 6), (4, 6), (5, 6)]
    found = []
    for backbone in (alone, roomy):
        cache, states = prefilled(backbone, IDS[:PROMPT]), None
        for lo, hi in ((0, 2), (2, 5), (5, 6)):
            (states,) = backbone.forward([Rows(cache, PROMPT, IDS[PROMPT : PROMPT + 2], states)], lo, hi)
        assert states is not None
        found.append(states.hidden_TD)
    assert torch.equal(*found)
    assert {(lo, hi) for lo, hi, bucket in alone._segments._segments if not bucket} == alone._segments._parts[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_an_exports_files_are_let_go_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(8 << 20))
    (tmp_path / "link").symlink_to(tmp_path)
    with (tmp_path / "weights.bin").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as weights:
        with HugePages(tmp_path / "link").noting():
            assert not any(weights[:])
        (at,) = mapped(tmp_path)
        smaps = Path("/proc/self/smaps").read_text().split(f"{at[0]:x}-{at[1]:x}")[1]
        assert int(smaps.split("Rss:")[1].split()[0]) < 1 << 10
        assert weights[-1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_memory_that_was_there_before_or_came_later_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADI_HUGE_PAGES", raising=False)
    pages, size = HugePages(), 64 << 20
    sparse = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    with pages.noting():
        mine = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    later = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    assert size <= sum(high - low for low, high in pages.ranges) < 2 * size
    thread = pages.request()
    assert isinstance(thread, threading.Thread)
    thread.join()
    assert pages.request() is None, "once"
    assert mapped()
    for kept in (sparse, mine, later):
        kept.close()


def test_what_is_left_of_ranges_without_others() -> None:
    assert without([(0, 10), (20, 30)], [(0, 10)]) == [(20, 30)]
    assert without([(0, 30)], [(5, 10), (20, 40)]) == [(0, 5), (10, 20)]
    assert without([(0, 10)], [(10, 20)]) == [(0, 10)]


def test_huge_pages_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADI_HUGE_PAGES", "0")
    pages = HugePages()
    with pages.noting():
        more = mmap.mmap(-1, 64 << 20)
    assert pages.request() is None
    more.close()
