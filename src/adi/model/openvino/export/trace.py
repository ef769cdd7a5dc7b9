"""From a transformers model to OpenVINO graphs in which attention is a hole.

The model runs once under the tracer with an attention function of ours: it notes queries, keys and values as outputs of the
graph and goes on with an input of the graph in place of its result. Loading fills each hole with paged attention. The
states between the blocks are outputs too, so boundaries, like holes, are found by what was traced and never by the names
a family gives its modules, and no pattern of some family's attention has to be recognised.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adi.errors import AdiError, ModelError
from adi.model.hf.blocks import find_down_projections
from adi.model.hf.split import context_of
from adi.model.openvino.export.written_out import AttentionProducts, Positions, measured, plain_functions
from adi.model.openvino.graph import Attention

EAGER = "eager"  # where attention is written out, transformers' name of it
HOLE = "adi_hole_{}"  # the name of our attention function while a model is traced; of each tracing its own
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")
EXAMPLE_IDS = (3, 1, 2)
NO_RUN = "its own code does not run where attention is left to the engine"
NO_TRACE = "its code cannot be written down as one graph for any number of rows"
GROWING_ROPE = ("dynamic", "longrope")
WINDOW_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
MOST_SEEN = 2048  # tokens over which attention that is written out is looked at: no longer texts are run


class UnknownOptionError(ModelError):
    """The model asks transformers' attention for something that paged attention has not."""


@dataclass
class Tape:
    """What the hooks note in one pass; ``results`` stand in for attention, or None lets torch compute it. ``written_out``: the
    model's code multiplies for itself instead of calling transformers' attention."""

    results: Sequence[Tensor] | None = None
    written_out: bool = False
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    sinks: list[tuple[float, ...]] = field(default_factory=list)
    slopes: list[tuple[float, ...]] = field(default_factory=list)
    experts: bool = False
    states: list[Tensor] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)
    longest: int | None = None  # text whose attention is known

    def attend(
        self,
        module: nn.Module | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        slopes: tuple[float, ...] = (),
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Stands in for transformers' attention: states ``[1, heads, T, width]`` in, ``[1, T, heads, width]`` out."""
        if attention_mask is not None:
            raise ModelError("its attention takes a mask of its own making")
        for name in ("softcap", "position_bias"):
            if options.get(name) is not None:
                raise UnknownOptionError(f"its attention uses {name}, which paged attention is not given")
        i = len(self.queries)
        self.places.append(len(self.entered) - 1)
        self.queries.append(query)
        self.keys.append(key)
        self.values.append(value)
        self.scales.append(float(scaling if scaling is not None else query.shape[-1] ** -0.5))
        self.windows.append(int(sliding_window or 0))
        self.sinks.append(() if s_aux is None else tuple(s_aux.detach().flatten().tolist()))
        self.slopes.append(slopes)
        if self.results is not None:
            return self.results[i], None
        return attended(query, key, value, scaling).transpose(1, 2), None

    def multiply(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        """Stands in for attention that is written out: ``[1, heads, T, width]`` in and out; of the scores see ``_measure``."""
        return self.attend(None, query, key, value, None)[0].transpose(1, 2)

    def route(self, module: nn.Module, *given: Tensor) -> Tensor:
        """Stands in for transformers' experts, in the form that the plugin makes one product of the chosen ones alone from."""
        from transformers.exporters.exporter_openvino import _tiled_experts_forward

        self.experts = True
        return _tiled_experts_forward(module, *given)  # type: ignore[no-any-return]


def attended(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Plain causal attention."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


@contextmanager
def holes(model: Any, tape: Tape, blocks: Sequence[nn.Module], positions: Tensor) -> Iterator[None]:
    """The model's attention and experts go to ``tape``; afterwards every configuration and hook is what it was."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    downs = find_down_projections(blocks, model.config.get_text_config(decoder=True).hidden_size)
    handles = [block.register_forward_hook(lambda _, args, out: _note_state(tape, out)) for block in dict.fromkeys(blocks)]
    handles += [
        block.register_forward_pre_hook(lambda _, *given: _note_entered(tape, *given), with_kwargs=True)
        for block in dict.fromkeys(blocks)
    ]
    handles += [
        down.register_forward_pre_hook(lambda _, args: tape.mlps.append(args[0])) for down in dict.fromkeys(downs or ())
    ]
    name = HOLE.format(id(tape))
    ALL_ATTENTION_FUNCTIONS[name], ALL_EXPERTS_FUNCTIONS[name] = tape.attend, tape.route
    try:
        with ExitStack() as stack:
            stack.enter_context(_implemented(model, EAGER if tape.written_out else name, name))
            if not _takes_positions(model):
                stack.enter_context(Positions(positions))
            if tape.written_out:
                stack.enter_context(AttentionProducts(tape.multiply, positions.shape[1]))
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name], ALL_EXPERTS_FUNCTIONS[name]
        for handle in handles:
            handle.remove()


@contextmanager
def _implemented(model: Any, *names: str) -> Iterator[None]:
    """Meanwhile these are the implementations of attention and, if it is given, of experts in every configuration."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    saved = {key: [getattr(config, name, None) for name in IMPLEMENTATIONS] for key, config in configs.items()}
    try:
        for config in configs.values():
            for implementation, name in zip(IMPLEMENTATIONS, names, strict=False):
                setattr(config, implementation, name)
        yield
    finally:
        for key, config in configs.items():
            for implementation, value in zip(IMPLEMENTATIONS, saved[key], strict=True):
                setattr(config, implementation, value)


def told(model: Any, positions: Tensor) -> dict[str, Tensor]:
    """What its forward is called with beside ids, as ``generate`` calls it."""
    return {"position_ids": positions} if _takes_positions(model) else {}


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _note_entered(tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tape.entered.append(args[0] if args else kwargs["hidden_states"])
    tape.states += [] if tape.states else tape.entered


def _note_state(tape: Tape, out: Any) -> None:
    tape.states.append(out[0] if isinstance(out, tuple) else out)


class Traced(nn.Module):
    """The model as a function of ids, positions and what attention gave; it returns all that the tape notes."""

    def __init__(self, model: Any, blocks: Sequence[nn.Module], written_out: bool) -> None:
        super().__init__()
        self.model, self.blocks, self.written_out = model, list(blocks), written_out

    def forward(self, input_ids: Tensor, position_ids: Tensor, *attended: Tensor) -> tuple[Tensor, ...]:
        tape = Tape(attended, self.written_out)
        with holes(self.model, tape, self.blocks, position_ids):
            logits = self.model(input_ids=input_ids, use_cache=False, **told(self.model, position_ids)).logits
        return (logits, *tape.states, *tape.queries, *tape.keys, *tape.values, *tape.mlps, *tape.entered)


def attentions(model: Any, blocks: Sequence[nn.Module]) -> tuple[list[Attention], list[Tensor], Tape]:
    """Each attention, what it gave for a few tokens, and what was noted: which block each is of, how many blocks show their
    MLP, whether there are experts. ValueError says why not."""
    try:
        return _attentions(model, blocks, written_out=False)
    except UnknownOptionError:
        raise
    except ModelError as error:
        try:
            return _attentions(model, blocks, written_out=True)
        except ModelError as other:
            raise (other if error.__cause__ is not None and other.__cause__ is None else error) from error


def _attentions(model: Any, blocks: Sequence[nn.Module], written_out: bool) -> tuple[list[Attention], list[Tensor], Tape]:
    _check_config(model, written_out)
    ids, positions = example(model)
    tape, width = Tape(written_out=written_out), model.config.get_text_config(decoder=True).hidden_size
    with foreign(NO_RUN, Exception), torch.no_grad(), holes(model, tape, blocks, positions):
        model(input_ids=ids, use_cache=False, **told(model, positions))
    if set(tape.places) != set(range(len(blocks))) or len(tape.states) != len(blocks) + 1:
        raise ModelError(f"attention as the engine knows it was found in {len(set(tape.places))} of its {len(blocks)} blocks")
    if odd := {state.shape[-1] for state in tape.states} - {width}:
        raise ModelError(f"it has states of width {odd.pop()}, and its head reads {width}")
    if written_out:
        _measure(model, tape)
    else:
        tape.longest = getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None)
    windows = tape.windows if written_out else _windows(model, tape.windows)
    found, given = [], []
    noted = zip(tape.queries, tape.keys, tape.values, tape.scales, windows, tape.sinks, tape.slopes, strict=True)
    for q, k, v, scale, window, sinks, slopes in noted:
        if q.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[-1] != q.shape[-1] or q.shape[1] % k.shape[1]:
            raise ModelError(f"its attention has shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
        if len(sinks) not in (0, q.shape[1]):
            raise ModelError(f"its attention has {len(sinks)} sinks for {q.shape[1]} heads")
        found.append(Attention(q.shape[1], k.shape[1], k.shape[-1], v.shape[-1], scale, window, sinks, slopes))
        given.append(torch.zeros((1, ids.shape[1], q.shape[1], v.shape[-1])))
    return found, given, tape


def _measure(model: Any, tape: Tape) -> None:
    """Scales, windows and slopes of attention that is written out, over texts as long as ``longest`` says from now on."""
    tape.longest = min(context_of(model.config) or MOST_SEEN, MOST_SEEN)
    ids = torch.arange(tape.longest)[None] % model.get_output_embeddings().weight.shape[0]
    seen: list[tuple[float, int, tuple[float, ...]]] = []

    def look(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        seen.append(measured(query, key, scores))
        return attended(query, key, value, seen[-1][0])

    with (
        foreign(NO_RUN, Exception),
        torch.no_grad(),
        _implemented(model, EAGER),
        AttentionProducts(look, tape.longest, loud=True),
    ):
        model(input_ids=ids, use_cache=False, **told(model, torch.arange(tape.longest)[None]))
    if len(seen) != len(tape.queries):
        raise ModelError(f"its attention is written out {len(tape.queries)} times for few tokens and {len(seen)} for many")
    tape.scales, tape.windows, tape.slopes = (list(found) for found in zip(*seen, strict=True))


def example(model: Any) -> tuple[Tensor, Tensor]:
    """A few ids and their positions, ``[1, T]`` each."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = torch.tensor([[i % vocabulary for i in EXAMPLE_IDS]])
    return ids, torch.arange(ids.shape[1])[None]


def _check_config(model: Any, written_out: bool) -> None:
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

    text = model.config.get_text_config(decoder=True)
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ModelError(f"it is in {model.dtype} on {model.device}, and export starts from float32 on the cpu")
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(rope.get("rope_type")), *(str(r.get("rope_type")) for r in rope.values() if isinstance(r, dict))}
    if growing := kinds.intersection(GROWING_ROPE):
        raise ModelError(f"its {growing.pop()} rotary angles depend on how long the text is")
    memories = {kind: DYNAMIC_LAYER_TYPE_MAPPING.get(kind, DynamicLayer) for kind in getattr(text, "layer_types", None) or ()}
    held = {kind for kind, memory in memories.items() if issubclass(memory, LinearAttentionCacheLayerMixin)}
    if odd := held or memories.keys() - {*WINDOW_TYPES, *(memories if written_out else ())}:
        kept = "a state is" if held else "more than keys and values is"
        raise ModelError(f"it has blocks of type {min(odd)}, of which {kept} kept, and graphs are given keys and values alone")
    layers = DynamicCache(config=model.config).layers
    if shared := [i for i, layer in enumerate(layers) if not hasattr(layer, "is_sliding")]:
        raise ModelError(f"{len(shared)} of its blocks, from {shared[0]} on, attend to keys and values of others")


def _windows(model: Any, given: Sequence[int]) -> list[int]:
    """Each block's window by the library's own cache, which must not contradict what its attention was given."""
    from transformers.cache_utils import DynamicCache

    layers = DynamicCache(config=model.config).layers
    kept = [int(layer.sliding_window) if layer.is_sliding else 0 for layer in layers]
    kept = kept if len(kept) == len(given) else list(given)  # a cache that grows as it is used, or a looped model's
    for i, (own, other) in enumerate(zip(kept, given, strict=True)):
        if other and other != own:
            raise ModelError(f"block {i} has a window of {own} or of {other} positions")
    return kept


def trace(model: Any, blocks: Sequence[nn.Module], given: Sequence[Tensor], written_out: bool) -> Any:
    """The traced graph: inputs ids, positions, one per hole; outputs as ``Traced`` returns them, in that order.

    Raises AdiError for a model that the tracer or the converter cannot follow.
    """
    import openvino as ov

    ids, positions = example(model)
    with foreign(NO_TRACE, Exception), torch.no_grad(), plain_functions(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer points at every Python branch; the self-check judges the outcome
        traced = torch.jit.trace(
            Traced(model, blocks, written_out).eval(), (ids, positions, *given), check_trace=False, strict=False
        )
        return ov.convert_model(traced, example_input=(ids, positions, *given))


@contextmanager
def foreign(doing: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, in code that is not ours, become an AdiError that says what was being done."""
    try:
        yield
    except (AdiError, MemoryError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        unknown = re.search("No conversion rule found for operations?: ([^\\n]+)", str(error))
        raise ModelError(f"OpenVINO has no operation for its {unknown[1].strip()}" if unknown else doing) from error
