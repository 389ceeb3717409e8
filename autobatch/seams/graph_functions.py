"""Private parts of TensorFlow's graphs: the functions that an operation calls, copies of it, bytes of its outputs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry as _op_def_registry
from tensorflow.python.ops import control_flow_v2_func_graphs as _func_graphs
from tensorflow.python.ops import handle_data_util as _handle_data


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


_CALLING = ("PartitionedCall", "StatefulPartitionedCall")
_BRANCHING = ("If", "StatelessIf", "Case", "StatelessCase")
_LOOPING = ("While", "StatelessWhile")


def functions_of(operation: Any) -> list[Any] | None:
    """Return the traced graphs of the functions that an operation may run, None for each that is unknown.

    Return None if it runs none.
    """
    kind = operation.type
    if kind in _CALLING:
        return [called_graph(operation)]
    if kind in _BRANCHING:
        return branch_graphs(operation) or [None]
    if kind in _LOOPING:
        return [body_graph(operation), _graph_named(operation, operation.get_attr("cond").name)]
    if any(attribute.type in ("func", "list(func)") for attribute in operation.op_def.attr):
        return [None]
    return None


def copied_operation(operation: Any, inputs: list[Any]) -> list[Any]:
    """Make an operation of another graph again in the current one, with other inputs; return its outputs.

    The functions that it runs are made known to the current graph. Control inputs and colocation are left out:
    TensorFlow orders what touches the same variable by itself.
    """
    graph = tf.compat.v1.get_default_graph()
    for attribute in operation.op_def.attr:
        value = operation.node_def.attr[attribute.name]
        named = [value.func] if attribute.type == "func" else value.list.func if attribute.type == "list(func)" else []
        for function in named:
            known = operation.graph._get_function(function.name)
            if known is not None:
                graph._add_function_recursive(known)
    attributes = {
        name: value for name, value in operation.node_def.attr.items() if name not in ("_class", "_output_shapes")
    }
    with tf.device(operation.device or None):
        copy = graph.create_op(
            operation.type,
            inputs,
            [output.dtype for output in operation.outputs],
            attrs=attributes,
            name=f"{operation.type}_again",
        )
    for old, new in zip(operation.outputs, copy.outputs, strict=True):
        new.set_shape(old.shape)
        if old.dtype in (tf.resource, tf.variant):
            _handle_data.copy_handle_data(old, new)
    return list(copy.outputs)


def loop_around(graph: Any, outer: Any) -> bool:
    """Return True if a graph is, or is within, the body of a loop that TensorFlow runs in the graph ``outer``."""
    return _is_within(graph, outer, _func_graphs.WhileBodyFuncGraph)


def branch_around(graph: Any, outer: Any) -> bool:
    """Return True if a graph is, or is within, a branch of a condition that TensorFlow evaluates in ``outer``."""
    return _is_within(graph, outer, _func_graphs.CondBranchFuncGraph)


def _is_within(graph: Any, outer: Any, kind: type) -> bool:
    while graph is not None and graph is not outer:
        if isinstance(graph, kind):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False
