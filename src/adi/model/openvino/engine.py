"""``OpenVinoBackbone``: blocks [lo, hi) as compiled CPU graphs with paged attention over one KV memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adi.model.backbone import DraftNet, LightHead, ReadOut, Rows, Spec, States
from adi.model.openvino import store
from adi.model.openvino.feed import Feed, Layout
from adi.model.openvino.graph import cut, fill_holes
from adi.model.openvino.light import CompiledLightHead
from adi.model.openvino.pages import gather_pages
from adi.model.openvino.pool import SPARE, PagedCache, Pool
from adi.model.openvino.recurrent import CompiledDrafter, Embedding
from adi.model.openvino.segment import Config, Head, Segment
from adi.model.openvino.store import Page

if TYPE_CHECKING:
    from torch import Tensor

KV_BYTES = 2 << 30
SETTLING_ROWS = 128
KEPT_ROWS = 64  # feeds of passes up to here are kept for the next pass of the same shape
KEPT_FEEDS = 48
LANES = (4, 8)  # passes of up to so many rows, a lone one apart, are filled up to them and have compiled pieces of their own:
# a graph that is given another number of rows than the time before works its shapes out anew, for 5 to 10 ms of a pass of 20
CONFIG: Config = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",  # activations in 8 bits where weights are: the plugin's default, made explicit
}
KV_PRECISION = {"fp32": "f32", "int8": "f16", "int4": "f16"}


class OpenVinoBackbone:
    """An exported decoder that stops between any two blocks.

    Graphs are compiled for the spans that are asked for: ``prepare`` compiles those between the stops of a policy, and a
    pass takes the longest there are. Made by ``OpenVinoBackbone.open`` or ``make``. Rows of many sequences share a pass,
    whatever their lengths, and what a row gives does not depend on the rows beside it, in any precision
    (``rows_are_invariant`` measures it). Where a processor multiplies a lone row by another kernel, ``least_rows`` is 2: a
    lone row then runs beside one that counts for nothing.
    """

    def __init__(
        self,
        page: Page,
        blocks: Any,
        head: Any,
        *,
        folder: Path | None = None,
        kv_bytes: int = KV_BYTES,
        threads: int | None = None,
    ) -> None:
        import openvino as ov

        self.spec = Spec(
            name=page.name,
            family=page.family,
            layers=page.layers,
            width=page.width,
            vocabulary=page.vocabulary,
            stops=tuple(range(1, page.layers + 1)),
            context=page.context,
            fingerprint=page.fingerprint,
            backend="openvino",
            precision=page.precision,
            device="cpu",
        )
        self._page, self._folder = page, folder
        self._lock = threading.Lock()
        self._feeds: dict[tuple[int, int, int], Feed] = {}
        self.pool = Pool(kv_bytes)
        self._config = CONFIG | {"KV_CACHE_PRECISION": KV_PRECISION[page.precision]}
        if threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = str(threads)
        self.least_rows = 1
        self._companion = PagedCache(self.pool)
        self._companion.blocks.append(SPARE)
        self._core = ov.Core()
        self._blocks = blocks
        self._segments: dict[tuple[int, int, int], Segment] = {}
        self._paths: dict[tuple[int, int, int], list[Segment]] = {}
        self._opening: threading.Thread | None = None
        self._open: list[int] = []  # lanes, ascending
        self._head = Head(self._core, head, self._config)
        self._embedding = Embedding(self._core, blocks, self._config)
        self.threads = self._head.threads

    @classmethod
    def open(cls, folder: Path, *, kv_bytes: int = KV_BYTES, threads: int | None = None) -> OpenVinoBackbone:
        """An exported model from its folder; torch weights are not read.

        Args:
            folder: what ``make`` wrote.
            kv_bytes: the most that KV memory may take, all sequences together.
            threads: processor threads to use; by default the plugin's own choice.

        Raises:
            ValueError: a folder that is damaged or of another format.
        """
        import openvino as ov

        page = store.read_page(folder)
        blocks, head = store.read_graphs(folder, ov.Core())
        return cls(page, blocks, head, folder=folder, kv_bytes=kv_bytes, threads=threads)

    @property
    def has_mlp_tap(self) -> bool:
        return self._page.has_mlp

    def new_cache(self) -> PagedCache:
        return PagedCache(self.pool)

    def fits(self, wanted: Sequence[tuple[PagedCache, int]]) -> bool:
        """Whether the pool has blocks for these caches to grow to so many positions."""
        return self.pool.fits(wanted)

    def prepare(self, stops: Sequence[int], *, drafts: bool = False, wait: bool = False) -> None:
        """Compile one piece from each of these depths to the next, the beginning and the end included.

        One piece for the whole model is what full depth wants; every stop more costs a call, and buys the freedom to stop
        there. Pieces that are there already stay. ``drafts`` opens the lanes too, in the background unless ``wait``; passes
        do without a lane until it is open.
        """
        with self._lock:
            self._prepare(stops)
            if drafts and self._opening is None:
                self._opening = threading.Thread(target=self._open_lanes, args=(tuple(stops),), name="adi-lanes")
                self._opening.start()
        if wait and self._opening is not None:
            self._opening.join()

    def _open_lanes(self, stops: tuple[int, ...]) -> None:
        for lane in LANES:
            made = self._compiled(stops, lane)
            with self._lock:
                self._publish(made, lane)
                self._open.append(lane)

    def _prepare(self, stops: Sequence[int], lane: int = 0) -> None:
        self._publish(self._compiled(stops, lane), lane)

    def _compiled(self, stops: Sequence[int], lane: int) -> list[Segment]:
        """The pieces between these depths that this lane lacks."""
        layers = self.spec.layers
        if bad := [depth for depth in stops if not 0 < depth <= layers]:
            raise ValueError(f"stops {bad} do not exist; depths are 1 to {layers}.")
        ends = tuple(sorted({*stops, layers}))
        if all((*span, lane) in self._segments for span in zip((0, *ends), ends, strict=False)):
            return []
        graph = self._blocks.clone()  # cutting leaves a graph in pieces
        fill_holes(graph, self._page.attentions)
        pieces = cut(graph, ends, self.spec.width)
        missing = [piece for piece in pieces if (piece.lo, piece.hi, lane) not in self._segments]
        return [Segment(self._core, piece, self._config) for piece in missing]

    def _publish(self, made: Sequence[Segment], lane: int) -> None:
        for segment in made:
            segment.add_to(self.pool)
            self._segments[segment.lo, segment.hi, lane] = segment
        if made:
            self._settle(made)
            self._paths.clear()

    def _settle(self, segments: Sequence[Segment]) -> None:
        """Run new pieces once over many rows, because the plugin lays weights out for the first pass it sees.

        Measured on SmolLM2-135M at int4: a token takes 7.9 ms after a first pass of 128 rows, and 9.0 after one of a single
        row; 512 rows take 302 ms against 360.
        """
        rows = min(SETTLING_ROWS, self.spec.context or SETTLING_ROWS)
        nobody = PagedCache(self.pool)
        nobody.blocks += [SPARE] * rows  # more than enough, and no memory that a sequence could want
        given = Rows(nobody, 0, (0,) * rows, None)
        layout = Layout.of([given], self.threads)
        self.pool.begin()
        feed = Feed(*layout.key, self.spec.width)
        feed.fill([given], layout)
        for segment in segments:
            feed.room(f"state.{segment.lo}", (1, rows, self.spec.width))
            segment.run(feed, self.pool)
        nobody.blocks.clear()
        gather_pages()

    def peek(self, cache: PagedCache, block: int, length: int) -> Tensor | None:
        """Keys and values of the first positions as the plugin stores them; None where it packs them otherwise."""
        return self.pool.peek(cache, block, length)  # type: ignore[no-any-return]

    def forward(self, rows: Sequence[Rows], lo: int, hi: int, *, mlp: bool = False) -> list[States]:
        """Blocks [lo, hi) for all ``rows`` in one pass; ValueError for blocks that do not exist, MemoryFullError, before
        anything has run, where KV memory is full."""
        if not 0 <= lo < hi <= self.spec.layers:
            raise ValueError(f"blocks [{lo}, {hi}) do not exist; the model has blocks [0, {self.spec.layers})")
        count = sum(len(r.ids) for r in rows)
        lane = next((size for size in self._open if self.least_rows < count <= size), 0)
        if (missing := max(self.least_rows, lane) - count) > 0:
            given = None if lo == 0 else rows[0].hidden_TD
            nothing = None if given is None else given.new_zeros(missing, self.spec.width)
            rows = [*rows, Rows(self._companion, 0, (0,) * missing, nothing)]
            return self._forward(rows, lo, hi, mlp, lane)[:-1]
        return self._forward(rows, lo, hi, mlp, lane)

    def _forward(self, rows: Sequence[Rows], lo: int, hi: int, mlp: bool, lane: int) -> list[States]:
        layout = Layout.of(rows, self.threads)
        with self._lock:
            path = self._path(lo, hi, lane)
            self.pool.reserve([(r.cache, r.start + len(r.ids)) for r in rows])
            feed = self._feed(layout.key)
            feed.fill(rows, layout)
            if lo:
                feed.room(f"state.{lo}", (1, feed.rows, self.spec.width))
                feed.fill_state(f"state.{lo}", rows, layout)
            for segment in path:
                segment.run(feed, self.pool)
            return _states(feed, layout, path[-1], mlp and self.has_mlp_tap)

    def _path(self, lo: int, hi: int, lane: int) -> list[Segment]:
        """The longest pieces of this lane that lead from ``lo`` to ``hi``; compiled where there are none."""
        if (lo, hi, lane) not in self._paths:
            path: list[Segment] = []
            while (at := path[-1].hi if path else lo) < hi:
                ends = [end for begin, end, mine in self._segments if mine == lane and begin == at and end <= hi]
                if not ends:
                    self._prepare([depth for depth in (lo, hi) if depth], lane)
                    return self._path(lo, hi, lane)
                path.append(self._segments[at, max(ends), lane])
            self._paths[lo, hi, lane] = path
        return self._paths[lo, hi, lane]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """The model's own norm and head on states, ``[T, V]``."""
        import torch

        with self._lock:
            logits, _ = self._head.run(self._paired(hidden_TD))
            return torch.from_numpy(logits[0, : len(hidden_TD)].copy())

    def greedy(self, hidden_TD: Tensor) -> list[int]:
        with self._lock:
            _, token = self._head.run(self._paired(hidden_TD))
            return token[0, : len(hidden_TD)].tolist()  # type: ignore[no-any-return]

    def _paired(self, hidden_TD: Tensor) -> Any:
        """The states as an array, a lone one twice where ``least_rows`` asks for it."""
        array = hidden_TD.detach().numpy()
        return array.repeat(self.least_rows, 0) if len(array) < self.least_rows else array

    def light_head(self, head: LightHead) -> CompiledLightHead:
        """The exit head as a graph; its weights take 8 bits where the model's do."""
        return CompiledLightHead(self._core, head, self._config, self.spec.precision != "fp32")

    def embed(self, ids: Sequence[int]) -> Tensor:
        import torch

        with self._lock:
            return torch.from_numpy(self._embedding.run(ids))

    def draft_net(self, net: DraftNet) -> CompiledDrafter:
        """The drafter as a graph; its weights take 8 bits where the model's do."""
        return CompiledDrafter(self._core, net, self._config, self.spec.precision != "fp32")

    def readout(self) -> ReadOut:
        """The head taken apart, as it was at export."""
        if self._folder is None:
            raise ValueError("this engine was not opened from a folder, where the readout is kept.")
        return store.read_readout(self._folder, self._page)

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


def _states(feed: Feed, layout: Layout, last: Segment, mlp: bool) -> list[States]:
    """Each sequence's rows out of the feed's arrays, as tensors of their own."""
    import torch

    names = [f"state.{last.hi}", last.before, *([f"mlp.{last.hi}"] if mlp else [])]
    whole = [torch.from_numpy(feed.arrays[name].reshape(feed.rows, -1).copy()) for name in names]
    places = list(accumulate(layout.counts, initial=0))
    return [States(*(tensor[at : at + count] for tensor in whole)) for at, count in zip(places, layout.counts, strict=False)]
