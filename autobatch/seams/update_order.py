"""Order the updates of an optimizer's variables one after another, in its traced graph."""

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
    """While this lasts, what is traced, and is more than single numbers, waits for what was traced before it.

    So an update holds what its code holds, line by line, and not what happens to be started together. In branches of a
    condition it is the changes of variables that wait, and what leads to them: Keras's optimizers go through
    ``extended.update`` for each variable, for weight decay and for the step itself. Single numbers may be elsewhere
    than the weights, and a device that waits for another one stands still.
    """
    extended = tf.distribute.get_strategy().extended
    outer = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    # By the graph's id: how far it was put in order, and the last that others wait for. The graph is held, so that no
    # other gets its id.
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
    """Whether it takes or makes more than single numbers, or may do so, as branches and functions may within."""
    if operation.type in _RUN_FUNCTIONS:
        return True
    tensors = [tensor for tensor in (*operation.inputs, *operation.outputs) if tensor.dtype != tf.resource]
    return any(tensor.shape.num_elements() != 1 for tensor in tensors)
