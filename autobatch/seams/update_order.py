"""Order of the updates of an optimizer's variables: one after another, in its traced graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from autobatch.seams.patching import replaced

_WAITS_FOR_NOTHING = frozenset(("Const", "Placeholder"))

_RUN_FUNCTIONS = frozenset(
    (
        *("If", "StatelessIf", "Case", "StatelessCase", "While", "StatelessWhile"),
        *("PartitionedCall", "StatefulPartitionedCall"),
    )
)


@contextlib.contextmanager
def updates_in_turn() -> Iterator[None]:
    """Let each traced operation on more than single numbers wait for the one before it, while the context is open.

    So an update holds the memory that its code holds line by line, not that of whatever is started together. In
    branches of a condition, the changes of variables wait, and the operations that lead to them. Keras's optimizers go
    through ``extended.update`` for each variable, for weight decay and for the step itself.

    Single numbers are left out: they may be elsewhere than the weights, and a device that waits for another stands
    still.
    """
    extended = tf.distribute.get_strategy().extended
    outer = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    # By the graph's id: the graph, the number of operations put in order, and the last one that others wait for. The
    # graph is held so that no other gets its id.
    ordered: dict[int, tuple[Any, int, Any]] = {}
    if outer is not None:
        ordered[id(outer)] = outer, len(outer.get_operations()), None

    def put_in_order(graph: Any) -> None:
        _, first, last = ordered.get(id(graph), (graph, 0, None))
        operations = graph.get_operations()
        for operation in operations[first:]:
            if operation.type in _WAITS_FOR_NOTHING or not _is_of_many_numbers(operation):
                continue
            if last is not None:
                operation._add_control_input(last)
            last = operation
        ordered[id(graph)] = graph, len(operations), last

    def in_turn(original: Callable[..., Any]) -> Callable[..., Any]:
        def update(var: Any, fn: Callable[..., Any], args: Any = (), kwargs: Any = None, group: bool = True) -> Any:
            result = original(var, fn, args, kwargs, group)
            if not tf.executing_eagerly():
                put_in_order(tf.compat.v1.get_default_graph())
            return result

        return update

    with replaced(extended, "update", in_turn):
        yield
    if outer is not None:
        put_in_order(outer)


def _is_of_many_numbers(operation: Any) -> bool:
    """Return True if it takes or makes more than single numbers, or may do so within, as branches and functions may."""
    if operation.type in _RUN_FUNCTIONS:
        return True
    tensors = [tensor for tensor in (*operation.inputs, *operation.outputs) if tensor.dtype != tf.resource]
    return any(tensor.shape.num_elements() != 1 for tensor in tensors)
