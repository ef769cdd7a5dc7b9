"""A network that may be stopped part-way: the protocol that every engine speaks.

Legend of shapes, used in the whole package: B sequences, T positions (rows), L layers, D width, F MLP units,
V vocabulary, S shortlist, K draft length, R rank.

An engine knows nothing of exits or of speculation. It runs blocks ``[lo, hi)`` over rows whose place in their sequence is
given, and trusts of a layer's KV memory only what lies before the first of these rows: going back is to pass a smaller
``start``, and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from adi.errors import NoDistributionError
from adi.model.arrays import Array, as_tensor

if TYPE_CHECKING:
    from torch import Tensor  # only to name types: the compiled engine decodes without torch, whose import takes seconds


MERGED_ROWS = 64


@dataclass(frozen=True)
class Spec:
    """What a model is and where it can stop.

    ``stops`` are the depths (numbers of blocks run) at which the engine can hand out states, the last one being
    ``layers``. ``context`` is the longest sequence in tokens, None when the model sets no limit. ``fingerprint`` names
    the weights, whatever precision they run in. ``row_invariant`` says whether a row's bits were found not to depend on how
    many rows are beside it, so that verified decoding is exact bit for bit; None where nobody has looked. Of several texts at
    most ``merged_rows`` may share a pass for that: longer passes take other kernels (a prompt's do, alone too).
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
    row_invariant: bool | None = None
    merged_rows: int = MERGED_ROWS


class KVCache:
    """KV memory of one sequence, from ``Backbone.new_cache``; a context manager that closes it."""

    def close(self) -> None:
        """Free the memory; the cache is empty then, and not to be used again. Closing twice is allowed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Rows:
    """Consecutive positions ``start, start + 1, ...`` of one sequence, on their way through blocks ``[lo, hi)``.

    ``cache`` is the sequence's own, from ``new_cache``. ``ids`` are the tokens at these positions. ``hidden_TD`` is the
    state that enters block ``lo``; None when ``lo`` is 0, where the embedding makes it.
    """

    cache: Any  # the engine's own KVCache
    start: int
    ids: tuple[int, ...]
    hidden_TD: Tensor | None


class States:
    """What a pass through ``[lo, hi)`` leaves of its rows.

    ``hidden_TD`` left block ``hi - 1`` and ``before_TD`` entered it; ``mlp_TF`` are that block's MLP activations (what its
    down projection reads), present when they were asked for. An engine may give arrays of its own kind: they become tensors
    when somebody asks, which most rounds of decoding never do. ``raw_TD`` is ``hidden_TD`` as the engine gave it. Nobody
    writes to any of them.
    """

    def __init__(self, hidden_TD: Any, before_TD: Any, mlp_TF: Any = None) -> None:
        self.raw_TD = hidden_TD
        self._before_TD, self._mlp_TF = before_TD, mlp_TF

    @property
    def hidden_TD(self) -> Tensor:  # noqa: N802, a shape
        return as_tensor(self.raw_TD)

    @property
    def before_TD(self) -> Tensor:  # noqa: N802, a shape
        return as_tensor(self._before_TD)

    @property
    def mlp_TF(self) -> Tensor | None:  # noqa: N802, a shape
        return None if self._mlp_TF is None else as_tensor(self._mlp_TF)

    def rows(self, which: slice) -> States:
        """These rows of it, over the same memory."""
        mlp_TF = None if self._mlp_TF is None else self._mlp_TF[which]
        return States(self.raw_TD[which], self._before_TD[which], mlp_TF)


@dataclass(frozen=True)
class ReadOut:
    """The model's own head taken apart: ``logits_V = scale * (weight_VD @ norm(h) + bias_V)``, up to a soft cap.

    ``norm`` is "rms" or "layer" with ``gain_D``, ``shift_D`` and ``eps``. Exit heads start from these values. A soft cap,
    where a family has one, is left out: it is monotone, and exit heads are trained to the capped distribution anyway.
    The numbers are as the engine has them, arrays or tensors.
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


@dataclass(frozen=True)
class LightHead:
    """An exit head in plain parts, for an engine to compile: ``W (I + U V^T) norm(h) + b`` over a shortlist and a tail.

    ``weight_SD`` and ``bias_S`` are the shortlist's rows of the model's head, ``tail_D`` and ``tail_bias`` give one more logit
    for the ``outside`` tokens that are not in it.
    """

    norm: str
    eps: float
    gain_D: Array
    shift_D: Array
    down_DR: Array
    up_DR: Array
    weight_SD: Array
    bias_S: Array | None
    tail_D: Array
    tail_bias: Array
    outside: int


@dataclass(frozen=True)
class HeadRows:
    """What a compiled light head says of T rows, ``[T]`` each: place of the likeliest token in the shortlist, its
    log-probability, the next one's, the tail's, and the entropy in nats (the tail spread evenly)."""

    place_T: Tensor
    first_T: Tensor
    second_T: Tensor
    tail_T: Tensor
    entropy_T: Tensor


@dataclass(frozen=True)
class TopK:
    """The likeliest next tokens of T rows, best first: ``logits_TK``, ``ids_TK``; ``total_T`` is the logsumexp over all."""

    logits_TK: Tensor
    ids_TK: Tensor
    total_T: Tensor


class CompiledHead(Protocol):
    """A light head on an engine."""

    def read(self, hidden_TD: Tensor) -> HeadRows: ...

    def log_probs(self, hidden_TD: Tensor) -> Tensor:
        """Of all the shortlist, ``[T, S]``; what ``read`` is a summary of."""
        ...


@dataclass(frozen=True)
class DraftNet:
    """A drafter in plain parts, for an engine to compile; ``exits.drafter.Drafter`` says what each weight is.

    ``norm`` and ``eps`` are those of the model's last norm and its own, ``gain_D`` and ``shift_D`` the model's, and
    ``weight_SD`` and ``bias_S`` the shortlist's rows of the model's head.
    """

    weights: Mapping[str, Array]
    norm: str
    eps: float
    gain_D: Array
    shift_D: Array
    weight_SD: Array
    bias_S: Array | None


class CompiledDraftNet(Protocol):
    """A drafter on an engine. Its states are arrays of the engine's kind."""

    def start(self, raw_1D: Any) -> Any:
        """The state to draft from after a position whose deep state is this, as ``States.raw_TD`` gives it."""
        ...

    def step(self, token: int, state_1D: Any) -> tuple[int, float, Any]:
        """After ``token``: the place of the likeliest next one in the shortlist, its log-probability, the next state."""
        ...


def require_number(tops: Sequence[float]) -> None:
    """NoDistributionError unless the largest logit of every row is a finite number: of NaN there is no likeliest token."""
    if bad := [top for top in tops if not math.isfinite(top)]:
        raise NoDistributionError(f"the model's logits hold no distribution: the largest is {bad[0]}. Try another precision.")


@runtime_checkable
class Propagating(Protocol):
    """An engine that can make up the keys and values of blocks that were not run."""

    def propagate(self, rows: Rows, lo: int) -> None:
        """Give blocks from ``lo`` on keys and values made from the states of these rows."""
        ...


class Backbone(Protocol):
    """An engine. The rest of the package cannot tell one from another."""

    @property
    def spec(self) -> Spec: ...

    @property
    def has_mlp_tap(self) -> bool:
        """Whether ``forward(..., mlp=True)`` can show the MLP activations of a block."""
        ...

    def new_cache(self) -> KVCache:
        """KV memory for one more sequence."""
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

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """The model's own final norm and head on states: ``[T, V]``, in float32."""
        ...

    def greedy(self, raw_TD: Any) -> list[int]:
        """The likeliest next token of each of T states, tensors or as ``States.raw_TD`` gives them: the first of the largest
        ``logits``.

        ValueError where the largest is not a finite number.
        """
        ...

    def top_k_tokens(self, hidden_TD: Tensor, most: int) -> TopK:
        """The ``most`` likeliest next tokens of each of T states."""
        ...

    def light_head(self, head: LightHead) -> CompiledHead | None:
        """The exit head as a graph of this engine, None where it has none better than torch."""
        ...

    def embed(self, ids: Sequence[int]) -> Tensor:
        """What enters the first block for each of these tokens at position 0, ``[T, D]``."""
        ...

    def draft_net(self, net: DraftNet) -> CompiledDraftNet | None:
        """The drafter as a graph of this engine, None where it has none better than torch."""
        ...

    def readout(self) -> ReadOut:
        """The head taken apart; ValueError where the family's head is not a norm and one matrix."""
        ...
