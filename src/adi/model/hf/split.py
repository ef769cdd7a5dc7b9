"""``SplitModel``: a transformers model as it is now, made ready to run in parts, and proved to give its own logits so."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adi.errors import AdiError, ModelError
from adi.model.backbone import Rows, States, raw_of
from adi.model.hf.blocks import find_down_projections
from adi.model.hf.kv_cache import StaircaseCache
from adi.model.hf.layout import Form, StateLayout, kinds_of, loop_of, state_of, watched_layout
from adi.model.hf.passes import Run, Steps
from adi.model.hf.readout import last_norm
from adi.model.hf.replay import Way, holders, pieces, with_front
from adi.model.hf.rope import always_far, edge_of, turns_again
from adi.model.hf.splitting import (
    decoder_of,
    handed_on,
    memory_name,
    outputs_of,
    refuse,
    require_evaluation,
    require_numbers,
)
from adi.model.hf.twin import Twin
from adi.model.hf.weights import device_of

SELF_CHECK_IDS = (1, 2, 3, 4, 5, 6, 7, 8)
CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
    "seq_length",
    "context_length",
)
ACAUSAL = (
    "its logits for a token change with the tokens that follow in the same pass: it looks ahead, or rounds activations by pass "
    "as quantize_dynamic does (torchao and the compiled engine's int8 round by token)"
)
NOISY = "two passes over the same text differ: it draws noise; let it begin at zeros, or at noise that is fixed by position"
UNEVEN = "how many turns it takes must not depend on the text"
FOREIGN = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
WEIGHTS = ("_modules", "_parameters")


class SplitModel:
    """The twin of ``source`` with its blocks under control. ValueError, naming architecture and reason, where that fails."""

    def __init__(self, source: Any, near: SplitModel | None = None) -> None:
        """``near``: of a model whose rotary angles change with the length of the text, the one for short texts."""
        require_evaluation(source)
        self._twin = Twin(source)
        self.model = self._twin.model
        self.config = self.model.config
        self.decoder, self.blocks = decoder_of(self.model)
        self.width: int = self.config.get_text_config(decoder=True).hidden_size
        known: list[Any] = [getattr(block, "mlp_tap", None) for block in self.blocks]  # our own looped models name it
        self.downs = find_down_projections(self.blocks, self.width) if None in known else known
        self.device, self.dtype = device_of(self.model), self.model.dtype
        self._source = source._modules.get("_orig_mod", source)
        self._placed = self._source.device, self.dtype
        self._steps = Steps(self.blocks)
        self._kinds = kinds_of(self.blocks)
        self.loop = loop_of(self._kinds)
        self.layout: StateLayout
        self.slots: list[tuple[int, ...]] | None = None  # of the KV cache, that each block writes; None: its own number
        self.way = Way.FRONT
        self._norm: Any = None
        self._more_is_read = False  # by blocks, of those before them, than what is stored: each must do without
        self._memory = str(memory_name(self.decoder))
        self.vocabulary: int
        self.far: SplitModel | None = None
        self.edge: int | None = None
        self.context = context_of(self.config)
        if near is not None:
            self._steps.outputs, self._steps.shares, self._steps.form = (
                near._steps.outputs,
                near._steps.shares,
                near._steps.form,
            )
            self.vocabulary, self.layout, self.slots, self.way = near.vocabulary, near.layout, near.slots, near.way
            self._ways(SELF_CHECK_IDS[:2])
            self.downs = None if near.downs is None else self.downs
            always_far(self.decoder, self.context or 0)
            return
        try:
            self.vocabulary = self._self_check(len(self.blocks))
        except FOREIGN as error:
            if isinstance(error, AdiError):
                raise
            self._source(
                input_ids=torch.tensor([SELF_CHECK_IDS[:2]], device=self.device) % 2, use_cache=False
            )  # raises its own
            raise refuse(self.model, f"its own code does not run on a memory of adi's ({_said(error)})") from error
        self.edge = edge_of(self.model, self.decoder, self.context)
        if self.edge is not None:
            self.far, self.turns_again = SplitModel(source, self), turns_again(self.model, self.edge)

    def changed(self) -> bool:
        return self._placed != (self._source.device, self._source.dtype) or self._twin.changed()

    def has_other_weights(self) -> bool:
        return self._twin.changed(WEIGHTS)

    def stamp(self) -> int:
        """Another number whenever weights were changed in place, as far as torch counts it."""
        return sum(0 if weight.is_inference() else weight._version for weight in self.model.parameters())

    @torch.no_grad()
    def decode(self, run: Run, rows: Rows, *, mlp: bool = False, all_first: bool = False) -> None:
        """The decoder's forward over these rows, as far as ``run`` says; ``all_first``: each at position 0, with no past."""
        ids = torch.tensor([rows.ids], device=self.device)
        positions = torch.arange(rows.start, rows.start + len(rows.ids), device=self.device)[None]
        past: dict[str, Any] = {"use_cache": False} if rows.cache is None else {self._memory: rows.cache, "use_cache": True}
        with self._steps.running(run, self.downs[run.hi - 1] if mlp and self.downs is not None else None):
            self.decoder(input_ids=ids, position_ids=torch.zeros_like(ids) if all_first else positions, **past)

    def part(self, rows: Rows, lo: int, hi: int, mlp: bool = False) -> States:
        """Blocks ``[lo, hi)`` over these rows."""
        cache, start = rows.cache, rows.start
        if not cache.held:
            cache.rewind(lo, hi, start)
            return self._part(rows, lo, hi, mlp)
        rows = with_front(self, rows, lo, hi)
        cache.rewind(lo, hi, rows.start)
        states = self._part(rows, lo, hi, mlp, front=start - rows.start)
        cache.settle(lo, hi, start, states)
        return states[start - rows.start :]

    def _part(self, rows: Rows, lo: int, hi: int, mlp: bool, front: int = 0) -> States:
        run = self.run_from(rows, lo, hi)
        if rows.cache.held:
            run.pieces = pieces(self.way, rows.start, front, len(rows.ids))
            run.between = lambda i, end: rows.cache.keep(i, rows.start + end) if end == front else None
        self.decode(run, rows, mlp=mlp)
        if run.before is None:
            raise ModelError(f"{type(self.model).__name__} ran {run.calls} of {len(self.blocks)} blocks; {UNEVEN}.")
        stored = self.layout.joined({**run.given, **run.outs}, hi)[0]
        seen = None if run.mlp is None else run.mlp.reshape(len(rows.ids), -1)
        return States(stored, run.before[0], seen, **self._more(hi))

    def _more(self, depth: int) -> dict[str, Any]:
        """What states say of themselves beside their rows."""
        if self.loop is not None:
            return {"width": self.width, "depth": depth}
        return self.reader

    @property
    def reader(self) -> dict[str, Any]:
        """How states are read whose rows are no ``[T, D]`` that a head reads."""
        return {} if self.loop is not None or self.stored == self.width else {"read": self.readable}

    def run_from(self, rows: Rows, lo: int, hi: int) -> Run:
        """A pass that begins with what is stored of these rows."""
        wide = rows.states is None or not self.reader or raw_of(rows.states).shape[-1] == self.stored
        assert wide, "what a head reads of a state is not all that the next block reads"
        run = Run(lo, hi, {} if rows.states is None else self.layout.parts(rows.states, lo), self.layout.at[hi])
        run.shared = lambda i: rows.cache.keys_and_values(i, rows.start + len(rows.ids))
        return run

    @property
    def stored(self) -> int:
        """How wide a row of a state is after the last block; more than ``width`` where a head reads a mixture of its parts."""
        return self.layout.sizes[self.layout.at[-1][0]]

    @torch.no_grad()
    def readable(self, raw_TD: Tensor) -> Tensor:
        """What the model's last norm is given of these states, ``[T, D]``: what heads read."""
        if not self.reader or raw_TD.shape[-1] == self.width:
            return raw_TD
        seen: list[Tensor] = []
        with self._before_norm(lambda _, args: seen.append(args[0])):
            self.logits(raw_TD)
        return seen[-1].reshape(len(raw_TD), -1)

    @contextmanager
    def _before_norm(self, hook: Callable[[Any, Any], Any]) -> Iterator[None]:
        if self._norm is None:
            self._norm = last_norm(self.model, self.logits, self.stored, self.device, self.dtype)
        handle = self._norm.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(self, states: States | Tensor, begun: Callable[[], object] = lambda: None) -> Tensor:
        """The model's own forward with every block skipped; ``begun`` is called where its tail begins."""
        if self.reader and isinstance(states, Tensor) and states.shape[-1] == self.width:  # as a head reads them
            with self._before_norm(lambda _, args: (states.to(args[0]).reshape(args[0].shape),)):
                return self.logits(torch.zeros(len(states), self.stored), begun)
        layers = len(self.blocks)
        dtype = self.dtype if self._steps.form is None else None  # a form knows its own
        given = {i: part.to(self.device, dtype) for i, part in self.layout.parts(states, layers).items()}
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=self.device)
        return self._dry(Run(layers, layers + 1, given, skipped=begun), ids, torch.zeros_like(ids))[0].float()

    def _dry(self, run: Run, ids: Tensor, positions: Tensor) -> Tensor:
        with self._steps.running(run):
            return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]

    @torch.no_grad()
    def _self_check(self, layers: int) -> int:
        """A few tokens in strands, and some again after a rollback, give the model's own logits, or it is refused."""
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        tokens = tuple(i % vocabulary for i in SELF_CHECK_IDS[: 8 if StaircaseCache(self).held else 4])
        ids = torch.tensor([tokens], device=self.device)
        wanted = self._source(input_ids=ids, use_cache=False).logits[0].float()
        require_numbers(self._source, wanted)
        run, entered = Run(0, layers + 1, kept=range(layers), chain=[]), list[tuple[int, Any]]()
        run.entered = lambda i, given: entered.append((i, given))
        self.decode(run, Rows(None, 0, tokens, None))
        chain = run.chain or []
        self._steps.outputs = outputs_of(self.model, chain, self.blocks, ids)
        if self.loop is None:
            self.layout = self._stack(chain, entered, tokens)
            if len(StaircaseCache(self).layers) != len(self.blocks):
                self.slots = self._watched_slots(Rows(None, 0, tokens, None))
        else:
            positions = torch.arange(len(tokens), device=self.device)[None]
            self.layout = watched_layout(self._kinds, run.outs, lambda run: self._dry(run, ids, positions))
            self.slots = self._watched_slots(Rows(None, 0, tokens, None))
        ways, reasons = self._ways(tokens), list[str]()
        for logits_TV, way in ((logits_TV, way) for logits_TV in self._own(ids, wanted) for way in ways):
            self.way = way
            if (reason := self._reason(ids, logits_TV)) is None:
                return int(wanted.shape[-1])
            reasons.append(reason)
        raise refuse(self.model, reasons[len(ways) - 1])

    def _own(self, ids: Tensor, wanted: Tensor) -> Iterator[Tensor]:
        """The model's own logits, and those where it is told positions, as ``generate`` does, if they are others."""
        yield wanted
        if "position_ids" in inspect.signature(self._source.forward).parameters:
            positions = torch.arange(ids.shape[1], device=self.device)[None]
            told = self._source(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
            if not torch.equal(told, wanted):
                yield told

    def _stack(self, chain: list[Any], entered: list[tuple[int, Any]], tokens: tuple[int, ...]) -> StateLayout:
        """The layout of a stack of blocks; states of other axes than ``[1, T, D]`` get a form."""
        state, (places, self._more_is_read) = state_of(chain[0][2]), handed_on(chain, entered)
        if places or state.dim() != 3 or state.shape[:2] != (1, len(tokens)):
            short = Run(0, len(chain) + 1, chain=[])
            self.decode(short, Rows(None, 0, tokens[:-1], None))
            try:
                self._steps.form = Form.of(chain, short.chain or [], places)
            except ValueError as error:
                raise refuse(self.model, str(error)) from None
        form = self._steps.form
        return StateLayout.of_stack(len(chain), state.shape[-1] if form is None else form.width)

    def _ways(self, tokens: tuple[int, ...]) -> list[Way]:
        """How rows may run whose memory cannot be cut, the quickest first."""
        cache = StaircaseCache(self)
        if not cache.held:
            return [Way.FRONT]
        found = holders(cache, self.blocks, lambda: self.decode(Run(0, len(self.blocks) + 1), Rows(cache, 0, tokens, None)))
        self._steps.take_apart(found)
        return list(Way) if found else [Way.APART]

    def _reason(self, ids: Tensor, wanted: Tensor) -> str | None:
        """Why what comes of parts is not what is ``wanted`` of these tokens; None where it is."""
        tokens, layers = tuple(ids[0].tolist()), len(self.blocks)
        try:
            found = self._in_parts(StaircaseCache(self), tokens, layers)
        except FOREIGN as error:
            return f"running it in parts failed ({_said(error)})"
        tolerance = (1e-3 if self.dtype == torch.float32 else 0.1) * max(1.0, float(wanted.abs().max()))
        error_ = max(float((got - wanted[at : at + len(got)]).abs().max()) for at, got in found)
        if error_ <= tolerance:
            return None
        again = [self._source(input_ids=ids, use_cache=False).logits[0].float() for _ in range(2)]
        if not torch.equal(*again):
            return NOISY
        alone = self._source(input_ids=ids[:, :2], use_cache=False).logits[0].float()
        if not float((alone - wanted[:2]).abs().max()) <= tolerance:
            return ACAUSAL
        return f"run in parts its logits differ from its own forward by {error_:.2g}"

    def _in_parts(self, cache: StaircaseCache, tokens: tuple[int, ...], layers: int) -> list[tuple[int, Tensor]]:
        """Logits from positions on: of all tokens, half the depth in two strands; of the third alone, since a hook may not look
        at what is beside it; where memory is held, of more in rounds that keep one of two drafts."""
        half = max(1, layers // 2)

        def run(start: int, end: int, ahead: int, depth: int = half) -> tuple[int, Tensor]:
            shallow = [self._seen(Rows(cache, i, tokens[i : i + ahead], None), 0, depth) for i in range(start, end, ahead)]
            states = States.joined(shallow)
            deep = self._seen(Rows(cache, start, tokens[start:end], states), depth, layers) if depth < layers else states
            return start, self.logits(deep)

        rounds = [(0, 4, 2), (2, 3, 1)] + [(3, 6, 1), (4, 6, 1), (4, 7, 3), (6, 8, 2)] * bool(cache.held)
        others = range(1, layers) if self._more_is_read else ()
        return [run(*strand) for strand in rounds] + [run(2, 3, 1, depth) for depth in others]

    def _watched_slots(self, rows: Rows) -> list[tuple[int, ...]]:
        """Which layers of a KV cache each block writes, seen in one pass."""
        cache, written = StaircaseCache(self), [set[int]() for _ in self.blocks]
        plain = cache.update

        def update(keys: Tensor, values: Tensor, slot: int, *args: Any, **kwargs: Any) -> Any:
            if (other := next((i for i, slots in enumerate(written) if slot in slots), None)) is not None:
                raise refuse(self.model, f"blocks {other} and {self._steps.at} write the same layer of the KV cache, {slot}")
            written[self._steps.at].add(slot)
            cache.make_room(slot)
            return plain(keys, values, slot, *args, **kwargs)

        cache.update = update
        self.decode(Run(0, len(self.blocks) + 1), replace(rows, cache=cache))
        return [tuple(sorted(slots)) for slots in written]

    @functools.cached_property
    def keeps_below(self) -> int | None:
        """The block from which on none keeps keys, values or states of a position; None where the last one does."""
        cache, layers = StaircaseCache(self), len(self.blocks)
        if not self._steps.shares or cache.held or self.loop is not None:
            return None
        self.decode(Run(0, layers + 1), Rows(cache, 0, tuple(i % self.vocabulary for i in SELF_CHECK_IDS[:2]), None))
        kept = [any(getattr(layer, "keys", None) is not None for layer in cache.written_by([i])) for i in range(layers)]
        last = max((i + 1 for i, keeps in enumerate(kept) if keeps), default=layers)
        return last if last < layers else None

    def _seen(self, rows: Rows, lo: int, hi: int) -> States:
        """What leaves these blocks of the self-check; a tap of MLP activations that shows nothing is none."""
        states = self.part(rows, lo, hi, mlp=True)
        if states.mlp_TF is None:
            self.downs = None
        return states


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a word'}"


def context_of(config: Any) -> int | None:
    """The longest text in tokens that a configuration states, by whichever name its family has for it; None: no limit."""
    text = config.get_text_config(decoder=True)
    return next((n for name in CONTEXTS if isinstance(n := getattr(text, name, None), int) and n > 0), None)
