"""A network that may be stopped part-way: the protocol of every engine.

Legend of shapes, used in the whole package: B sequences, T positions (rows), L layers, D width, F MLP units,
V vocabulary, S shortlist, K draft length, R rank.

An engine knows nothing of exits or of speculation. It runs blocks ``[lo, hi)`` over rows whose place in their sequence is
given, and trusts of a layer's KV memory only what lies before the first of these rows: going back is to pass a smaller
``start``, and costs nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from adi.errors import NoDistributionError
from adi.model.arrays import Array, as_tensor, joined

if TYPE_CHECKING:
    from torch import Tensor  # only to name types: the compiled engine decodes without torch, whose import takes seconds


MERGED_ROWS = 64
KV_BLOCK = 32  # positions: what is kept of a text that ended is kept in so many at a time
CHUNK = 64
PROMPT_BYTES = 200 << 20  # what a prompt's pass may take beyond weights and KV memory, where it may have any number of rows
ROW_BYTES = 160  # of that, for a row and a unit of the model's width
PROMPT_ROWS = (256, 2048)  # of a prompt, at least and at most, in one pass then
TensorFunction = Callable[..., "tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Loop:
    """Blocks that run again and again: ``first + turn * period + i`` has the same weights in each of ``turns`` turns. To the
    frontier a turn is so many more blocks. ``inner`` is a loop within each turn, counted from its first block (HRM's)."""

    first: int
    period: int
    turns: int
    inner: Loop | None = None

    def turns_past(self, lo: int, at: int) -> int | None:
        """How many turns after block ``lo`` block ``at`` runs with the same weights; None where it never does."""
        past = at - lo
        inside = self.first <= lo <= at < self.end
        return past // self.period if inside and past % self.period == 0 else None

    @property
    def end(self) -> int:
        """The first block that runs after all turns."""
        return self.first + self.period * self.turns

    def tail(self, depth: int, layers: int) -> tuple[tuple[int, int], ...]:
        """The blocks behind a stop and outside the loops that it leaves: an inner loop's, then the coda."""
        if depth > self.end:
            return ()
        behind = ((self.end, layers),) if self.end < layers else ()
        within = (depth - self.first) % self.period if depth > self.first else 0
        if self.inner is None or not within:
            return behind
        start = depth - within
        return (*((start + lo, start + hi) for lo, hi in self.inner.tail(within, self.period)), *behind)


@dataclass(frozen=True)
class Spec:
    """What a model is and where it can stop.

    ``stops`` are the depths (numbers of blocks run) at which the engine can hand out states, the last one being
    ``layers``. ``context`` is the longest sequence in tokens that the engine runs, None when there is no limit, and
    ``stated_context`` the model's own where the engine may run less. ``fingerprint`` names the weights, whatever precision
    they run in. ``row_invariant`` says whether a row's bits were found not to depend on how many rows are beside it, so that
    verified decoding is exact bit for bit; None where nobody has looked. Of several texts at most ``merged_rows`` may share a
    pass for that: longer passes take other kernels (a prompt's do, alone too). ``threads`` are the processor threads that it
    runs on, None where others decide. ``loop`` says which blocks share their weights, ``together`` those whose rows may
    share a pass at different turns.

    A prompt is read in passes that begin at multiples of ``chunk``, so that what they give depends on the text alone, whoever
    reads it and whatever was known of it before. 1: at any position, since it was found not to matter. ``kv_precision`` is
    "int8" where keys and values are kept in 8 bits, else "auto": as the engine keeps them. ``keeps_below``: blocks from this
    one on keep nothing of a position, they read what others keep, so that a token that leaves there owes later ones nothing.
    """

    name: str
    family: str
    layers: int
    width: int
    vocabulary: int
    stops: tuple[int, ...]
    context: int | None
    fingerprint: str
    backend: str
    precision: str
    device: str
    loop: Loop | None = None
    together: Loop | None = None
    row_invariant: bool | None = None
    merged_rows: int = MERGED_ROWS
    threads: int | None = None
    chunk: int = CHUNK
    kv_precision: str = "auto"
    stated_context: int | None = None
    keeps_below: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the engine runs shorter texts alone than the model itself."""
        return self.context is not None and self.context < (self.stated_context or self.context)

    @property
    def numbers(self) -> str:
        """The precision of weights and, where it is not the engine's own, of keys and values."""
        return self.precision if self.kv_precision == "auto" else f"{self.precision} with KV memory in {self.kv_precision}"

    def prompt_pass(self, start: int, end: int) -> int:
        """Where the pass ends that begins at ``start`` of a prompt of ``end`` tokens. Where passes may end anywhere no lone row
        is left over: another kernel would attend it."""
        if self.chunk > 1:
            return min(end, start - start % self.chunk + self.chunk)
        stop = min(end, start + self.prompt_rows)
        return stop - (end - stop == 1)

    @property
    def prompt_rows(self) -> int:
        """How many of a prompt's rows share a pass where any number may: as many as memory allows, since each pass packs all
        earlier keys and values anew; a power of two."""
        least, most = PROMPT_ROWS
        fitting = max(1, PROMPT_BYTES // (ROW_BYTES * self.width))
        return min(most, max(least, 1 << fitting.bit_length() - 1))

    def prompt_start(self, known: int, end: int) -> int:
        """Where a prompt of ``end`` tokens is read from, whose first ``known`` positions are there; some are always left."""
        return max(0, min(known, end - 2)) if self.chunk == 1 else self.whole(min(known, end - 1))

    def whole(self, length: int) -> int:
        """How many of a prompt's first positions would be the same in any longer prompt."""
        return length - length % self.chunk

    def tail(self, depth: int) -> tuple[tuple[int, int], ...]:
        """Blocks ``[lo, hi)`` that must run to read a stop, because the head was never shown what a turn leaves: a coda
        (Huginn), or the slow stack after a turn of the fast one (HRM). The true pass runs them again later."""
        return () if self.loop is None or depth == self.layers else self.loop.tail(depth, self.layers)


class KVCache(ABC):
    """KV memory of one sequence, from ``Backbone.new_cache``; a context manager that closes it."""

    @property
    def bytes(self) -> int:
        """What it takes, where the engine counts it."""
        return 0

    @property
    def shared(self) -> bool:
        """Whether others hold all or some of its memory too, so that it is not free when this is closed."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory; the cache is empty then, and not to be used again. Closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Keeper(Protocol):
    """Holds KV memory of texts that ended, as long as nobody wants it."""

    def idle(self) -> int:
        """How many parts of ``KV_BLOCK`` positions nobody else holds."""
        ...

    def evict(self) -> bool:
        """Let go of one of these; False where there is none."""
        ...


@dataclass(frozen=True)
class Rows:
    """Consecutive positions ``start, start + 1, ...`` of one sequence, on their way through blocks ``[lo, hi)``.

    ``cache`` is the sequence's own, from ``new_cache``. ``ids`` are the tokens at these positions. ``states`` are what enters
    block ``lo``; None when ``lo`` is 0, where the embedding makes it. ``prompt``: several rows of a prompt, which are attended
    together, however few; other rows one by one, however many share the pass. ``turn``: they run
    the blocks of so many turns later, within ``Spec.together``.
    """

    cache: Any  # the engine's own KVCache
    start: int
    ids: tuple[int, ...]
    states: States | Tensor | None
    prompt: bool = False
    turn: int = 0


class States:
    """What a pass through ``[lo, hi)`` leaves of its T rows: a handle of the engine's, which it takes back as it is.

    ``hidden_TD`` left block ``hi - 1`` and ``before_TD`` entered it; ``mlp_TF`` are that block's MLP activations (what its
    down projection reads), present when they were asked for. They become tensors when somebody asks, which most rounds of
    decoding never do; ``raw_TD`` is what is stored, in the engine's own kind of array. Nobody writes to any of them. Of a
    looped model more may be stored than ``hidden_TD``, which are its first ``width`` columns then: what stands behind them
    depends on the ``depth`` where the pass stopped. Where a head reads a mixture of what is stored, ``read`` makes it.
    """

    def __init__(
        self,
        hidden_TD: Array,
        before_TD: Array = None,
        mlp_TF: Array = None,
        *,
        width: int | None = None,
        depth: int | None = None,
        read: Callable[[Array], Array] | None = None,
    ) -> None:
        self.raw_TD = hidden_TD
        self._before_TD, self._mlp_TF = before_TD, mlp_TF
        self.width, self.depth, self._read = width, depth, read

    @property
    def head_TD(self) -> Array:  # noqa: N802, a shape
        """What a head reads, in the engine's own kind of array."""
        return self.raw_TD if self._read is None else self._read(self.raw_TD)

    @property
    def hidden_TD(self) -> Tensor:  # noqa: N802, a shape
        return as_tensor(self.head_TD)[:, : self.width]

    @property
    def before_TD(self) -> Tensor:  # noqa: N802, a shape
        return as_tensor(self._before_TD if self._read is None else self._read(self._before_TD))[:, : self.width]

    @property
    def mlp_TF(self) -> Tensor | None:  # noqa: N802, a shape
        return None if self._mlp_TF is None else as_tensor(self._mlp_TF)

    def __len__(self) -> int:
        return len(self.raw_TD)

    def __getitem__(self, rows: slice) -> States:
        """These rows of it, over the same memory."""
        return self._like(*(None if a is None else a[rows] for a in (self.raw_TD, self._before_TD, self._mlp_TF)))

    def copied(self) -> States:
        """In memory of its own, where it may be a part of a longer pass's."""
        parts = (self.raw_TD, self._before_TD, self._mlp_TF)
        return self._like(*(a if a is None else a.clone() if hasattr(a, "clone") else a.copy() for a in parts))

    def _like(self, hidden_TD: Array, before_TD: Array = None, mlp_TF: Array = None) -> States:
        return States(hidden_TD, before_TD, mlp_TF, width=self.width, depth=self.depth, read=self._read)

    @staticmethod
    def joined(parts: Sequence[States]) -> States:
        """The rows of several passes of one engine, one after the other; only what left the last block."""
        return parts[0] if len(parts) == 1 else parts[0]._like(joined([part.raw_TD for part in parts]))

    @staticmethod
    def stacked(parts: Sequence[States]) -> States:
        """The same with all that they hold, in tensors."""
        mlps = [part.mlp_TF for part in parts]
        return parts[0]._like(
            joined([as_tensor(part.raw_TD) for part in parts]),
            joined([as_tensor(part._before_TD) for part in parts]),
            None if any(mlp is None for mlp in mlps) else joined(mlps),
        )


def raw_of(given: States | Tensor) -> Array:
    """``States.raw_TD``, or the tensor itself."""
    return given.raw_TD if isinstance(given, States) else given


@dataclass(frozen=True)
class ReadOut:
    """The model's own head taken apart: ``logits_V = scale * (weight_VD @ norm(h) + bias_V)``, up to a soft cap.

    ``norm`` is "rms", "layer" or "none" with ``gain_D``, ``shift_D`` and ``eps``. Exit heads start from these values. A soft
    cap, where a family has one, is left out: it is monotone, and exit heads are trained to the capped distribution anyway. The
    numbers are as the engine has them, arrays or tensors.
    """

    norm: str
    gain_D: Array
    shift_D: Array
    eps: float
    weight_VD: Array
    bias_V: Array | None
    scale: float

    def tensors(self) -> ReadOut:
        """The same in tensors."""
        found: Any = {name: as_tensor(a) for name in READOUT_ARRAYS if (a := getattr(self, name)) is not None}
        return replace(self, **found)


READOUT_ARRAYS = ("gain_D", "shift_D", "weight_VD", "bias_V")


class CompiledModule(Protocol):
    """A torch function as a graph of an engine."""

    def __call__(self, *rows_TD: Array) -> tuple[Array, ...]:
        """Its outputs for T rows, in the engine's own kind of array; the inputs may be of either kind."""
        ...


def require_number(tops: Sequence[float]) -> None:
    """NoDistributionError unless the largest logit of every row is a finite number: of NaN there is no likeliest token."""
    if bad := [top for top in tops if not math.isfinite(top)]:
        raise NoDistributionError(f"the model's logits hold no distribution: the largest is {bad[0]}. Try another precision.")


class Backbone(Protocol):
    """An engine. The rest of the package cannot tell one from another."""

    @property
    def spec(self) -> Spec: ...

    @property
    def has_mlp_tap(self) -> bool:
        """Whether ``forward(..., mlp=True)`` can show the MLP activations of a block."""
        ...

    @property
    def can_propagate(self) -> bool:
        """Whether ``propagate`` can make up the keys and values of blocks that were not run."""
        ...

    def new_cache(self) -> KVCache:
        """KV memory for one more sequence."""
        ...

    def part(self, cache: Any, start: int, end: int) -> KVCache | None:
        """Keys and values of positions [start, end) of a sequence, which every block has and nobody will change, for others to
        begin with; None where they cannot be taken apart. ``start`` is a multiple of ``KV_BLOCK``."""
        ...

    def resume(self, cache: Any, parts: Sequence[Any], length: int) -> bool:
        """Let the empty KV memory of a new sequence begin with the first ``length`` positions of these parts, one after the
        other. False where the model is not any more what they were made by. ``MemoryFullError`` as for ``forward``."""
        ...

    def add_keeper(self, keeper: Keeper) -> None:
        """Ask it for KV memory where that is full, until it is forgotten."""
        ...

    def fits(self, wanted: Sequence[tuple[Any, int]]) -> bool:
        """Whether these caches could all grow to so many positions now; always, where nothing limits KV memory."""
        ...

    def peek(self, cache: Any, block: int, length: int) -> Tensor | None:
        """Keys and values that KV memory holds of the first ``length`` positions in one block, in any form that is the same for
        every cache; None where the block keeps none that can be read. For audits."""
        ...

    def prepare(self, stops: Sequence[int], *, drafts: bool = False, wait: bool = False) -> None:
        """Be ready for passes that stop at these depths; without stops, for passes through the whole model.

        ``drafts``: for passes of a few rows too, which may take a while and so happens in the background, unless ``wait``.
        """
        ...

    def forward(self, rows: Sequence[Rows], lo: int, hi: int, *, mlp: bool = False) -> list[States]:
        """Run blocks ``[lo, hi)`` over rows of one or more sequences; one ``States`` per entry of ``rows``.

        ``MemoryFullError``, before anything has run, where the engine limits its KV memory and too little is left.
        """
        ...

    def propagate(self, rows: Rows, lo: int) -> None:
        """Give blocks from ``lo`` on keys and values made from the states of these rows alone, as if they entered each.

        An approximation (Elbayad et al. 2020). AdiError where ``can_propagate`` is False.
        """
        ...

    def logits(self, states: States | Tensor) -> Tensor:
        """The model's own final norm and head on states: ``[T, V]``, in float32."""
        ...

    def greedy(self, states: States | Tensor) -> list[int]:
        """The likeliest next token of each of T states: the first of the largest ``logits``.

        NoDistributionError where the largest is not a finite number.
        """
        ...

    def embed(self, ids: Sequence[int]) -> States:
        """What enters the first block for each of these tokens at position 0."""
        ...

    def compile(self, name: str, function: Callable[[], TensorFunction], widths: Sequence[int]) -> CompiledModule:
        """A torch function over rows ``[T, width]``, one input for each of ``widths``, as this engine runs it best.

        ``name`` tells its weights and its code from all others: an engine may keep what it made of them under this name, and
        then never calls ``function``, which builds it.
        """
        ...

    def last_mlp(self) -> dict[str, Tensor] | None:
        """The last block's gated MLP with its norm, ``gain_D``, ``gate_FD``, ``up_FD``, ``down_DF``; None where there is
        none or it cannot be told."""
        ...

    def readout(self) -> ReadOut:
        """The head taken apart; ValueError where the family's head is not a norm and one matrix."""
        ...
