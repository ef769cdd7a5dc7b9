"""The compiled pieces of one model, and its lanes: copies of them for one number of rows each, with all shapes fixed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from adi.errors import AdiError
from adi.model.backbone import Rows
from adi.model.openvino.graph import cut, fill_holes, fix_rows
from adi.model.openvino.huge_pages import gather_pages
from adi.model.openvino.inputs import Layout, PassInputs
from adi.model.openvino.kv_pool import SPARE, KVPool, PagedCache
from adi.model.openvino.manifest import Manifest
from adi.model.openvino.segment import Config, Head, Segment

ANY = 0  # the lane of pieces that take any number of rows
LANES = (1, 3, 8)
SETTLING_ROWS = 16
COMPILING = 2  # pieces at a time

Span = tuple[int, int, int]


class Segments:
    """Blocks [lo, hi) as compiled graphs, for any number of rows or, in a lane, for exactly so many.

    A graph with fixed shapes works no shapes out and plans its memory once: on two AVX-512 cores a token of SmolLM2-135M
    takes 6.8 instead of 7.8 ms at int4, and four rows 7.8 instead of 9.2. The bits are the same. Three rows are what most
    rounds want: a lane of four costs 0.9 ms more, for a third draft that is seldom right. A lane costs a copy of the
    weights and a second of compiling, in the background; until it is open, passes run on the pieces for any number of rows.
    """

    def __init__(self, core: Any, blocks: Any, head: Any, page: Manifest, config: Config, pool: KVPool) -> None:
        self._core, self._blocks, self._page, self._config, self._pool = core, blocks, page, config, pool
        self.lock = threading.Lock()
        self._head = head
        self.heads = {ANY: Head(core, head, config)}
        self.threads = self.heads[ANY].threads
        self.open: list[int] = []  # lanes, ascending
        self._segments: dict[Span, Segment] = {}
        self._paths: dict[Span, list[Segment]] = {}
        self._wanted: dict[int, tuple[int, ...]] = {}
        self._opening: threading.Thread | None = None

    def lane_for(self, rows: int, least: int, lo: int = 0, hi: int = 0) -> int:
        """The smallest open lane that holds so many rows and leads from ``lo`` to ``hi``, ``ANY`` where there is none.

        ``least``: a pass has no fewer rows. Holds the lock.
        """
        fitting = (lane for lane in self.open if max(rows, least) <= lane)
        return next((lane for lane in fitting if self._assembled(lo, hi, lane) is not None), ANY)

    def want(self, stops: Sequence[int], lanes: Sequence[int]) -> None:
        """Have these lanes opened, with pieces between these depths, once ``start`` is called. Holds the lock."""
        for lane in lanes:
            if lane not in self.open or self._missing(stops, lane):
                self._wanted[lane] = tuple(stops)

    def start(self) -> None:
        """Begin to open the lanes that are wanted, in the background. Holds the lock."""
        if self._wanted and self._opening is None:
            self._opening = threading.Thread(target=self._open_lanes, name="adi-lanes")
            self._opening.start()

    def wait(self) -> None:
        """Until no lane is being opened. Must not hold the lock."""
        opening = self._opening
        if opening is not None:
            opening.join()

    def _open_lanes(self) -> None:
        while True:
            with self.lock:
                lane = next(iter(self._wanted), None)
                if lane is None or _ending():
                    self._opening = None
                    break
                stops = self._wanted[lane]
            made = self._compiled(stops, lane)
            head = self.heads[lane] if lane in self.heads else self._fixed_head(lane)
            with self.lock:
                self._publish(made, lane)
                self.heads[lane] = head
                self.open = sorted({*self.open, lane})
                if self._wanted[lane] == stops:
                    del self._wanted[lane]
        if not _ending():
            gather_pages()  # once, when all is there: it would hold up a first answer by half a second

    def _fixed_head(self, lane: int) -> Head:
        graph = self._head.clone()
        fix_rows(graph, lane, 0, self._page.width)
        return Head(self._core, graph, self._config)

    def ready(self, stops: Sequence[int], lane: int = ANY) -> None:
        """Compile what is missing between these depths. Holds the lock."""
        self._publish(self._compiled(stops, lane), lane)

    def _ends(self, stops: Sequence[int], lane: int) -> tuple[int, ...]:
        """Where pieces end. What would be a single piece for any number of rows is made in two halves: a compiler works on one
        piece with one thread, so two take half the time before the first token, and cost a call of 0.3 ms in long passes."""
        layers = self._page.layers
        ends = {*stops, layers}
        return tuple(sorted(ends if lane or len(ends) > 1 or layers == 1 else {layers // 2, layers}))

    def _missing(self, stops: Sequence[int], lane: int) -> bool:
        """Whether this lane lacks a piece between two of these depths."""
        return any((*span, lane) not in self._segments for span in pairwise((0, *self._ends(stops, lane))))

    def _compiled(self, stops: Sequence[int], lane: int) -> list[Segment]:
        """The pieces between these depths that this lane lacks."""
        layers = self._page.layers
        if bad := [depth for depth in stops if not 0 < depth <= layers]:
            raise AdiError(f"stops {bad} do not exist; depths are 1 to {layers}.")
        if not self._missing(stops, lane):
            return []
        graph = self._blocks.clone()  # cutting leaves a graph in pieces
        fill_holes(graph, self._page.attentions)
        pieces = cut(graph, self._ends(stops, lane), self._page.width)
        missing = [p for p in pieces if (p.lo, p.hi, lane) not in self._segments]
        made = functools.partial(Segment, self._core, config=self._config)
        if lane:  # in the background, where a program that ends lets no new threads begin
            for piece in missing:
                fix_rows(piece.graph, lane, max(self.threads, lane), self._page.width)
            return [made(piece) for piece in missing]
        with ThreadPoolExecutor(COMPILING) as threads:
            return list(threads.map(made, missing))

    def _publish(self, made: Sequence[Segment], lane: int) -> None:
        for segment in made:
            segment.add_to(self._pool)
            self._segments[segment.lo, segment.hi, lane] = segment
        if made:
            self._settle(made, lane)
            self._paths.clear()

    def _settle(self, segments: Sequence[Segment], lane: int) -> None:
        """Run new pieces once, those for any number of rows over some: the plugin lays weights out for the first pass it sees.

        Measured on SmolLM2-135M at int4, two AMD cores with AVX-512: a token takes 7.9 ms after a first pass of 128 rows, and
        9.0 after one of a single row; 512 rows take 302 ms against 360. On two Intel cores it makes no difference whether the
        first pass has 1, 4, 16, 32, 64 or 128 rows, and 128 hold the first answer up by 0.15 s more than 16.
        """
        rows = lane or min(SETTLING_ROWS, self._page.context or SETTLING_ROWS)
        nobody = PagedCache(self._pool)
        nobody.blocks += [SPARE] * rows  # more than enough, and no memory that a sequence could want
        given = Rows(nobody, 0, (0,) * rows, None)
        layout = Layout.of([given], self.threads)
        self._pool.begin()
        feed = PassInputs(*layout.key, self._page.width)
        feed.fill([given], layout)
        for segment in segments:
            feed.room(f"state.{segment.lo}", (1, rows, self._page.width))
            segment.run(feed, self._pool)
        nobody.blocks.clear()

    def path(self, lo: int, hi: int, lane: int) -> list[Segment]:
        """The longest pieces of this lane that lead from ``lo`` to ``hi``; compiled where there are none. Holds the lock."""
        path = self._assembled(lo, hi, lane)
        if path is None:
            self.ready([depth for depth in (lo, hi) if depth], lane)
            path = self._assembled(lo, hi, lane)
        assert path is not None, "what was missing was compiled"
        return path

    def _assembled(self, lo: int, hi: int, lane: int) -> list[Segment] | None:
        """The longest pieces, one after the other, or None where one is missing."""
        if (lo, hi, lane) not in self._paths:
            path: list[Segment] = []
            while (at := path[-1].hi if path else lo) < hi:
                ends = [end for begin, end, mine in self._segments if mine == lane and begin == at and end <= hi]
                if not ends:
                    return None
                path.append(self._segments[at, max(ends), lane])
            self._paths[lo, hi, lane] = path
        return self._paths[lo, hi, lane]


def _ending() -> bool:
    """Whether the program is about to end and only waits for threads: nobody will use what is opened now."""
    return not threading.main_thread().is_alive()
