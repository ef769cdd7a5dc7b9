"""Matrices that read the same input become one: those that make query, key and value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adi.model.openvino.export.constants import is_weight


def is_linear(node: Any) -> bool:
    """Whether this is a product with a constant matrix ``[N, K]``."""
    if node.get_type_name() != "MatMul" or not is_weight(node.input_value(1)):
        return False
    given = node.get_attributes()
    return bool(given["transpose_b"] and not given["transpose_a"] and len(node.input_value(1).get_shape()) == 2)


def linears_before(results: Sequence[Any]) -> list[Any]:
    """The first such products met going back from these results."""
    stack, seen, found = list(results), set(), []
    while stack:
        node = stack.pop()
        name = node.get_name()
        if name in seen:
            continue
        seen.add(name)
        if is_linear(node):
            found.append(node)
        else:
            stack += [port.get_source_output().get_node() for port in node.inputs()]
    return found


def fuse_matrices(graph: Any, results: Sequence[Any]) -> None:
    """One product for all constant matrices before ``results`` that multiply the same input, its result split again.

    A pass over few rows is bound by calls and by reading weights, so one long product is faster than three. (Gate and up
    stay two: merged they save 2% of a token, and splitting what they give costs a long prompt a tenth of its time.) Where
    each product has a bias of its own, so has the merged one.
    """
    before = {node.get_name() for node in linears_before(results)}
    groups: dict[tuple[str, int], list[Any]] = {}
    for node in graph.get_ordered_ops():
        if node.get_name() in before:
            source = node.input_value(0)
            groups.setdefault((source.get_node().get_name(), source.get_index()), []).append(node)
    for group in groups.values():
        if len(group) > 1:
            _fuse(group)
    graph.validate_nodes_and_infer_types()


def _fuse(group: list[Any]) -> None:
    from openvino import opset13 as ops

    weights = [node.input_value(1) for node in group]
    product = ops.matmul(group[0].input_value(0), ops.concat(weights, 0), False, True)
    product.set_friendly_name(group[0].get_friendly_name())
    ends = group
    biases = [_bias(node) for node in group]
    if all(bias is not None for bias in biases):
        values = [bias.input_value(1).get_node().data.reshape(-1) for bias in biases if bias is not None]
        product = ops.add(product, ops.constant(np.concatenate(values)))
        ends = biases
    lengths = ops.constant(np.array([weight.get_shape()[0] for weight in weights], np.int64))
    parts = ops.variadic_split(product, ops.constant(np.int64(-1)), lengths)
    for i, end in enumerate(ends):
        for user in end.output(0).get_target_inputs():
            user.replace_source_output(parts.output(i))


def _bias(node: Any) -> Any:
    """The addition of a constant vector that alone reads this product, or None."""
    users = list(node.output(0).get_target_inputs())
    if len(users) != 1 or users[0].get_node().get_type_name() != "Add" or users[0].get_index() != 0:
        return None
    add = users[0].get_node()
    other = add.input_value(1).get_node()
    length = node.input_value(1).get_shape()[0]
    return add if other.get_type_name() == "Constant" and other.data.size == length else None
