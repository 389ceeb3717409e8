"""Writes to variables in the trace of a micro-step: who reads an updated variable, and which writes change nothing.

An assignment is *settled* if every further micro-batch of an update leaves the variable as the first one left it. An
example is a variable times a mask of zeros and ones. The number of micro-batches in an update then makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from autobatch.tensors.variables import components
from autobatch.types import Graph, Operation, Tensor, Variable

READING = frozenset(["ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "VarIsInitializedOp"])
"""Operations that take a variable's handle and leave its value alone."""


def written_variables(graph: Graph, candidates: Iterable[Variable]) -> list[Variable]:
    """Return the candidates that a function's graph writes so far, itself or in functions that it calls."""
    handles = {id(outer): inner for outer, inner in graph.captures if inner.dtype == tf.resource}
    return [
        variable
        for variable in components(candidates)
        if id(variable.handle) in handles and is_written(handles[id(variable.handle)])
    ]


def written_handles(graph: Graph) -> set[int]:
    """Return the ids of the handles of all variables that a function's graph writes so far."""
    resources = [(outer, inner) for outer, inner in graph.captures if inner.dtype == tf.resource]
    return {id(given(outer)) for outer, inner in resources if is_written(inner)}


def given(tensor: Tensor) -> Any:
    """Return what a captured tensor stands for outside of all graphs; None if the graph is called with it."""
    while hasattr(tensor, "graph"):
        outer = next((outer for outer, inner in tensor.graph.captures if inner is tensor), None)
        if outer is None:
            return None
        tensor = outer
    return tensor


def is_written(handle: Tensor) -> bool:
    """Return True if a handle's variable is changed in its graph, or in a function that the graph calls."""
    for operation in handle.consumers():
        if operation.type == "Identity":
            if is_written(operation.outputs[0]):
                return True
        elif operation.type not in READING and not _makes(operation, handle):
            # For a call, a condition or a loop, TensorFlow notes the resources that its functions only read.
            only_read = operation.node_def.attr["_read_only_resource_inputs"].list.i
            if any(taken is handle and place not in only_read for place, taken in enumerate(operation.inputs)):
                return True
    return False


def _makes(operation: Operation, handle: Tensor) -> bool:
    """Return True if an operation gives a first value to a variable that is made in its function's first trace."""
    if operation.type not in ("If", "StatelessIf"):
        return False
    asked = operation.inputs[0].op
    return asked.type == "VarIsInitializedOp" and asked.inputs[0] is handle


_NOT_READING = frozenset(["AssignVariableOp", "VariableShape", "VarIsInitializedOp"])
"""Operations that take a variable's handle and do not see its value."""

_SAME_ELEMENTS = frozenset(["Identity", "Cast", "Reshape", "ExpandDims", "Squeeze", "BroadcastTo"])
"""Operations that leave the elements of their first input as they are, but for the dtype."""

_CLAMPS = frozenset(["Maximum", "Minimum"])


def is_read_after(graph: Graph, variables: Iterable[Variable], position: int) -> bool:
    """Return True if an operation made from ``position`` on reads one of the variables."""
    own = {id(variable.handle) for variable in components(variables)}
    handles = {id(inner) for outer, inner in graph.captures if id(outer) in own}
    later = (each for each in graph.get_operations()[position:] if each.type not in _NOT_READING)
    return any(id(taken) in handles for operation in later for taken in operation.inputs)


def settled_handles(graph: Graph, updated: Iterable[Any], applied_at: int) -> list[Any]:
    """Return the handles of the variables that a graph writes with an effect in its first run only.

    ``updated`` are the variables that optimizers change. ``applied_at`` is the number of operations that the graph had
    when the first optimizer was applied.
    """
    handles = [(outer, inner) for outer, inner in graph.captures if inner.dtype == tf.resource]
    written = [(outer, inner) for outer, inner in handles if is_written(inner)]
    if not written:
        return []
    outer_updated = {id(each.handle) for each in components(updated)}
    look = _Look(
        graph,
        written={id(inner) for _, inner in written},
        updated={id(inner) for outer, inner in handles if id(outer) in outer_updated},
        applied_at=applied_at,
    )
    return [outer for outer, inner in written if look.is_settled(inner)]


class _Look:
    """View that :func:`settled_handles` has of a graph; handles are identified by their ids."""

    def __init__(self, graph: Graph, *, written: set[int], updated: set[int], applied_at: int) -> None:
        self._outer_of = {id(inner): outer for outer, inner in graph.captures}
        self._places = {id(operation): place for place, operation in enumerate(graph.get_operations())}
        self._written = written
        self._updated = updated
        self._applied_at = applied_at

    def is_settled(self, handle: Tensor) -> bool:
        writing = [each for each in handle.consumers() if each.type not in READING]
        if len(writing) != 1 or writing[0].type != "AssignVariableOp" or id(writing[0]) not in self._places:
            return False
        place = self._places[id(writing[0])]
        after_update = place >= self._applied_at
        if after_update and id(handle) in self._updated:
            return False  # what the optimizer does next is not undone until the next update's first micro-batch
        changing = self._written | self._updated if after_update else self._written
        read: set[int] = set()
        if not self._is_same_again(writing[0].inputs[1], handle, changing, read):
            return False
        earlier = [each for each in handle.consumers() if each.type == "ReadVariableOp"]
        return all(id(each) in read or self._places.get(id(each), 0) > place for each in earlier)

    def _is_same_again(self, value: Any, handle: Tensor, changing: set[int], read: set[int]) -> bool:
        """Return True if ``value`` is constant, or the variable's own behind masks and clamps."""
        operation = value.op
        if operation.type == "ReadVariableOp" and operation.inputs[0] is handle:
            read.add(id(operation))
            return True
        if self._is_constant(value, changing):
            return True
        if operation.type in _SAME_ELEMENTS:
            return self._is_same_again(operation.inputs[0], handle, changing, read)
        if operation.type not in _CLAMPS and operation.type != "Mul":
            return False
        constant = [each for each in operation.inputs if self._is_constant(each, changing)]
        others = [each for each in operation.inputs if all(each is not known for known in constant)]
        if len(others) != 1 or (operation.type == "Mul" and not self._is_mask(constant[0])):
            return False
        return self._is_same_again(others[0], handle, changing, read)

    def _is_constant(self, tensor: Tensor, changing: set[int]) -> bool:
        pending, seen = [tensor], set()
        while pending:
            each = pending.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            operation = each.op
            if operation.type == "ReadVariableOp":
                if id(operation.inputs[0]) in changing or id(operation.inputs[0]) not in self._outer_of:
                    return False
            elif operation.type == "Placeholder":
                if hasattr(self._outer_of.get(id(each), tensor), "graph"):
                    return False  # what the micro-step is given
            elif operation.op_def.is_stateful or operation.type.endswith(("Call", "If", "While", "Case")):
                return False
            else:
                pending += operation.inputs
        return True

    def _is_mask(self, tensor: Tensor) -> bool:
        """Return True if a constant holds nothing but zeros and ones."""
        while tensor.op.type in _SAME_ELEMENTS and tensor.dtype != tf.bool:
            tensor = tensor.op.inputs[0]
        if tensor.dtype == tf.bool:
            return True
        value = tf.get_static_value(tensor)
        if tensor.op.type == "Placeholder":
            value = self._outer_of[id(tensor)].numpy()
        elif tensor.op.type == "ReadVariableOp":
            with tf.init_scope():
                outer = self._outer_of[id(tensor.op.inputs[0])]
                value = tf.raw_ops.ReadVariableOp(resource=outer, dtype=tensor.dtype).numpy()
        return value is not None and bool(((value == 0) | (value == 1)).all())
