"""Values that pass from one part of a step to the next: those for all micro-batches, and lists with one for each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from autobatch.averages import batch_statistics
from autobatch.step.step_trace import PartedTrace
from autobatch.types import Tensor


class PartState:
    """Values that a step has computed so far, by the tensors of its trace ``parted``."""

    def __init__(self, parted: PartedTrace) -> None:
        self._once: dict[int, Any] = {}
        self._each: dict[int, Any] = {}
        self._logs: dict[int, Any] = {}
        self._held: dict[int, Any] = {}
        self._length = sum(own.shape.num_elements() for _, own in parted.trace.counted)
        self.statistics: dict[int, list[Any]] = {}
        self.leaves: list[Any] = []
        self.sizes: Any = None
        self.totals: Any = None

    def begin(self, leaves: list[Tensor], sizes: Any) -> None:
        """Begin an update with these leaves, whose micro-batches have these sizes."""
        self._once, self._each, self._logs, self._held, self.statistics = {}, {}, {}, {}, {}
        self.leaves, self.sizes = leaves, sizes
        with tf.device("CPU:0"):
            self.totals = tf.zeros([self._length], tf.float64)

    def note_once(self, tensors: Iterable[Any], values: Iterable[Any]) -> None:
        """Note values that are the same for all micro-batches."""
        self._once.update(zip(map(id, tensors), values, strict=True))

    def note_each(self, tensors: Iterable[Any], values: Iterable[Any]) -> None:
        """Note lists with a value for each micro-batch."""
        self._each.update(zip(map(id, tensors), values, strict=True))

    def note_logs(self, places: Iterable[int], values: Iterable[Any]) -> None:
        """Note those logs of the step that stand at these places."""
        self._logs.update(zip(places, values, strict=True))

    def note_held(self, places: Iterable[int], values: Iterable[Any]) -> None:
        """Note lists of those arguments of metrics that stand at these places."""
        self._held.update(zip(places, values, strict=True))

    def once_values(self, tensors: Iterable[Any]) -> list[Any]:
        """Return the values that :meth:`note_once` has noted."""
        return [self._once[id(tensor)] for tensor in tensors]

    def each_values(self, tensors: Iterable[Any]) -> list[Any]:
        """Return the lists that :meth:`note_each` has noted."""
        return [self._each[id(tensor)] for tensor in tensors]

    def log_values(self) -> list[Any]:
        """Return the logs in their order."""
        return [self._logs[place] for place in sorted(self._logs)]

    def held_lists(self) -> list[Any]:
        """Return the held arguments of metrics, in their order."""
        return [self._held[place] for place in sorted(self._held)]


def specs_of(tensors: Iterable[Any]) -> list[Any]:
    """Return the specs of values that stand for tensors of a trace."""
    return [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]


def list_specs_of(tensors: Iterable[Any]) -> list[Any]:
    """Return the specs of lists with a value for each micro-batch."""
    return [tf.TensorSpec([], tf.variant) for _ in tensors]


def state_specs_of(statistics: Any) -> list[Any]:
    """Return the specs of packed statistics."""
    with tf.Graph().as_default():
        states = batch_statistics.empty(batch_statistics.layout_of(statistics))
        return [tf.TensorSpec(state.shape, state.dtype) for state in states]


def _shape_of(tensor: Tensor) -> Any:
    return tf.constant([-1 if size is None else size for size in tensor.shape], tf.int32)


def empty_list(tensor: Tensor) -> Any:
    """Return an empty list, on the host, for the values that stand for a tensor of a trace."""
    with tf.device("CPU:0"):
        return tf.raw_ops.EmptyTensorList(
            element_shape=_shape_of(tensor), max_num_elements=-1, element_dtype=tensor.dtype
        )


def item_of(values: Any, index: Any, tensor: Tensor) -> Any:
    """Return the value at ``index`` of such a list."""
    found = tf.raw_ops.TensorListGetItem(
        input_handle=values,
        index=tf.cast(index, tf.int32),
        element_shape=_shape_of(tensor),
        element_dtype=tensor.dtype,
    )
    return tf.ensure_shape(found, tensor.shape)


def next_index(index: Any) -> Any:
    """Return the index of the next micro-batch, on the host."""
    with tf.device("CPU:0"):
        return index + 1
