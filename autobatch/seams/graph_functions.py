"""Private parts of TensorFlow's graphs: the functions that an operation calls, and bytes of its outputs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry as _op_def_registry


def output_item_bytes(node: Any) -> list[int]:
    """The bytes of an element of each output of a ``NodeDef``; 0 where it is no number, and none if it is not known."""
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
    """The traced graph of the ``tf.function`` that an operation of a graph calls; None if it calls none."""
    if operation.type not in ("PartitionedCall", "StatefulPartitionedCall"):
        return None
    function = operation.graph._get_function(operation.get_attr("f").name)
    return getattr(function, "graph", None)


def branch_graphs(operation: Any) -> list[Any]:
    """The traced graphs of the branches of an operation that runs one of several; empty where they are not known."""
    names = (
        [operation.get_attr("then_branch").name, operation.get_attr("else_branch").name]
        if operation.type in ("If", "StatelessIf")
        else [branch.name for branch in operation.get_attr("branches")]
    )
    graphs = [_graph_named(operation, name) for name in names]
    return [] if None in graphs else graphs


def body_graph(operation: Any) -> Any:
    """The traced graph of a loop's body; None where it is not known."""
    return _graph_named(operation, operation.get_attr("body").name)


def _graph_named(operation: Any, name: str) -> Any:
    return getattr(operation.graph._get_function(name), "graph", None)
