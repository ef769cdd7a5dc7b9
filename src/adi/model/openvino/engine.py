"""``OpenVinoBackbone``: blocks [lo, hi) as compiled CPU graphs with paged attention over one KV memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adi.model.backbone import ReadOut, Rows, Spec, States
from adi.model.openvino import store
from adi.model.openvino.feed import Feed, Layout
from adi.model.openvino.graph import cut, fill_holes
from adi.model.openvino.pool import PagedCache, Pool
from adi.model.openvino.segment import Config, Head, Segment
from adi.model.openvino.store import Page

KV_BYTES = 2 << 30
KEPT_ROWS = 64  # feeds of passes up to here are kept for the next pass of the same shape
KEPT_FEEDS = 48
CONFIG: Config = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",  # activations in 8 bits where weights are: the plugin's default, made explicit
}


class OpenVinoBackbone:
    """An exported decoder that stops at ``spec.stops``.

    Made by ``OpenVinoBackbone.open`` or ``make``. Rows of many sequences share a pass, whatever their lengths, and what a
    row gives does not depend on the rows beside it, in any precision (``rows_are_invariant`` measures it).
    """

    def __init__(
        self,
        page: Page,
        blocks: Any,
        head: Any,
        *,
        folder: Path | None = None,
        stops: Sequence[int] = (),
        kv_bytes: int = KV_BYTES,
        threads: int | None = None,
    ) -> None:
        import openvino as ov

        depths = store.default_stops(page.layers, stops)
        self.spec = Spec(
            name=page.name,
            family=page.family,
            layers=page.layers,
            width=page.width,
            vocabulary=page.vocabulary,
            stops=depths,
            context=page.context,
            fingerprint=page.fingerprint,
            backend="openvino",
            precision=page.precision,
            device="cpu",
        )
        self._page, self._folder = page, folder
        self._lock = threading.Lock()
        self._feeds: dict[tuple[int, int, int], Feed] = {}
        self._heads: dict[int, Feed] = {}
        self.pool = Pool(kv_bytes)
        config = CONFIG | ({} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)})
        core = ov.Core()
        fill_holes(blocks, page.attentions)
        self._segments = {piece.lo: Segment(core, piece, config) for piece in cut(blocks, depths, page.width)}
        self._head = Head(core, head, config)
        for segment in self._segments.values():
            segment.add_to(self.pool)

    @classmethod
    def open(
        cls, folder: Path, *, stops: Sequence[int] = (), kv_bytes: int = KV_BYTES, threads: int | None = None
    ) -> OpenVinoBackbone:
        """An exported model from its folder; torch weights are not read.

        Args:
            folder: what ``make`` wrote.
            stops: depths to stop at beside the default ones (about every eighth of the layers).
            kv_bytes: the most that KV memory may take, all sequences together.
            threads: processor threads to use; by default the plugin's own choice.

        Raises:
            ValueError: a folder that is damaged or of another format, stops that do not exist.
        """
        import openvino as ov

        page = store.read_page(folder)
        blocks, head = store.read_graphs(folder, ov.Core())
        return cls(page, blocks, head, folder=folder, stops=stops, kv_bytes=kv_bytes, threads=threads)

    @property
    def has_mlp_tap(self) -> bool:
        return self._page.has_mlp

    def new_cache(self) -> PagedCache:
        return PagedCache(self.pool)

    def forward(self, rows: Sequence[Rows], lo: int, hi: int, *, mlp: bool = False) -> list[States]:
        """Blocks [lo, hi) for all ``rows`` in one pass; ValueError where no segment begins or ends there, and, before
        anything has run, where KV memory is full."""
        self._check_span(lo, hi)
        layout = Layout.of(rows)
        starts = [stop for stop in (0, *self.spec.stops) if lo <= stop < hi]
        with self._lock:
            self.pool.reserve([(r.cache, r.start + n) for r, n in zip(rows, layout.padded, strict=True)])
            feed = self._feed(layout.key)
            feed.fill(rows, layout)
            if lo:
                feed.room(f"state.{lo}", (1, feed.rows, self.spec.width))
                feed.fill_state(f"state.{lo}", rows, layout)
            for start in starts:
                self._segments[start].run(feed, self.pool)
            last = self._segments[starts[-1]]
            return _states(feed, layout, last, mlp and self.has_mlp_tap)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """The model's own norm and head on states, ``[T, V]``."""
        with self._lock:
            logits, _ = self._run_head(hidden_TD)
            return torch.from_numpy(logits[0, : hidden_TD.shape[0]].copy())

    def greedy(self, hidden_TD: Tensor) -> list[int]:
        """The likeliest token of each of T states, found inside the graph."""
        with self._lock:
            _, token = self._run_head(hidden_TD)
            return token[0, : hidden_TD.shape[0]].tolist()  # type: ignore[no-any-return]

    def readout(self) -> ReadOut:
        """The head taken apart, as it was at export."""
        if self._folder is None:
            raise ValueError("this engine was not opened from a folder, where the readout is kept.")
        return store.read_readout(self._folder, self._page)

    def _check_span(self, lo: int, hi: int) -> None:
        stops = self.spec.stops
        if lo >= hi or lo not in (0, *stops) or hi not in stops:
            raise ValueError(f"blocks [{lo}, {hi}) cannot be run; this engine stops at 0 and {', '.join(map(str, stops))}.")

    def _feed(self, key: tuple[int, int, int]) -> Feed:
        """The feed for passes of this shape; the oldest goes when there are too many."""
        feed = self._feeds.get(key)
        if feed is None:
            feed = Feed(*key, self.spec.width)
            if feed.rows <= KEPT_ROWS:
                if len(self._feeds) >= KEPT_FEEDS:
                    del self._feeds[next(iter(self._feeds))]
                self._feeds[key] = feed
        return feed

    def _run_head(self, hidden_TD: Tensor) -> tuple[Any, Any]:
        rows = max(2, hidden_TD.shape[0])  # a lone row is doubled, as in every pass
        feed = self._heads.get(rows)
        if feed is None:
            feed = Feed(rows, 1, 1, self.spec.width)
            if rows <= KEPT_ROWS:
                self._heads[rows] = feed
        feed.arrays["state.0"][0, :] = hidden_TD.detach().numpy()
        return self._head.run(feed)


def _states(feed: Feed, layout: Layout, last: Segment, mlp: bool) -> list[States]:
    """Each sequence's rows out of the feed's arrays, as tensors of their own."""
    names = [f"state.{last.hi}", last.before, *([f"mlp.{last.hi}"] if mlp else [])]
    whole = [torch.from_numpy(feed.arrays[name].reshape(feed.rows, -1).copy()) for name in names]
    begins = feed.arrays["subsequence_begins"].tolist()
    return [
        States(*(tensor[begin : begin + count] for tensor in whole))
        for (begin, _), count in zip(pairwise(begins), layout.counts, strict=True)
    ]
