"""Private parts of TensorFlow's graphs: the functions that an operation calls, and bytes of its outputs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry as _op_def_registry


def output_item_bytes(node: Any) -> list[int]:
    """Return the bytes of one element of each output of a ``NodeDef``.

    An output that holds no numbers counts as 0. The list is empty if the operation is unknown.
    """
    definition = _op_def_registry.get(node.op)
    kinds: list[int] = []
    for output in () if definition is None else definition.output_arg:
        if output.type_list_attr:
            kinds += node.attr[output.type_list_attr].list.type
        else:
            times = node.attr[output.number_attr].i if output.number_attr else 1
            kinds += [output.type or node.attr[output.type_attr].type] * times
    return [(tf.dtypes.as_dtype(kind).size or 0) if kind else 0 for kind in kinds]


def called_graph(operation: Any) -> Any:
    """Return the traced graph of the ``tf.function`` that a graph's operation calls; None if it calls none."""
    if operation.type not in ("PartitionedCall", "StatefulPartitionedCall"):
        return None
    function = operation.graph._get_function(operation.get_attr("f").name)
    return getattr(function, "graph", None)


def branch_graphs(operation: Any) -> list[Any]:
    """Return the traced graphs of the branches of a conditional operation; an empty list if any is unknown."""
    names = (
        [operation.get_attr("then_branch").name, operation.get_attr("else_branch").name]
        if operation.type in ("If", "StatelessIf")
        else [branch.name for branch in operation.get_attr("branches")]
    )
    graphs = [_graph_named(operation, name) for name in names]
    return [] if None in graphs else graphs


def body_graph(operation: Any) -> Any:
    """Return the traced graph of a loop's body; None if it is unknown."""
    return _graph_named(operation, operation.get_attr("body").name)


def _graph_named(operation: Any, name: str) -> Any:
    return getattr(operation.graph._get_function(name), "graph", None)
