"""``OpenVinoBackbone``: blocks [lo, hi) as compiled CPU graphs with paged attention over one KV memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adi.errors import ModelError, UsageError
from adi.model.arrays import as_array, joined
from adi.model.backbone import Keeper, ReadOut, Rows, Spec, States, TensorFunction, raw_of, require_number
from adi.model.openvino.graph import BLOCK_TOKENS
from adi.model.openvino.inputs import Layout, PassInputs
from adi.model.openvino.kv_pool import KVPool, PagedCache
from adi.model.openvino.manifest import BFLOAT16, Manifest, read_graphs, read_manifest, read_readout
from adi.model.openvino.modules import Embedding, OpenVinoModule, converted
from adi.model.openvino.segments import BUCKETS, COPIES_BYTES, Config, Copies, Segment, Segments
from adi.model.openvino.turns import block_in_graph

if TYPE_CHECKING:
    from torch import Tensor

KV_BYTES = 2 << 30
KEPT_ROWS = 64  # inputs of passes up to here are kept for the next pass of the same shape
KEPT_INPUTS = 48
RECURRING = 32
CONFIG: Config = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",  # activations in 8 bits where weights are: the plugin's default, made explicit
}
KV_PRECISION = {"fp32": "f32", "int8": "f16", "int4": "f16"}
# A scale and a zero point for each position and head: by channel, positions of a page would share scales and move each other.
KV_INT8: Config = {"KV_CACHE_PRECISION": "u8", "KEY_CACHE_QUANT_MODE": "BY_TOKEN", "VALUE_CACHE_QUANT_MODE": "BY_TOKEN"}


class OpenVinoBackbone:
    """An exported decoder that stops between any two blocks.

    Graphs are compiled for the spans that are asked for: ``prepare`` compiles those between the stops of a policy, and a
    pass takes the longest there are. Made by ``OpenVinoBackbone.open``. Rows of many sequences share a pass,
    whatever their lengths, and what a row gives does not depend on the rows beside it, in any precision
    (``rows_are_invariant`` measures it). Where a processor multiplies a lone row by another kernel, ``least_rows`` is 2: a
    lone row then runs beside one that counts for nothing.
    """

    def __init__(
        self,
        manifest: Manifest,
        blocks: Any,
        head: Any,
        *,
        folder: Path | None = None,
        kv_bytes: int = KV_BYTES,
        threads: int | None = None,
        memory: int = COPIES_BYTES,
        kv_precision: str = "auto",
        bfloat16: bool = False,
    ) -> None:
        import openvino as ov

        self.spec = Spec(
            name=manifest.name,
            family=manifest.family,
            layers=manifest.layers,
            width=manifest.width,
            vocabulary=manifest.vocabulary,
            stops=tuple(range(1, manifest.layers + 1)),
            context=manifest.context,
            stated_context=manifest.stated_context,
            fingerprint=manifest.fingerprint,
            backend="openvino",
            precision=manifest.precision + BFLOAT16 * bfloat16,
            device="cpu",
            loop=manifest.loop,
            together=manifest.turns,
            kv_precision=kv_precision,
        )
        self._manifest, self._folder = manifest, folder
        self._inputs: dict[tuple[int, int, int], PassInputs] = {}
        self.pool = KVPool(kv_bytes)
        own = {"KV_CACHE_PRECISION": "bf16" if bfloat16 else KV_PRECISION[manifest.precision]}
        self._config = CONFIG | (KV_INT8 if kv_precision == "int8" else own)
        if threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = str(threads)
        in_blocks = self._config | ({"INFERENCE_PRECISION_HINT": "bf16"} if bfloat16 else {})
        self.least_rows = 1
        self._companion = PagedCache(self.pool)
        self._companion.blocks = [self.pool.spare]
        self._core = ov.Core()
        if bfloat16 and "BF16" not in (can := self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
            raise UsageError(
                f"precision {self.spec.precision!r} needs a processor with bfloat16, and this one has {', '.join(can)}; "
                f"take {manifest.precision!r}."
            )
        settings = (in_blocks, self._config)
        self._segments = Segments(self._core, blocks, head, manifest, settings, self.pool, memory, folder)
        self._embedding = Embedding(self._core, blocks, self._config)
        self.spec = replace(self.spec, threads=self._segments.threads)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        kv_bytes: int = KV_BYTES,
        threads: int | None = None,
        memory: int = COPIES_BYTES,
        kv_precision: str = "auto",
        bfloat16: bool = False,
    ) -> OpenVinoBackbone:
        """An exported model from its folder; torch weights are not read.

        Args:
            folder: what ``export_and_open`` wrote.
            kv_bytes: the most that KV memory may take, all sequences together.
            threads: processor threads to use; by default the plugin's own choice.
            memory: bytes that copies of the weights may take, which make short passes faster.
            kv_precision: "int8", or "auto": float32 for weights in fp32, else 16 bits.
            bfloat16: blocks compute in it, head, exits and drafter in float32; UsageError where the processor lacks it.

        Raises:
            ValueError: a folder that is damaged or of another format.
        """
        import openvino as ov

        manifest = read_manifest(folder)
        blocks, head = read_graphs(folder, ov.Core())
        options: Any = {"threads": threads, "memory": memory, "kv_precision": kv_precision, "bfloat16": bfloat16}
        return cls(manifest, blocks, head, folder=folder, kv_bytes=kv_bytes, **options)

    @property
    def has_mlp_tap(self) -> bool:
        """Not of our own looped models: what was traced there is what a turn injects."""
        return self._manifest.has_mlp and self._manifest.family != "adi_looped"

    def new_cache(self) -> PagedCache:
        return PagedCache(self.pool)

    def part(self, cache: PagedCache, start: int, end: int) -> PagedCache:
        """The same blocks: nothing is copied."""
        return self.pool.part(cache, start, end)

    def resume(self, cache: PagedCache, parts: Sequence[PagedCache], length: int) -> bool:
        """The same blocks, and a copy of the last one where it is not full."""
        with self._segments.lock:
            self.pool.resume(cache, parts, length)
        return True

    def add_keeper(self, keeper: Keeper) -> None:
        self.pool.keepers.add(keeper)

    def fits(self, wanted: Sequence[tuple[PagedCache, int]]) -> bool:
        """Whether the pool has blocks for these caches to grow to so many positions."""
        return self.pool.fits(wanted)

    def prepare(self, stops: Sequence[int], *, drafts: bool = False, wait: bool = False) -> None:
        """Compile one segment from each of these depths to the next, the beginning and the end included.

        One segment for the whole model is what full depth wants; every stop more costs a call, and buys the freedom to stop
        there. Segments that are there already stay. Shape buckets for a lone row and, with ``drafts``, for a few rows open in
        the background with the first such pass, or at once with ``wait``, which raises what went wrong with one.
        """
        with self._segments.lock:
            self._segments.ready(stops)
            self._segments.request(stops, [max(self.least_rows, rows) for rows in (BUCKETS if drafts else BUCKETS[:1])])
            if wait:
                self._segments.start()
        if wait:
            self._segments.wait()

    @property
    def copies(self) -> Copies:
        """What copies of the weights take and which are there."""
        return Copies(self._segments.copy_bytes, self._segments.memory, tuple(self._segments.open))

    def forgo_copies(self) -> None:
        """Have no copies of the weights from now on."""
        with self._segments.lock:
            self._segments.forgo_copies()

    def hold(self, lo: int, hi: int) -> None:
        """Compile blocks [lo, hi) and free all others, for a look at a model that is too large as a whole."""
        with self._segments.lock:
            self._segments.hold(lo, hi)

    @contextmanager
    def without_copies(self) -> Iterator[None]:
        """Passes of any number of rows run on the weights that are held once; for measurements."""
        self._segments.open, kept = [], self._segments.open
        try:
            yield
        finally:
            self._segments.open = kept

    def peek(self, cache: PagedCache, block: int, length: int) -> Tensor | None:
        """Keys and values of the first positions as the plugin stores them; None where it packs them otherwise."""
        at, turn = block_in_graph(self._manifest.turns, block)
        first = sum(self._manifest.holes[:at])
        found = [self.pool.peek(cache, i, turn, length) for i in range(first, first + self._manifest.holes[at])]
        return None if any(part is None for part in found) else joined(found)

    def forward(self, rows: Sequence[Rows], lo: int, hi: int, *, mlp: bool = False) -> list[States]:
        """Blocks [lo, hi) for all ``rows`` in one pass; ValueError for blocks that do not exist, MemoryFullError, before
        anything has run, where KV memory is full."""
        if not 0 <= lo < hi <= self.spec.layers:
            raise UsageError(f"blocks [{lo}, {hi}) do not exist; the model has blocks [0, {self.spec.layers})")
        count = sum(len(r.ids) for r in rows)
        if later := max(r.turn for r in rows):
            loop = self.spec.together
            assert loop is not None, "rows at different turns are of a looped model"
            assert max(1, loop.first) <= lo < hi <= loop.end - later * loop.period, "no row leaves the turns"
        with self._segments.lock:
            self._segments.start(count)
            bucket = self._segments.bucket_for(count, self.least_rows, lo, hi)
        if (missing := max(self.least_rows, bucket or evened(count)) - count) > 0:
            padding = None if lo == 0 else States(np.zeros((missing, self.spec.width), np.float32))
            rows = [*rows, Rows(self._companion, 0, (0,) * missing, padding)]
            return self._forward(rows, lo, hi, mlp, bucket)[:-1]
        return self._forward(rows, lo, hi, mlp, bucket)

    def _forward(self, rows: Sequence[Rows], lo: int, hi: int, mlp: bool, bucket: int) -> list[States]:
        layout = Layout.of(rows, max(self._segments.threads, bucket))
        with self._segments.lock:
            path = self._segments.path(lo, hi, bucket)
            self.pool.reserve([(r.cache, r.start + len(r.ids)) for r in rows])
            inputs = self._inputs_for(layout.key)
            inputs.fill(rows, layout)
            if lo:
                inputs.room(f"state.{lo}", (1, inputs.rows, self.spec.width))
                inputs.fill_state(f"state.{lo}", rows, layout)
            for segment in path:
                segment.run(inputs, self.pool)
            return _states(inputs, layout, path[-1], mlp and self.has_mlp_tap)

    def logits(self, states: States | Tensor) -> Tensor:
        """The model's own norm and head on states, ``[T, V]``."""
        import torch

        with self._segments.lock:
            logits, _ = self._head(states)
            return torch.from_numpy(logits[0, : len(states)].copy())

    def greedy(self, states: States | Tensor) -> list[int]:
        with self._segments.lock:
            logits, token = self._head(states)
            require_number(logits[0, : len(states)].max(-1).tolist())  # NaN where any is
            return token[0, : len(states)].tolist()  # type: ignore[no-any-return]

    def _head(self, states: States | Tensor) -> Any:
        """The head's arrays."""
        return self._segments.head.run(as_array(raw_of(states)), self.least_rows)

    def embed(self, ids: Sequence[int]) -> States:
        return States(self._embedding.run(ids))

    def compile(self, name: str, function: Callable[[], TensorFunction], widths: Sequence[int]) -> OpenVinoModule:
        """The function as a graph, kept beside the export; its matrices take 8 bits a weight where the model's do."""
        graph = partial(converted, self._core, self._folder, name, function, widths, self.spec.precision != "fp32")
        return OpenVinoModule(self._core, graph, self._config)

    @property
    def can_propagate(self) -> bool:
        """False: a segment runs its blocks whole."""
        return False

    def propagate(self, rows: Rows, lo: int) -> None:
        raise UsageError("the openvino engine cannot make keys and values from an exit's state; use the engine 'hf'.")

    def last_mlp(self) -> None:
        """None: an export does not tell the parts of a block apart."""

    def readout(self) -> ReadOut:
        """The head taken apart, as it was at export."""
        if self._folder is None:
            raise ModelError("this engine was not opened from a folder, where the readout is kept.")
        return read_readout(self._folder, self._manifest)

    def _inputs_for(self, key: tuple[int, int, int]) -> PassInputs:
        """Arrays for the inputs of passes of this shape; the oldest go when there are too many."""
        inputs = self._inputs.get(key)
        if inputs is None:
            inputs = self._segments.inputs(key)
            if inputs.rows <= KEPT_ROWS:
                if len(self._inputs) >= KEPT_INPUTS:
                    del self._inputs[next(iter(self._inputs))]
                self._inputs[key] = inputs
        return inputs


def evened(rows: int) -> int:
    """How many rows a long pass takes: the next multiple of eight or, of many rows, of an eighth to a sixteenth.

    A number of rows that the plugin has not seen costs it kernels for each matrix, 30 ms or a quarter of a short prompt's pass
    (two AVX-512 cores, SmolLM2-135M), and a prime one divides badly among its threads: 73 rows take 155 ms, 80 rows 115.
    Passes of up to ``RECURRING`` rows are left alone: their numbers come again and again in drafting, and 11 rows take 28 ms,
    16 rows 33.
    """
    step = min(BLOCK_TOKENS, max(8, 1 << rows.bit_length() - 4)) if rows > RECURRING else 1
    return -(-rows // step) * step


def _states(inputs: PassInputs, layout: Layout, last: Segment, mlp: bool) -> list[States]:
    """Each sequence's rows out of the inputs's arrays, as arrays of their own."""
    names = [f"state.{last.hi}", last.before, *([f"mlp.{last.hi}"] if mlp else [])]
    whole = [inputs.arrays[name].reshape(inputs.rows, -1).copy() for name in names]
    places = accumulate(layout.counts, initial=0)
    return [States(*(array[at : at + count] for array in whole)) for at, count in zip(places, layout.counts, strict=False)]
