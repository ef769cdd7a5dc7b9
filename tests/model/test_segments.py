"""Shape buckets open in the background, whatever goes wrong with one of them; huge pages are asked for our memory only."""

from __future__ import annotations

import mmap
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from adi.model.openvino import OpenVinoBackbone
from adi.model.openvino.huge_pages import HugePages, mapped, without
from adi.model.openvino.segments import BUCKETS, Segments
from engines import Cached, engine, folder_of


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
