"""Parts of a step's logs that were made of results of metrics, computed again.

A metric that is updated after the last micro-batch has its final result only then. The step has computed parts of its
logs from an earlier result. They are computed again by the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from autobatch.tensors.variables import components
from autobatch.types import Tensor


class Derived:
    """Operations that lead from results of metrics to a tensor of the logs, copied out of their graph."""

    def __init__(
        self, graph_def: Any, name: str, results: dict[str, tuple[Any, int]], variables: dict[str, Any]
    ) -> None:
        self._graph_def = graph_def
        self._name = name
        self._results = results
        self._variables = variables

    def now(self, result_of: Callable[[Any, int], Any]) -> Any:
        """Return the tensor's present value; ``result_of(metric, place)`` returns a part of a metric's result."""
        given = {name: tf.convert_to_tensor(result_of(*result)) for name, result in self._results.items()}
        given |= {name: variable.read_value() for name, variable in self._variables.items()}
        (value,) = tf.graph_util.import_graph_def(self._graph_def, input_map=given, return_elements=[self._name])
        return value


def derived_from(tensor: Tensor, noted: Sequence[tuple[Any, int, Any]], readable: Sequence[Any]) -> Derived | None:
    """Return how ``tensor`` of a graph is made of results of metrics, or None.

    It is None if the tensor depends on no result, or on anything else but results and variables.

    Args:
        tensor: a part of the logs.
        noted: metrics, places in their results, and the tensors that stood there.
        readable: variables that may be read.
    """
    graph = tensor.graph
    result_of = {part.name: (metric, place) for metric, place, part in noted if getattr(part, "graph", None) is graph}
    handles = {inner.name: outer for outer, inner in graph.captures if inner.dtype == tf.resource}
    of_metrics = {id(variable): variable for metric, _, _ in noted for variable in components(metric.variables)}
    by_handle = {id(variable.handle): variable for variable in (*readable, *of_metrics.values())}
    results: dict[str, tuple[Any, int]] = {}
    variables: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    pending = [tensor]
    while pending:
        current = pending.pop()
        operation = current.op
        if current.name in result_of:
            results[current.name] = result_of[current.name]
        elif operation.type == "ReadVariableOp" and operation.inputs[0].name in handles:
            variables[current.name] = by_handle.get(id(handles[operation.inputs[0].name]))
        elif operation.op_def.is_stateful or operation.type == "Placeholder" or "Call" in operation.type:
            return None
        elif operation.name not in operations:
            operations[operation.name] = operation
            pending += operation.inputs
    reads_metrics = any(id(variable) in of_metrics for variable in variables.values())
    if any(variable is None for variable in variables.values()) or not (results or reads_metrics):
        return None
    graph_def = tf.compat.v1.GraphDef()
    for operation in operations.values():
        node = graph_def.node.add()
        node.CopyFrom(operation.node_def)
        node.ClearField("device")
        del node.input[:]
        node.input.extend(each.name for each in operation.inputs)
        if "_class" in node.attr:
            del node.attr["_class"]
    graph_def.versions.CopyFrom(graph.as_graph_def().versions)
    return Derived(graph_def, tensor.name, results, variables)
