"""Recipes for the values that a traced micro-step assigns, by which they are computed anew for the effective batch.

Between the samples and a running average lie statistics of the batch: means, sums, variances. :func:`recipe_of` finds
them, and :mod:`autobatch.averages.batch_statistics` merges them over the micro-batches. :meth:`Recipe.follow` then does
once, with the merged statistics, what the micro-step does with its own. It need not be known that the value is an
average, or with what momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.averages.batch_statistics import Statistic, StatisticKind
from autobatch.graphs import linearity, writes
from autobatch.types import Operation, Tensor

_REDUCTIONS = {
    "Mean": StatisticKind.MOMENTS,
    "Sum": StatisticKind.SUM,
    "Max": StatisticKind.LARGEST,
    "Min": StatisticKind.SMALLEST,
    "UnsortedSegmentSum": StatisticKind.SUM,
}
_PRODUCTS = frozenset(["MatMul", "BatchMatMul", "BatchMatMulV2"])
"""Products of two matrices: if both have a dimension of samples and the product has none, it is a sum over them."""

_SAME = frozenset(["Identity", "StopGradient", "PreventGradient"])
_SIZES = frozenset(["Shape", "ShapeN", "Size"])


@dataclass(frozen=True, slots=True)
class Recipe:
    """A value, the statistics that it is made of, and the handles of the variables that are read for it."""

    value: Any
    statistics: tuple[Statistic, ...]
    handles: tuple[Any, ...]
    readings: tuple[Any, ...]
    """The operations that read the variables."""

    def follow(self, known: Mapping[int, Any]) -> Any:
        """Compute the value in the current graph; ``known`` has merged statistics by the ids of the trace's tensors."""
        made = dict(known)

        def tensor_of(tensor: Tensor) -> Any:
            if id(tensor) not in made:
                operation = tensor.op
                if operation.type == "Placeholder":
                    made[id(tensor)] = writes.given(tensor)
                elif operation.type == "ReadVariableOp":
                    handle = writes.given(operation.inputs[0])
                    made[id(tensor)] = tf.raw_ops.ReadVariableOp(resource=handle, dtype=tensor.dtype)
                else:
                    outputs = _copied(operation, [tensor_of(each) for each in operation.inputs])
                    made.update((id(old), new) for old, new in zip(operation.outputs, outputs, strict=True))
            return made[id(tensor)]

        return tensor_of(self.value)


def _copied(operation: Operation, inputs: list[Any]) -> list[Any]:
    attributes = {name: value for name, value in operation.node_def.attr.items() if not name.startswith("_")}
    graph = tf.compat.v1.get_default_graph()
    dtypes = [output.dtype for output in operation.outputs]
    copy = graph.create_op(operation.type, inputs, dtypes, attrs=attributes, op_def=operation.op_def)
    return list(copy.outputs)


def recipe_of(value: Any, statistic_of: Callable[[Any], Statistic | None]) -> Recipe | None:
    """Return how a tensor of a graph follows from statistics and variables; None where that is unknown.

    ``statistic_of`` returns the statistic that a tensor is, or None.
    """
    statistics: dict[int, Statistic] = {}
    handles: list[Any] = []
    readings: list[Any] = []
    pending, seen = [value], set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operation = tensor.op
        statistic = statistic_of(tensor)
        if statistic is not None:
            statistics[id(statistic)] = statistic
        elif operation.type == "ReadVariableOp":
            handle = writes.given(operation.inputs[0])
            if handle is None:
                return None
            handles.append(handle)
            readings.append(operation)
        elif operation.type == "Placeholder":
            if writes.given(tensor) is None:
                return None
        elif not _can_be_copied(operation):
            return None
        else:
            pending += operation.inputs
    return Recipe(value, tuple(statistics.values()), tuple(handles), tuple(readings))


def _can_be_copied(operation: Operation) -> bool:
    calls = any(attribute.type in ("func", "list(func)") for attribute in operation.op_def.attr)
    sizes = operation.type in _SIZES and not all(each.shape.is_fully_defined() for each in operation.inputs)
    takes_variable = any(each.dtype == tf.resource for each in operation.inputs)
    return not (calls or sizes or takes_variable or operation.op_def.is_stateful)


def statistic_at(tensor: Tensor, apart: Collection[int]) -> Statistic | None:
    """Return the statistic of a batch that a tensor's operation computes; None if it is none, or may not be merged.

    ``apart`` are the ids of tensors that hold a micro-batch's share of the whole. A statistic of what they scale is not
    one of the data alone.
    """
    operation = tensor.op
    if not tensor.shape.is_fully_defined() or not operation.inputs:
        return None
    sources = tuple(operation.inputs[:2]) if operation.type in _PRODUCTS else (operation.inputs[0],)
    kind = StatisticKind.SUM if operation.type in _PRODUCTS else _REDUCTIONS.get(operation.type)
    if kind is None:
        return _count(tensor)
    if any(_is_of_one_size(source) for source in sources):
        return None
    averaged = kind is StatisticKind.MOMENTS
    statistic = _moments(tensor, sources[0]) if averaged else Statistic(kind, (tensor,), sources=sources)
    return None if any(_is_scaled_or_compared(source, apart) for source in statistic.sources) else statistic


def _is_of_one_size(source: Any) -> bool:
    return source.shape.rank is None or source.shape.is_fully_defined()


def _moments(tensor: Tensor, source: Any) -> Statistic:
    weight = tf.cast(tf.size(source, tf.int64), tf.float32) / max(1, tensor.shape.num_elements())
    found = _deviations(tensor.op)
    if found is None:
        return Statistic(StatisticKind.MOMENTS, (tensor,), weight, (source,))
    mean, centred = found
    return Statistic(StatisticKind.MOMENTS, (mean, tensor), weight, (centred,))


def _deviations(averaging: Any) -> tuple[Any, Any] | None:
    """Return the mean and the values that it averages, if ``averaging`` computes their variance; else None."""
    squared = averaging.inputs[0].op
    if squared.type == "Square":
        squared = squared.inputs[0].op
        if squared.type != "Sub":
            return None
    elif squared.type != "SquaredDifference":
        return None
    values, mean = squared.inputs
    while mean.op.type in _SAME:
        mean = mean.op.inputs[0]
    if mean.op.type != "Mean" or mean.op.inputs[0] is not values:
        return None
    own, other = (tf.get_static_value(operation.inputs[1]) for operation in (averaging, mean.op))
    same = (
        own is not None
        and other is not None
        and set(own.ravel() % values.shape.rank) == set(other.ravel() % values.shape.rank)
    )
    return (mean, values) if same else None


def _count(tensor: Tensor) -> Statistic | None:
    """Return the number of samples, or of rows made of them, as a sum; None if the tensor is no such number."""
    operation = tensor.op
    if operation.type == "StridedSlice":
        first = tf.get_static_value(operation.inputs[1])
        if operation.inputs[0].op.type != "Shape" or first is None or list(first) != [0] or tensor.shape.rank:
            return None
        counted = operation.inputs[0].op.inputs[0]
    elif operation.type == "Size":
        counted = operation.inputs[0]
    else:
        return None
    # Of two unknown sizes, one does not count samples: it is the same in every micro-batch.
    sizes = counted.shape.as_list() if counted.shape.rank else []
    is_count = sizes[:1] == [None] and sizes.count(None) == 1
    return Statistic(StatisticKind.SUM, (tensor,)) if is_count else None


def _is_scaled_or_compared(source: Any, apart: Collection[int]) -> bool:
    """Return True if a statistic's source depends on the number of samples, or puts samples together itself.

    A gradient depends on the number, as the loss is a mean. Its sum over the micro-batches is not that of the whole.
    """
    pending, seen = [source], set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in apart:
            return True
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operation = tensor.op
        if operation.type == "Cast" and tensor.dtype.is_floating and _is_a_size(operation.inputs[0]):
            return True
        pending += operation.inputs
    return linearity.comparing_operation(source) is not None


def _is_a_size(tensor: Tensor) -> bool:
    """Return True if a number is made of the sizes of tensors that are as large as the batch."""
    pending, seen = [tensor], set()
    while pending:
        each = pending.pop()
        if id(each) in seen or not each.shape.is_fully_defined() or each.dtype.is_floating:
            continue
        seen.add(id(each))
        if each.op.type in _SIZES and any(_is_of_unknown_size(taken) for taken in each.op.inputs):
            return True
        pending += each.op.inputs
    return False


def _is_of_unknown_size(tensor: Tensor) -> bool:
    return not tensor.shape.is_fully_defined()
