"""The compiled segments of one model, and its shape buckets: copies of them for one number of rows each, all shapes fixed."""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from adi.errors import UsageError
from adi.machine import give_back_memory
from adi.model.backbone import Rows
from adi.model.openvino.graph import SegmentGraph, constant_bytes, cut, embedding_graph, fill_holes, fix_rows
from adi.model.openvino.huge_pages import HugePages
from adi.model.openvino.inputs import Layout, PassInputs
from adi.model.openvino.kv_pool import KVPool, PagedCache
from adi.model.openvino.manifest import Manifest
from adi.model.openvino.turns import cuts, spans

ANY = 0  # the bucket of segments that take any number of rows
BUCKETS = (1, 3, 8)
WARM_UP_ROWS = 16
COMPILING = 2  # segments at a time
COPIES_BYTES = 350_000_000  # what copies of the weights may take together by default: three of the default model

Config = dict[str, str]
Span = tuple[int, int, int]


class Segment:
    """Blocks [lo, hi) with a single request, reading states from the inputs' ``state.lo`` and leaving them in ``state.hi``.

    Of a looped model there is one for each turn, all of one compiled graph, which differ in the KV blocks that they see.
    It also leaves ``before.hi``, what entered block ``hi - 1`` (``state.lo`` itself for a single block), and ``mlp.hi``.
    Tensors are bound only when they change.
    """

    def __init__(self, compiled: Any, outputs: Sequence[str], span: tuple[int, int], turn: int | None, turns: int) -> None:
        (self.lo, self.hi), self._turns = span, turns
        self._request = compiled.create_infer_request()
        names = [_name(port) for port in compiled.inputs]
        arrays = {"hidden": f"state.{self.lo}"} | ({} if turn is None else {"block_indices": f"block_indices.{turn}"})
        self._inputs = {name: arrays.get(name, name) for name in names if "_cache." not in name}
        renamed = {"hidden": f"state.{self.hi}", "before": f"before.{self.hi}", "mlp": f"mlp.{self.hi}"}
        self._outputs = [(renamed[name], _sizes(port)) for name, port in zip(outputs, compiled.outputs, strict=True)]
        self.before = f"before.{self.hi}" if "before" in outputs else f"state.{self.lo}"
        self._bound: PassInputs | None = None
        self._version = -1
        self._ports = {name: port for name, port in zip(names, compiled.inputs, strict=True) if "_cache." in name}

    def add_to(self, pool: KVPool) -> None:
        """Ask the pool for room for these blocks' keys and values."""
        for name, port in self._ports.items():
            pool.add(name, port, self._turns)
        self._version = -1

    def run(self, inputs: PassInputs, pool: KVPool) -> None:
        """One pass over the rows in ``inputs``."""
        if self._version != pool.version:
            for name in self._ports:
                self._request.set_tensor(name, pool.tensors[name])
            self._version = pool.version
        if self._bound is not inputs:
            for name, source in self._inputs.items():
                self._request.set_tensor(name, inputs.tensors[source])
            for i, (name, sizes) in enumerate(self._outputs):
                self._request.set_output_tensor(i, inputs.room(name, [inputs.rows if n is None else n for n in sizes]))
            self._bound = inputs
        self._request.infer(share_outputs=True)


def _name(port: Any) -> str:
    """The name that this package gave an input; the plugin may add others, numbers."""
    return str(next(name for name in sorted(port.get_names()) if not name.isdigit()))


def _sizes(port: Any) -> list[int | None]:
    """Lengths of an output's axes, None for the one that counts rows."""
    return [None if size.is_dynamic else size.get_length() for size in list(port.get_partial_shape())]


@dataclass(frozen=True)
class Copies:
    """Copies of the blocks' weights: what each takes, what all may take, and for which numbers of rows there are any."""

    copy_bytes: int
    memory_bytes: int
    rows: tuple[int, ...]


class Head:
    """The model's own norm and head: states ``[T, D]`` to logits ``[1, T, V]`` and the likeliest tokens ``[1, T]``."""

    def __init__(self, core: Any, graph: Any, config: Config) -> None:
        compiled = core.compile_model(graph, "CPU", config)
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self._request = compiled.create_infer_request()
        self._counts_rows = any(port.get_any_name() == "position_ids" for port in compiled.inputs)
        self._rows = 0

    def run(self, hidden_TD: Any, least: int = 1) -> tuple[Any, Any]:
        """Arrays of logits and tokens, valid until the next run; ``least``: run so many rows, of which the last are padding."""
        import openvino as ov

        rows = max(least, hidden_TD.shape[0])
        if rows != self._rows:
            self._hidden = np.zeros((1, rows, hidden_TD.shape[1]), np.float32)
            self._request.set_tensor("hidden", ov.Tensor(self._hidden, shared_memory=True))
            if self._counts_rows:
                self._request.set_tensor("position_ids", ov.Tensor(np.zeros((1, rows), np.int64)))
            self._rows = rows
        self._hidden[0, : len(hidden_TD)] = hidden_TD
        self._request.infer(share_outputs=True)
        return self._request.get_output_tensor(0).data, self._request.get_output_tensor(1).data


class Segments:
    """Blocks [lo, hi) as compiled graphs, for any number of rows or, in a shape bucket, for exactly so many.

    A graph with fixed shapes works no shapes out and plans its memory once: on two AVX-512 cores a token of SmolLM2-135M
    takes 6.8 instead of 7.8 ms at int4, and four rows 7.8 instead of 9.2. The bits are the same. Three rows are what most
    rounds want: a bucket of four costs 0.9 ms more, for a third draft that is seldom right. A bucket costs a second of
    compiling, in the background (until it is open, passes run on the segments for any number of rows), and a copy of the
    blocks' weights, since every compiled graph packs its own; the head, which is no faster so, is held once. Segments that
    overlap are copies too. Copies are made as far as ``memory`` bytes hold them; where they do not, cuts are added to the
    segments that are there.
    """

    def __init__(
        self,
        core: Any,
        blocks: Any,
        head: Any,
        manifest: Manifest,
        configs: tuple[Config, Config],
        pool: KVPool,
        memory: int = COPIES_BYTES,
        folder: Path | None = None,
    ) -> None:
        self._core, self._blocks, self._manifest, self._config, self._pool = core, blocks, manifest, configs[0], pool
        self.lock = threading.Lock()
        self.memory = 0 if manifest.experts else memory  # with fixed shapes the plugin runs all experts of a choice
        self.copy_bytes = constant_bytes(blocks) - constant_bytes(embedding_graph(blocks))  # that is read where it lies
        self._parts: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)  # of the graph, compiled, by bucket
        self._pages = HugePages(folder)
        with self._pages.noting():
            self.head = Head(core, head, configs[1])
            self.head.run(np.zeros((1, manifest.width), np.float32))  # which packs its weights
        self.threads = self.head.threads
        self.open: list[int] = []  # buckets, ascending
        self._segments: dict[Span, Segment] = {}
        self._paths: dict[Span, list[Segment]] = {}
        self._wanted: dict[int, tuple[int, ...]] = {}  # stops by bucket
        self._failed: dict[int, Exception] = {}  # by bucket, until it is requested again
        self._opening: threading.Thread | None = None

    def bucket_for(self, rows: int, least: int, lo: int = 0, hi: int = 0) -> int:
        """The smallest open bucket that holds so many rows and leads from ``lo`` to ``hi``, ``ANY`` where there is none.

        ``least``: a pass has no fewer rows. Holds the lock.
        """
        fitting = (bucket for bucket in self.open if max(rows, least) <= bucket)
        return next((bucket for bucket in fitting if self._assembled(lo, hi, bucket) is not None), ANY)

    def request(self, stops: Sequence[int], buckets: Sequence[int]) -> None:
        """Have these buckets opened, with segments between these depths and those that others requested, once ``start`` is
        called, as far as memory allows. What failed before is tried again. Holds the lock."""
        for bucket in buckets:
            self._failed.pop(bucket, None)
            wanted = tuple(sorted({*self._wanted.get(bucket, ()), *stops}))
            if (bucket not in self.open or self._missing(stops, bucket)) and self._room({**self._wanted, bucket: wanted}) >= 0:
                self._wanted[bucket] = wanted

    def _room(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """The bytes that are left for copies once these buckets have segments between these stops."""
        buckets = {*self._parts, *wanted}
        parts = [part for b in buckets for part in {*self._parts[b], *(self._missing(wanted[b], b) if b in wanted else ())}]
        packed = self.copy_bytes * sum(hi - lo for lo, hi in parts) // len(self._manifest.holes)
        return int(self.memory + self.copy_bytes - packed)

    def start(self, rows: int = 1) -> None:
        """Begin to open the buckets that are requested, in the background, if one of them holds so many rows: a batch at full
        depth does not wait for what only a lone row runs on. Holds the lock."""
        if self._opening is None and any(rows <= bucket for bucket in self._wanted):
            self._opening = threading.Thread(target=self._open_buckets, name="adi-buckets")
            self._opening.start()

    def wait(self) -> None:
        """Until no bucket is being opened; raises what went wrong with one. Must not hold the lock."""
        opening = self._opening
        if opening is not None:
            opening.join()
        if self._failed:
            raise next(iter(self._failed.values()))

    def _open_buckets(self) -> None:
        while True:
            with self.lock:
                if not self._wanted or _ending():
                    self._opening = None
                    break
                bucket, stops = next(iter(self._wanted.items()))
            try:
                self._open(bucket, stops)
            except Exception as error:  # whatever it is, passes run without this bucket, and others can still open
                self._failed[bucket] = error
                warnings.warn(f"no graph for {bucket} rows, so passes are slower: {error}", RuntimeWarning, stacklevel=1)
            with self.lock:
                if self._wanted[bucket] == stops:  # or more was requested meanwhile
                    del self._wanted[bucket]
        if not _ending():
            self._pages.request()  # once, when all is there: it would hold up a first answer by half a second

    def _open(self, bucket: int, stops: tuple[int, ...]) -> None:
        with self._pages.noting():
            made = self._compiled(self._cuts(stops, bucket), bucket)
            with self.lock:
                self._publish(*made, bucket)
                self.open = sorted({*self.open, bucket})

    def ready(self, stops: Sequence[int]) -> None:
        """Compile what is missing between these depths for any number of rows. Holds the lock."""
        if not self._missing(stops, ANY):
            return
        ends = self._cuts(stops, ANY)
        if tight := self._room({**self._wanted, ANY: stops}) < 0:
            ends = tuple(sorted({*ends, *(hi for _, hi in self._parts[ANY])}))
        with self._pages.noting():
            self._publish(*self._compiled(ends, ANY), ANY)
        if tight:
            self._forget(self._parts[ANY] - set(pairwise((0, *ends))))

    def forgo_copies(self) -> None:
        """Close all buckets for good. Holds the lock."""
        self.memory, self.open = 0, []
        self._wanted.clear()
        self._paths.clear()
        self._segments = {span: segment for span, segment in self._segments.items() if span[2] == ANY}
        for bucket in [bucket for bucket in self._parts if bucket != ANY]:
            del self._parts[bucket]
        give_back_memory()

    def hold(self, lo: int, hi: int) -> None:
        """Have this part for any number of rows, and no other. Holds the lock."""
        self._forget(tuple(self._parts[ANY]))
        ends = sorted({end for end in (lo, hi, len(self._manifest.holes)) if end})
        self._publish(*self._compiled(ends, ANY, {(lo, hi)}), ANY)

    def _forget(self, parts: Iterable[tuple[int, int]]) -> None:
        """Free segments for any number of rows that others stand in for."""
        for lo, hi in parts:
            for span in self._spans(lo, hi):
                del self._segments[*span[:2], ANY]
            self._parts[ANY].remove((lo, hi))
        self._paths.clear()
        give_back_memory()

    def _cuts(self, stops: Sequence[int], bucket: int) -> tuple[int, ...]:
        """Where the graph is cut. What would be one segment for any number of rows is made in two halves: a compiler works on
        one with one thread, so two take half the time before the first token, and cost a call of 0.3 ms in long passes."""
        if bad := [depth for depth in stops if not 0 < depth <= self._manifest.layers]:
            raise UsageError(f"stops {bad} do not exist; depths are 1 to {self._manifest.layers}.")
        layers = len(self._manifest.holes)
        ends = cuts(self._manifest.turns, layers, stops)
        return ends if bucket or len(ends) > 1 or layers == 1 else (layers // 2, layers)

    def _missing(self, stops: Sequence[int], bucket: int) -> list[tuple[int, int]]:
        """The parts of the graph between these depths that this bucket lacks."""
        return [part for part in pairwise((0, *self._cuts(stops, bucket))) if part not in self._parts[bucket]]

    def _spans(self, lo: int, hi: int) -> list[Any]:
        """The blocks of the model that a part of the graph is, for each turn; the embedding runs once."""
        return spans(self._manifest.turns, lo, hi)[: None if hi else 1]

    def _compiled(
        self, ends: Sequence[int], bucket: int, only: Collection[tuple[int, int]] = ()
    ) -> tuple[list[tuple[int, int]], list[Segment]]:
        """The parts of the graph between these cuts that this bucket lacks (``only`` these), and their segments."""
        graph = self._blocks.clone()  # cutting leaves a graph in parts
        fill_holes(graph, self._manifest.attentions)
        wanted = (set(only) or set(pairwise((0, *ends)))) - self._parts[bucket]
        parts = [part for part in cut(graph, ends, self._manifest.width) if (part.lo, part.hi) in wanted]
        where = [(part.lo, part.hi) for part in parts]
        if bucket:  # in the background, where a program that ends lets no new threads begin
            for part in parts:
                fix_rows(part.graph, bucket, max(self.threads, bucket), self._manifest.width)
            return where, [segment for part in parts for segment in self._made(part)]
        with ThreadPoolExecutor(COMPILING) as threads:
            return where, [segment for made in threads.map(self._made, parts) for segment in made]

    def _made(self, part: SegmentGraph) -> list[Segment]:
        """A part of the graph, compiled once, as a segment for each turn."""
        compiled = self._core.compile_model(part.graph, "CPU", self._config)
        turns = self._manifest.turns
        return [
            Segment(compiled, part.outputs, (lo, hi), turn, 1 if turn is None or turns is None else turns.turns)
            for lo, hi, turn in self._spans(part.lo, part.hi)
        ]

    def _publish(self, parts: Sequence[tuple[int, int]], made: Sequence[Segment], bucket: int) -> None:
        self._parts[bucket].update(parts)
        for segment in made:
            segment.add_to(self._pool)
            self._segments[segment.lo, segment.hi, bucket] = segment
        if made:
            self._warm_up(made, bucket)
            self._paths.clear()

    def _warm_up(self, segments: Sequence[Segment], bucket: int) -> None:
        """Run new segments once: the plugin lays weights out for the first pass it sees.

        Measured on SmolLM2-135M at int4, two AMD cores with AVX-512: a token takes 7.9 ms after a first pass of 128 rows, and
        9.0 after one of a single row; 512 rows take 302 ms against 360. On two Intel cores it makes no difference whether the
        first pass has 1, 4, 16, 32, 64 or 128 rows, and 128 hold the first answer up by 0.15 s more than 16.
        """
        rows = bucket or min(WARM_UP_ROWS, self._manifest.context or WARM_UP_ROWS)
        with PagedCache(self._pool) as nobody:
            nobody.blocks = [self._pool.spare] * rows  # more than enough, and no memory that a sequence could want
            given = Rows(nobody, 0, (0,) * rows, None)
            layout = Layout.of([given], self.threads)
            self._pool.begin()
            inputs = self.inputs(layout.key)
            inputs.fill([given], layout)
            for segment in segments:
                inputs.room(f"state.{segment.lo}", (1, rows, self._manifest.width))
                segment.run(inputs, self._pool)

    def inputs(self, key: tuple[int, int, int]) -> PassInputs:
        """New arrays for the inputs of a pass."""
        return PassInputs(*key, self._manifest.width, 0 if self._manifest.turns is None else self._manifest.turns.turns)

    def path(self, lo: int, hi: int, bucket: int) -> list[Segment]:
        """The longest segments of this bucket from ``lo`` to ``hi``; for any number of rows compiled where there are none.
        Holds the lock."""
        path = self._assembled(lo, hi, bucket)
        if path is None:
            self.ready([depth for depth in (lo, hi) if depth])
            path = self._assembled(lo, hi, bucket)
        assert path is not None, "what was missing was compiled"
        return path

    def _assembled(self, lo: int, hi: int, bucket: int) -> list[Segment] | None:
        """The longest segments, one after the other, or None where one is missing."""
        if (lo, hi, bucket) not in self._paths:
            path = [begin] if lo == 0 and (begin := self._segments.get((0, 0, bucket))) is not None else []
            while (at := path[-1].hi if path else lo) < hi:
                ends = [end for begin, end, mine in self._segments if mine == bucket and at == begin < end <= hi]
                if not ends:
                    return None
                path.append(self._segments[at, max(ends), bucket])
            self._paths[lo, hi, bucket] = path
        return self._paths[lo, hi, bucket]


def _ending() -> bool:
    """Whether the program is about to end and only waits for threads: nobody will use what is opened now."""
    return not threading.main_thread().is_alive()
