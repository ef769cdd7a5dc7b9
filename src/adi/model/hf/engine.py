"""``HfBackbone``: blocks [lo, hi) of any transformers causal language model, in the model's own code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adi.errors import AdiError
from adi.model.arrays import Array, as_tensor
from adi.model.backbone import CompiledModule, ReadOut, Rows, Spec, States, TensorFunction, TopK, raw_of, require_number
from adi.model.hf.kv_cache import StaircaseCache
from adi.model.hf.mlp import gated_mlp
from adi.model.hf.patch import Patch, Run, find_down_projections
from adi.model.hf.readout import take_apart
from adi.model.hf.splitting import RECURRENT_HINT, decoder_of, observe, refuse

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SELF_CHECK_IDS = (1, 2, 3, 4)


class HfBackbone:
    """A transformers ``PreTrainedModel`` that may be stopped between any two blocks.

    The model is used as it is and left as it was found. ``weights`` is its fingerprint where that was taken before the
    weights were rounded to the precision they run in. Raises ValueError, naming the architecture and the reason, for
    a model that cannot be split, and for one in training mode (dropout would make no two passes alike).
    """

    def __init__(self, model: Any, name: str | None = None, weights: str | None = None) -> None:
        if model.training:
            raise AdiError(f"{type(model).__name__} is in training mode; call model.eval() first.")
        self.model = model
        self.decoder, blocks = decoder_of(model)
        text = model.config.get_text_config(decoder=True)
        downs = find_down_projections(blocks, text.hidden_size)
        self._patch = Patch(blocks, downs)
        self.spec = Spec(
            name=name or getattr(model.config, "_name_or_path", "") or type(model).__name__,
            family=text.model_type,
            layers=len(blocks),
            width=text.hidden_size,
            vocabulary=model.get_output_embeddings().weight.shape[0],
            stops=tuple(range(1, len(blocks) + 1)),
            context=getattr(text, "max_position_embeddings", None),
            fingerprint=weights or fingerprint(model),
            backend="hf",
            precision=next((k for k, v in PRECISIONS.items() if v == model.dtype), str(model.dtype)),
            device=str(model.device),
        )
        self._self_check(len(blocks))

    @property
    def has_mlp_tap(self) -> bool:
        return self._patch.downs is not None

    @property
    def can_propagate(self) -> bool:
        """Whether all blocks keep plain keys and values; ``propagate`` refuses others."""
        return True

    def new_cache(self) -> StaircaseCache:
        return StaircaseCache(self.model.config)

    def fits(self, wanted: Sequence[tuple[StaircaseCache, int]]) -> bool:
        """True: KV memory grows as torch allows."""
        return True

    def peek(self, cache: StaircaseCache, block: int, length: int) -> Tensor | None:
        """Keys and values of the first positions, ``[2, 1, heads, T, size]``; None for a block that keeps none of its own."""
        return cache.peek(block, length)

    def forward(self, rows: Sequence[Rows], lo: int, hi: int, *, mlp: bool = False) -> list[States]:
        """Blocks [lo, hi) for each entry of ``rows`` in turn (this engine merges nothing)."""
        if not 0 <= lo < hi <= self.spec.layers:
            raise AdiError(f"blocks [{lo}, {hi}) do not exist; the model has blocks [0, {self.spec.layers})")
        return [self._pass(r, lo, hi, mlp) for r in rows]

    @torch.no_grad()
    def _pass(self, rows: Rows, lo: int, hi: int, mlp: bool) -> States:
        rows.cache.rewind(lo, hi, rows.start)
        inject = None if rows.states is None else as_tensor(raw_of(rows.states))[None]
        run = Run(lo, hi, inject)
        ids = torch.tensor([rows.ids], device=self.model.device)
        positions = torch.arange(rows.start, rows.start + len(rows.ids), device=self.model.device)[None]
        with self._patch.patched(run, mlp=mlp):
            self.decoder(input_ids=ids, position_ids=positions, past_key_values=rows.cache, use_cache=True)
        assert run.hidden is not None
        assert run.before is not None
        return States(run.hidden[0], run.before[0], None if run.mlp is None else run.mlp.reshape(len(rows.ids), -1))

    @torch.no_grad()
    def propagate(self, rows: Rows, lo: int) -> None:
        """Give blocks [lo, layers) keys and values of these rows made from ``rows.states`` alone, as if it entered each.

        An approximation (Elbayad et al. 2020). ValueError where some block keeps no plain keys and values.
        """
        assert rows.states is not None
        rows.cache.rewind(lo, self.spec.layers, rows.start)
        run = Run(lo, self.spec.layers, as_tensor(raw_of(rows.states))[None])
        ids = torch.tensor([rows.ids], device=self.model.device)
        positions = torch.arange(rows.start, rows.start + len(rows.ids), device=self.model.device)[None]
        if not rows.cache.write_only(True):
            raise AdiError(f"{self.spec.family} keeps more than keys and values; use skipped='exact'.")
        try:
            with self._patch.patched(run):
                self.decoder(input_ids=ids, position_ids=positions, past_key_values=rows.cache, use_cache=True)
        finally:
            rows.cache.write_only(False)

    @torch.no_grad()
    def logits(self, states: States | Tensor) -> Tensor:
        """The model's own forward with every block skipped, so norm, projection, scale and soft cap are its own."""
        hidden_TD = as_tensor(raw_of(states)).to(self.model.device, self.model.dtype)
        run = Run(self.spec.layers, self.spec.layers + 1, hidden_TD[None])
        ids = torch.zeros((1, hidden_TD.shape[0]), dtype=torch.long, device=self.model.device)
        with self._patch.patched(run):
            out = self.model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
        return out.logits[0].float()  # type: ignore[no-any-return]

    def greedy(self, states: States | Tensor) -> list[int]:
        logits_TV = self.logits(states)
        require_number(logits_TV.amax(-1).tolist())  # NaN where any is
        return logits_TV.argmax(-1).tolist()

    def top_k_tokens(self, states: States | Tensor, most: int) -> TopK:
        return TopK.of(self.logits(states), most)

    def compile(self, name: str, function: Callable[[], TensorFunction], widths: Sequence[int]) -> CompiledModule:
        """The function as it is, without gradients."""
        made = function()

        def run(*rows_TD: Array) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return made(*(as_tensor(rows) for rows in rows_TD))

        return run

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> States:
        """What the first block is given; it runs once for nothing."""
        run = Run(0, 1, None)
        tokens = torch.tensor([tuple(ids)], device=self.model.device)
        with self._patch.patched(run):
            self.decoder(input_ids=tokens, position_ids=torch.zeros_like(tokens), use_cache=False)
        assert run.before is not None
        return States(run.before[0])

    def last_mlp(self) -> dict[str, Tensor] | None:
        """The last block's gated MLP with its norm, ``gain_D``, ``gate_FD``, ``up_FD``, ``down_DF``; None where it has none."""
        if self._patch.downs is None:
            return None
        layers = self.spec.layers
        rows = Rows(self.new_cache(), 0, (0, 1), None)
        return gated_mlp(self._patch.blocks[-1], self._patch.downs[-1], lambda: self._pass(rows, 0, layers, False))

    def prepare(self, stops: Sequence[int], *, drafts: bool = False, wait: bool = False) -> None:
        """Nothing to do: torch stops anywhere."""

    def readout(self) -> ReadOut:
        with torch.no_grad():
            return take_apart(self.model, self.logits, self._patch.blocks[-1], self.spec.width)

    @torch.no_grad()
    def _self_check(self, layers: int) -> None:
        """A few tokens in two strands and a rollback must give the model's own logits, or the model is refused."""
        ids = torch.tensor([[i % self.spec.vocabulary for i in SELF_CHECK_IDS]], device=self.model.device)
        self._patch.extra_outputs = observe(self.model, self.decoder, self._patch.blocks, ids)
        wanted = self.model(input_ids=ids, use_cache=False).logits[0].float()
        cache, half, tokens = self.new_cache(), max(1, layers // 2), tuple(ids[0].tolist())
        try:
            early = [self._pass(Rows(cache, i, tokens[i : i + n], None), 0, half, False) for i, n in ((0, 2), (2, 1), (2, 2))]
            hidden = torch.cat([early[0].hidden_TD, early[2].hidden_TD])
            if half < layers:
                hidden = self._pass(Rows(cache, 0, tokens, hidden), half, layers, False).hidden_TD
            got = self.logits(hidden)
        except (RuntimeError, TypeError, KeyError, IndexError, AssertionError) as error:
            raise refuse(self.model, f"running it in parts failed ({type(error).__name__}: {error})") from error
        if (reason := cache.unsupported()) is not None:
            raise refuse(self.model, f"{reason}; {RECURRENT_HINT}")
        error_ = float((got - wanted).abs().max())
        scale = max(1.0, float(wanted.abs().max()))
        if not error_ <= (1e-3 if self.model.dtype == torch.float32 else 0.1) * scale:
            raise refuse(self.model, f"run in parts its logits differ from its own forward by {error_:.2g}")


def fingerprint(model: Any) -> str:
    """A name for the weights: blake2b over names, shapes and 4,096 evenly spaced values of each tensor.

    Values are rounded to bfloat16 first, so float32 and bfloat16 weights of one model have one fingerprint. (float16
    loses small values that bfloat16 keeps, so ``load`` takes it before it converts.)
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 4096)
        sample = flat[::step][:4096].to(device="cpu", dtype=torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
