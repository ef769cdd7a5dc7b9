"""A freshly traced graph gets its names and becomes two: the blocks, with holes for attention, and the head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adi.errors import ModelError
from adi.model.backbone import Loop
from adi.model.openvino.export.constants import settle_small
from adi.model.openvino.export.fuse_qkv import fuse_matrices
from adi.model.openvino.graph import Attention, by_name, inject, inputs_of, partial_shape

STAGE_BYTES = 300 << 20  # of weights in 32 bits that are compiled at a time


def name_ports(graph: Any, attentions: Sequence[Attention], layers: int, mlps: int) -> None:
    """Give a freshly traced graph the names above, by position alone, and take the tracer's from it."""
    for port in (port for node in graph.get_ops() for port in node.outputs()):
        port.get_tensor().set_names(set())
    results = [["logits"], *([f"{kind}.{i}" for i in range(n)] for kind, n in _outputs(layers, len(attentions), mlps))]
    for node, name in zip(graph.get_results(), (name for part in results for name in part), strict=True):
        node.set_friendly_name(name)
    names = ["input_ids", "position_ids", *(f"attended.{i}" for i in range(len(attentions)))]
    shapes = [[1, -1]] * 2 + [[1, -1, a.heads, a.value_width] for a in attentions]
    for node, name, shape in zip(graph.get_parameters(), names, shapes, strict=True):
        node.set_friendly_name(name)
        node.output(0).get_tensor().set_names({name})
        node.set_partial_shape(partial_shape(shape))
    graph.validate_nodes_and_infer_types()


def tidy(graph: Any) -> None:
    """Small weights are plain constants, rows are counted by positions, and what makes query, key and value of one input is one
    product."""
    settle_small(graph)
    _count_rows_by_positions(graph)
    kinds = ("query.", "key.", "value.")
    fuse_matrices(graph, [node for node in graph.get_results() if node.get_friendly_name().startswith(kinds)])


def _count_rows_by_positions(graph: Any) -> None:
    """Wherever a shape is read, take the number of rows from ``position_ids`` instead.

    The library shares such readings over all blocks, and a segment would run the first block again just to measure it.
    """
    from openvino import opset13 as ops

    positions = by_name(graph.get_parameters())["position_ids"]
    rows = ops.gather(ops.shape_of(positions), ops.constant(np.array([1], np.int64)), ops.constant(np.int64(0)))
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "ShapeOf":
            continue
        sizes = list(node.input_value(0).get_partial_shape())
        if sum(size.is_dynamic for size in sizes) != 1:
            continue
        whole = [rows if size.is_dynamic else ops.constant(np.array([size.get_length()], np.int64)) for size in sizes]
        shape = ops.convert(ops.concat(whole, 0), node.get_output_element_type(0).to_string())
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(shape.output(0))
    graph.validate_nodes_and_infer_types()


def _outputs(layers: int, holes: int, mlps: int) -> tuple[tuple[str, int], ...]:
    return ("state", layers + 1), ("query", holes), ("key", holes), ("value", holes), ("mlp", mlps), ("entered", layers)


def rolled(graph: Any, loop: Loop | None, places: Sequence[int], layers: int) -> tuple[Any, list[int]]:
    """The graph with one turn in the place of all, the second, which takes what entered the first; and which attentions are
    left. ``places`` says of which block each is."""
    import openvino as ov
    from openvino import opset13 as ops

    blocks = list(range(layers))
    results, inputs = by_name(graph.get_results()), by_name(graph.get_parameters())
    if loop is not None:
        second, end = loop.first + loop.period, loop.first + loop.period * loop.turns
        blocks = [*range(loop.first), *range(second, second + loop.period), *range(end, layers)]
        before = results[f"state.{loop.first}"]
        entering = ops.reshape(before.input_value(0), np.array([0, 0, -1], np.int64), special_zero=True)
        for state, by in ((end, results[f"state.{second + loop.period}"].input_value(0)), (second, entering.output(0))):
            for user in results[f"state.{state}"].input_value(0).get_target_inputs():
                if user.get_node().get_type_name() != "Result":
                    user.replace_source_output(by)
        before.input(0).replace_source_output(entering.output(0))
    holes = [i for block in blocks for i, place in enumerate(places) if place == block]
    kept = {"logits": results["logits"], "state.0": results["state.0"]}
    kept |= {f"state.{at + 1}": results[f"state.{block + 1}"] for at, block in enumerate(blocks)}
    if loop is not None and loop.first:
        kept[f"state.{loop.first}"] = before
    kept |= {f"{kind}.{at}": results[f"{kind}.{i}"] for kind in ("query", "key", "value") for at, i in enumerate(holes)}
    kept |= {f"mlp.{at}": results[f"mlp.{block}"] for at, block in enumerate(blocks) if f"mlp.{block}" in results}
    given = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"]}
    given |= {f"attended.{at}": inputs[f"attended.{i}"] for at, i in enumerate(holes)}
    for name, node in (kept | given).items():
        node.set_friendly_name(name)
    for name, node in given.items():
        node.output(0).get_tensor().set_names({name})
    return ov.Model(list(kept.values()), list(given.values()), "rolled"), holes


def compiled_loop(graph: Any, loop: Loop | None) -> Loop | None:
    """The turns that one graph can run. Where something lies between turns (a norm) that does not lie before the first, that
    is the turns after the first, which is compiled by itself."""
    if loop is None:
        return None
    results, second = by_name(graph.get_results()), loop.first + loop.period
    if _same(results[f"state.{second}"], results[f"entered.{second}"]):
        return loop
    return Loop(second, loop.period, loop.turns - 1) if loop.turns > 2 else None


def _same(one: Any, other: Any) -> bool:
    a, b = one.input_value(0), other.input_value(0)
    return bool(a.get_node().get_name() == b.get_node().get_name() and a.get_index() == b.get_index())


def split_head(graph: Any, layers: int, width: int) -> tuple[Any, Any]:
    """The blocks, and the head: ``hidden [1, T, D]`` to ``logits [1, T, V]`` and the likeliest token ``[1, T]``."""
    import openvino as ov
    from openvino import opset13 as ops

    results = by_name(graph.get_results())
    inject(results[f"state.{layers}"], width)
    logits = results.pop("logits")
    best = ops.topk(logits.input_value(0), np.int32(1), -1, "max", "value", index_element_type="i32")
    token = ops.result(ops.squeeze(best.output(1), np.int64(-1)).output(0))
    token.set_friendly_name("token")
    needed = inputs_of([logits])
    if {node.get_friendly_name() for node in needed} - {"hidden", "position_ids"}:  # positions only count the rows
        raise ModelError("its head reads more than the state that leaves its last block")
    return ov.Model(list(results.values()), graph.get_parameters(), "blocks"), ov.Model([logits, token], needed, "head")


def observed(
    blocks: Any, attentions: Sequence[Attention], outputs: Mapping[Any, str], samples: Sequence[Sequence[int]]
) -> Iterator[tuple[Any, Any]]:
    """What enters the product of each name in ``outputs``, ``[T, K]``, with its key, for each of some texts, token ids.

    Some blocks at a time are compiled and run over all texts, so that their weights in 32 bits are never all there.
    """
    import openvino as ov

    core = ov.Core()
    states: list[Any] = [None] * len(samples)
    for part, keys in _stages(blocks, attentions, outputs):
        request = core.compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
        for i, ids in enumerate(samples):
            tokens = np.array([ids], np.int64)
            given = {"input_ids": tokens, "position_ids": np.arange(len(ids))[None], "hidden": states[i]}
            request.infer({port.get_any_name(): given[port.get_any_name()] for port in request.model_inputs})
            for at, key in enumerate(keys):
                seen = request.get_output_tensor(at).data
                yield key, seen.reshape(-1, seen.shape[-1])
            states[i] = request.get_output_tensor(len(keys)).data.copy()


def _stages(blocks: Any, attentions: Sequence[Attention], outputs: Mapping[Any, str]) -> Iterator[tuple[Any, list[Any]]]:
    """The blocks in parts with ordinary causal attention in the holes (no windows, sinks, slopes); each gives what is asked of
    it and the state that leaves it."""
    import openvino as ov
    from openvino import opset13 as ops

    graph = blocks.clone()
    inputs, results = by_name(graph.get_parameters()), by_name(graph.get_results())
    for i, a in enumerate(attentions):
        query, key, value = (results[f"{kind}.{i}"].input_value(0) for kind in ("query", "key", "value"))
        repeat = ops.constant(np.repeat(np.arange(a.kv_heads), a.heads // a.kv_heads))
        key, value = (ops.gather(x, repeat, ops.constant(np.int64(1))) for x in (key, value))
        paid = ops.scaled_dot_product_attention(query, key, value, scale=ops.constant(np.float32(a.scale)), causal=True)
        attended = ops.transpose(paid, ops.constant(np.array([0, 2, 1, 3], np.int64)))
        for user in inputs[f"attended.{i}"].output(0).get_target_inputs():
            user.replace_source_output(attended.output(0))
    layers = sum(name.startswith("state.") for name in results) - 1
    ends = [*range(stage_blocks(graph, layers), layers, stage_blocks(graph, layers)), layers]
    sources = {end: results[f"state.{end}"].input_value(0) for end in ends}
    for end in ends[:-1]:
        inject(results[f"state.{end}"], int(sources[end].get_partial_shape()[-1].get_length()))
    left = dict(outputs)
    for end in ends:
        last = ops.result(sources[end])
        nodes = by_name(ov.Model([last], inputs_of([last]), "part").get_ordered_ops())
        keys = [key for key, name in left.items() if name in nodes]
        found = [ops.result(nodes[left.pop(key)].input_value(0)) for key in keys]
        yield ov.Model([*found, last], inputs_of([*found, last]), "part"), keys


def stage_blocks(graph: Any, layers: int) -> int:
    """How many blocks are run at a time where weights take 32 bits."""
    numbers = sum(math.prod(n.get_output_shape(0)) for n in graph.get_ops() if n.get_type_name() == "Constant")
    return max(1, int(STAGE_BYTES * layers / (4 * numbers)))
