"""Graphs with holes become graphs that run: paged attention goes into the holes, and stops cut the chain of blocks.

Inputs and outputs are known by the names of their nodes, which this package gives: ``state.i`` enters block i (and leaves
block i - 1), ``query.i``, ``key.i`` and ``value.i`` lead into hole i and ``attended.i`` out of it, ``mlp.i`` is what the down
projection of block i reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from adi.schema import Natural, Positive

BLOCK_TOKENS = 32  # positions in one block of KV memory: what the CPU plugin's paged attention is written for

# What PagedAttentionExtension takes after its first thirteen inputs in OpenVINO 2026.4: parts of it that are not used here but
# for sinks (scores, cache rotation, sparse attention, eviction, token types, tree masks). Type and shape of empty constants.
UNUSED: tuple[tuple[type[np.generic], tuple[int, ...]], ...] = (
    *(((np.int32, (0,)),) * 3),
    *(((np.float32, (0,)),) * 2),
    *(((np.int32, ()),) * 2),
    (np.float32, (0, 0, 0, 0)),
    (np.int32, ()),
    *(((np.int32, (0,)),) * 4),
    (np.uint8, (0,)),
    (np.int32, (0,)),
)
SINKS = 7  # which of these
SEQUENCE_INPUTS = (("past_lens", 1), ("subsequence_begins", 1), ("block_indices", 1), ("block_indices_begins", 1))


@dataclass(frozen=True)
class Attention:
    """One block's attention: heads, widths of a head's queries and values, scale, its window in positions (0: none), and the
    logit of each head's sink, a place without a value that takes its share of the attention (none: there are no sinks), and of
    ALiBi by how much each head's scores grow from one position to the next (none: they do not)."""

    heads: Positive
    kv_heads: Positive
    key_width: Positive
    value_width: Positive
    scale: float
    window: Natural
    sinks: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()


@dataclass(frozen=True)
class SegmentGraph:
    """Blocks [lo, hi) as a graph; ``outputs`` names its results in order: "hidden", "before", "mlp"."""

    lo: int
    hi: int
    graph: Any
    outputs: tuple[str, ...]


def fill_holes(graph: Any, attentions: Sequence[Attention]) -> None:
    """Put paged attention over ``key_cache.i`` and ``value_cache.i`` into every hole of the blocks."""
    from openvino import opset13 as ops
    from openvino.op import _PagedAttentionExtension

    inputs, results = by_name(graph.get_parameters()), by_name(graph.get_results())
    shared = {name: new_input(name, [-1] * rank, np.int32) for name, rank in (*SEQUENCE_INPUTS, ("max_context_len", 0))}
    for i, a in enumerate(attentions):
        flat = [_flat(results[f"{kind}.{i}"].input_value(0), n) for kind, n in _widths(a)]
        caches = [new_input(f"{kind}_cache.{i}", [-1, -1, -1, -1], None) for kind in ("key", "value")]
        numbers = [
            ops.constant(np.float32(a.scale)),
            ops.constant(np.int32(a.window)),
            ops.constant(np.array(a.slopes, np.float32)),
        ]
        unused = [ops.constant(np.zeros(shape, kind)) for kind, shape in UNUSED]
        if a.sinks:
            unused[SINKS] = ops.constant(np.array(a.sinks, np.float32).reshape(1, -1, 1, 1))
        sequence = [shared[name] for name, _ in SEQUENCE_INPUTS]
        nodes = [*flat, *caches, *sequence, *numbers, shared["max_context_len"], *unused]
        paged = _PagedAttentionExtension([node.output(0) for node in nodes])
        heads = {"num_k_heads": a.kv_heads, "k_head_size": a.key_width, "num_v_heads": a.kv_heads, "v_head_size": a.value_width}
        for key, number in heads.items():
            paged.get_rt_info()[key] = number
        shape = ops.constant(np.array([1, -1, a.heads, a.value_width], np.int64))
        attended = ops.reshape(paged.output(0), shape, special_zero=False)
        for user in inputs[f"attended.{i}"].output(0).get_target_inputs():
            user.replace_source_output(attended.output(0))


def cut(graph: Any, stops: Sequence[int], width: int) -> list[SegmentGraph]:
    """The filled graph as one segment for each stop, each with its own input ``hidden`` where it does not embed. A stop at 0
    cuts the embedding off.

    The segments share nodes (positions, rotary angles) with each other and with ``graph``, which is of no use afterwards.
    """
    import openvino as ov
    from openvino import opset13 as ops

    results = by_name(graph.get_results())
    sources = {name: result.input_value(0) for name, result in results.items()}
    for stop in stops[:-1]:
        inject(results[f"state.{stop}"], width)
    parts = []
    for lo, hi in pairwise((0, *stops)):
        wanted = {"hidden": f"state.{hi}", "before": f"state.{hi - 1}", "mlp": f"mlp.{hi - 1}"}
        if hi - 1 == lo and (lo or 0 in stops):
            del wanted["before"]  # it is the input
        outputs = {name: sources[key] for name, key in wanted.items() if key in sources}
        ends = [ops.result(source) for source in outputs.values()]
        part = ov.Model(ends, inputs_of(ends), f"blocks_{lo}_{hi}")
        parts.append(SegmentGraph(lo, hi, part, tuple(outputs)))
    return parts


def embedding_graph(blocks: Any) -> Any:
    """From ids to what enters the first block."""
    import openvino as ov
    from openvino import opset13 as ops

    result = ops.result(by_name(blocks.get_results())["state.0"].input_value(0))
    return ov.Model([result], inputs_of([result]), "embedding")


def constant_bytes(graph: Any) -> int:
    """What a graph's constants take, as they are stored."""
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    return int(sum(math.prod(n.get_output_shape(0)) * n.get_output_element_type(0).bitwidth / 8 for n in constants))


def fix_rows(graph: Any, rows: int, sequences: int, width: int) -> None:
    """Give a segment one number of rows and one number of sequences, for good."""
    fixed = {
        "input_ids": [1, rows],
        "position_ids": [1, rows],
        "hidden": [1, rows, width],
        "past_lens": [sequences],
        "subsequence_begins": [sequences + 1],
        "block_indices_begins": [sequences + 1],
    }
    names = [port.get_any_name() for port in graph.inputs]
    graph.reshape({name: partial_shape(fixed[name]) for name in names if name in fixed})


def inject(result: Any, width: int) -> Any:
    """A new input that takes the place of what ``result`` reads, for everything but ``result``."""
    hidden = new_input("hidden", [1, -1, width], np.float32)
    for user in result.input_value(0).get_target_inputs():
        if user.get_node().get_type_name() != "Result":
            user.replace_source_output(hidden.output(0))
    return hidden


def _widths(a: Attention) -> tuple[tuple[str, int], ...]:
    return ("query", a.heads * a.key_width), ("key", a.kv_heads * a.key_width), ("value", a.kv_heads * a.value_width)


def _flat(output: Any, width: int) -> Any:
    """``[1, heads, T, width]`` as ``[T, heads * width]``."""
    from openvino import opset13 as ops

    rows_first = ops.transpose(output, ops.constant(np.array([0, 2, 1, 3], np.int64)))
    return ops.reshape(rows_first, ops.constant(np.array([-1, width], np.int64)), special_zero=False)


def new_input(name: str, shape: list[int], kind: type[np.generic] | None) -> Any:
    import openvino as ov
    from openvino import opset13 as ops

    element = ov.Type.dynamic if kind is None else ov.Type(kind)
    node = ops.parameter(partial_shape(shape), element, name=name)
    node.output(0).get_tensor().set_names({name})
    return node


def partial_shape(shape: Sequence[int]) -> Any:
    import openvino as ov

    return ov.PartialShape(list(shape))


def by_name(nodes: Sequence[Any]) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in nodes}


def inputs_of(results: Sequence[Any]) -> list[Any]:
    """The inputs that these results read, directly or not."""
    stack, seen, found = list(results), set(), []
    while stack:
        node = stack.pop()
        name = node.get_name()  # unique within a process, which friendly names are not
        if name in seen:
            continue
        seen.add(name)
        if node.get_type_name() == "Parameter":
            found.append(node)
        stack += [port.get_source_output().get_node() for port in node.inputs()]
    return found
