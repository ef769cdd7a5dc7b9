"""``HfBackbone``: blocks [lo, hi) of any transformers causal language model, in the model's own code."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adi.errors import UsageError
from adi.model.arrays import Array, as_tensor
from adi.model.backbone import CHUNK, CompiledModule, Keeper, ReadOut, Rows, Spec, States, TensorFunction, require_number
from adi.model.hf.kv_cache import KVPart, StaircaseCache
from adi.model.hf.mlp import gated_mlp
from adi.model.hf.passes import Run
from adi.model.hf.readout import take_apart
from adi.model.hf.rope import sides
from adi.model.hf.split import SplitModel
from adi.model.hf.splitting import require_evaluation
from adi.model.hf.weights import fingerprint

GPU_CHUNK = 512  # on a GPU a pass over few rows takes as long as one over many
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HfBackbone:
    """A transformers ``PreTrainedModel`` that may be stopped between any two blocks.

    The model is used as it is, by way of a ``Twin`` that shares its weights, and may be used by others meanwhile. Every
    sequence begins with a look at it: one that was changed is adopted anew, and sequences under way end as they began.
    ``weights`` is its fingerprint where that was taken before the weights were rounded to the precision they run in. Raises
    ValueError, naming the architecture and the reason, for a model that cannot be split, and for one in training mode (dropout
    would make no two passes alike).
    """

    def __init__(self, model: Any, name: str | None = None, weights: str | None = None) -> None:
        self.model = model
        self._name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._looking = threading.Lock()
        self._adopt(weights)

    def _adopt(self, weights: str | None) -> None:
        self._split = split = SplitModel(self.model)
        text = self.model.config.get_text_config(decoder=True)
        self.spec = Spec(
            name=self._name,
            family=text.model_type,
            layers=len(split.blocks),
            width=text.hidden_size,
            vocabulary=split.vocabulary,
            stops=tuple(range(1, len(split.blocks) + 1)),
            loop=split.loop,
            context=split.context,
            stated_context=split.context,
            fingerprint=weights or fingerprint(self.model),
            backend="hf",
            precision=next((k for k, v in PRECISIONS.items() if v == split.dtype), str(split.dtype)),
            device=str(split.device),
            keeps_below=split.keeps_below,
            chunk=sys.maxsize if split.far is not None else CHUNK if split.device.type == "cpu" else GPU_CHUNK,
        )

    def _look(self) -> None:
        """Adopt the model again where it has changed; AdiError where it cannot be used as it is now."""
        with self._looking:
            require_evaluation(self.model)
            if self._split.changed():
                self._adopt(None if self._split.has_other_weights() else self.spec.fingerprint)

    @property
    def has_mlp_tap(self) -> bool:
        return self._split.downs is not None

    @property
    def can_propagate(self) -> bool:
        """Whether all blocks keep plain keys and values; ``propagate`` refuses others."""
        return StaircaseCache(self._split).write_only(False)

    def new_cache(self) -> StaircaseCache:
        self._look()
        return StaircaseCache(self._split)

    def part(self, cache: StaircaseCache, start: int, end: int) -> KVPart | None:
        """A copy of these positions."""
        return cache.part(start, end)

    def resume(self, cache: StaircaseCache, parts: Sequence[KVPart], length: int) -> bool:
        return cache.resume(parts, length)

    def add_keeper(self, keeper: Keeper) -> None:
        """Nothing to do: KV memory grows as torch allows."""

    def fits(self, wanted: Sequence[tuple[StaircaseCache, int]]) -> bool:
        """True: KV memory grows as torch allows."""
        return True

    def peek(self, cache: StaircaseCache, block: int, length: int) -> Tensor | None:
        """Keys and values of the first positions, ``[2, 1, heads, T, size]``; None for a block that keeps none of its own."""
        return cache.peek(block, length)

    def forward(self, rows: Sequence[Rows], lo: int, hi: int, *, mlp: bool = False) -> list[States]:
        """Blocks [lo, hi) for each entry of ``rows`` in turn (this engine merges nothing)."""
        if not 0 <= lo < hi <= self.spec.layers:
            raise UsageError(f"blocks [{lo}, {hi}) do not exist; the model has blocks [0, {self.spec.layers})")
        return [self._pass(r, lo, hi, mlp) for r in rows]

    def _pass(self, rows: Rows, lo: int, hi: int, mlp: bool) -> States:
        whole = functools.partial(self._part, lo=0, hi=self.spec.layers)
        parts = [self._part(side, lo, hi, mlp) for side in sides(rows, whole)]
        return parts[0] if len(parts) == 1 else States.stacked(parts)

    def _part(self, rows: Rows, lo: int, hi: int, mlp: bool = False) -> States:
        return rows.cache.model.part(rows, lo, hi, mlp)  # type: ignore[no-any-return]

    def propagate(self, rows: Rows, lo: int) -> None:
        """Give blocks [lo, layers) keys and values of these rows made from ``rows.states`` alone, as if it entered each.

        An approximation (Elbayad et al. 2020). ValueError where some block keeps no plain keys and values.
        """
        for side in sides(rows, functools.partial(self._part, lo=0, hi=self.spec.layers)):
            assert side.states is not None
            if not side.cache.write_only(True):
                raise UsageError(f"{self.spec.family} keeps more than keys and values; use skipped='exact'.")
            side.cache.rewind(lo, self.spec.layers, side.start)
            try:
                side.cache.model.decode(side.cache.model.run_from(side, lo, self.spec.layers), side)
            finally:
                side.cache.write_only(False)

    def logits(self, states: States | Tensor) -> Tensor:
        """The model's own forward with every block skipped, so norm, projection, scale and soft cap are its own."""
        return self._split.logits(states)

    def greedy(self, states: States | Tensor) -> list[int]:
        logits_TV = self.logits(states)
        require_number(logits_TV.amax(-1).tolist())  # NaN where any is
        return logits_TV.argmax(-1).tolist()

    def compile(self, name: str, function: Callable[[], TensorFunction], widths: Sequence[int]) -> CompiledModule:
        """The function as it is, without gradients."""
        made, reading = function(), weakref.WeakMethod(self._read)  # who keeps the function does not keep the engine

        def run(*rows_TD: Array) -> tuple[Tensor, ...]:
            read = reading()
            assert read is not None
            with torch.no_grad():
                given = map(as_tensor, rows_TD)
                return made(*(read(rows, width) for rows, width in zip(given, widths, strict=True)))

        return run

    def _read(self, rows_TD: Tensor, width: int) -> Tensor:
        """Rows as a head reads them."""
        return (self._split.readable(rows_TD) if rows_TD.shape[-1] == self._split.stored else rows_TD)[..., :width]

    def embed(self, ids: Sequence[int]) -> States:
        """What the first block is given; it runs once for nothing."""
        run = Run(0, 1)
        self._split.decode(run, Rows(None, 0, tuple(ids), None), all_first=True)
        assert run.before is not None
        return States(run.before[0], **self._split.reader)

    def last_mlp(self) -> dict[str, Tensor] | None:
        """The last block's gated MLP with its norm, ``gain_D``, ``gate_FD``, ``up_FD``, ``down_DF``; None where it has none."""
        rows, split = Rows(self.new_cache(), 0, (0, 1), None), self._split
        if split.downs is None:
            return None
        return gated_mlp(split.blocks[-1], split.downs[-1], lambda: self._pass(rows, 0, len(split.blocks), False))

    def prepare(self, stops: Sequence[int], *, drafts: bool = False, wait: bool = False) -> None:
        """Nothing to do: torch stops anywhere."""

    def readout(self) -> ReadOut:
        with torch.no_grad():
            split = self._split
            stored = split.stored if split.reader else self.spec.width
            return take_apart(split.model, split.logits, self.spec.width, stored, split.device)
