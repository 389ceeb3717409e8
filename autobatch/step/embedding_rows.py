"""Gradients of embeddings kept as rows, for tables much larger than the rows that an update touches.

The gradient of an ``Embedding`` names a row for each token looked up. Its sum in a dense accumulator takes the size of
the table. Here the rows of all micro-batches are put next to each other in a buffer that can hold those of an effective
batch. The optimizer gets what it gets in plain Keras: the rows of the whole effective batch, in order.

The most rows that a sample can have is read from the trace. It is certain if the ids come straight from the data: then
a sample has as many rows as its shape has elements. In other code, or if lengths vary, the accumulator stays dense. It
stays dense under XLA too, which cannot write at an offset that it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from autobatch.tensors.batch_structure import Structure
from autobatch.tensors.variables import distinct
from autobatch.types import Layer, Tensor, Variable

WORTH_IT = 0.5
"""Largest share of the dense accumulator's size that a buffer may take to be used."""

_AS_MANY = ("Reshape", "Cast", "Identity", "ExpandDims", "Squeeze", "Transpose", "StopGradient")
"""Operations whose result has as many elements as their first input."""

_NO_MORE = ("StridedSlice", "Slice")
"""Operations whose result has no more elements than their first input."""

_ELEMENT_BY_ELEMENT = ("SelectV2", "AddV2", "BiasAdd", "Sub", "Mul", "FloorMod", "Maximum", "Minimum")
"""Operations on elements, one by one, such as ids from the end of a table, offsets and hashing."""


class RowBuffer:
    """Rows of one table's gradient in one update, and their indices.

    ``table`` is the ``tf.Variable``. The buffer takes no memory before :meth:`reserve`. Every other method may be
    traced before that.
    """

    def __init__(self, table: Variable, dtype: Any) -> None:
        self._table = table
        self._index_dtype: Any = tf.int64
        self.rows_per_sample: int | None = None
        self.refused = False
        """True if a gradient of the trace does not fit, so that the table's gradients are summed."""
        width = table.shape[1:]
        with tf.device(table.device):
            self._values = tf.Variable(
                tf.zeros([0, *width], dtype), shape=[None, *width], trainable=False, name="autobatch_rows"
            )
            self._indices = tf.Variable(
                tf.zeros([0], tf.int64), shape=[None], trainable=False, name="autobatch_row_indices"
            )
        with tf.device("CPU:0"):
            self._filled = tf.Variable(tf.constant(0, tf.int64), trainable=False, name="autobatch_rows_filled")

    @property
    def variables(self) -> list[Variable]:
        """Variables of the buffer."""
        return [self._values, self._indices, self._filled]

    def takes(self, gradient: Tensor, structure: Structure, samples: int) -> bool:
        """Return True if a buffer for ``samples`` is certain to hold all rows and saves memory.

        This must be called in a trace. It sets ``rows_per_sample`` if it returns True.
        """
        rows = _rows_per_sample(gradient.indices, structure)
        if rows is None:
            return False
        width = math.prod(self._values.shape[1:]) * self._values.dtype.size
        if samples * rows * (width + self._indices.dtype.size) > WORTH_IT * self._table.shape[0] * width:
            return False
        self.rows_per_sample = max(rows, self.rows_per_sample or 0)
        return True

    def reserve(self, samples: int) -> None:
        """Take the memory for the rows of ``samples`` samples."""
        assert self.rows_per_sample is not None
        rows = samples * self.rows_per_sample
        self._values.assign(tf.zeros([rows, *self._values.shape[1:]], self._values.dtype))
        self._indices.assign(tf.zeros([rows], tf.int64))

    def clear(self) -> None:
        """Forget the rows of the previous update."""
        with tf.device("CPU:0"):
            self._filled.assign(0)

    def add(self, gradient: Tensor, scale: Any) -> None:
        """Append the rows of one micro-batch's gradient, times ``scale``."""
        self._index_dtype = gradient.indices.dtype
        with tf.device("CPU:0"):
            start = self._filled.read_value()
            stop = self._filled.assign_add(tf.shape(gradient.indices, out_type=tf.int64)[0])
        self._values[start:stop].assign(tf.cast(gradient.values, self._values.dtype) * scale)
        self._indices[start:stop].assign(tf.cast(gradient.indices, tf.int64))

    def gradient(self) -> Any:
        """Return the gradient of the effective batch: ``tf.IndexedSlices`` with a row for each token."""
        with tf.device("CPU:0"):
            filled = self._filled.read_value()
        values = tf.cast(self._values.read_value()[:filled], self._table.dtype)
        indices = tf.cast(self._indices.read_value()[:filled], self._index_dtype)
        return tf.IndexedSlices(values, indices, tf.constant(self._table.shape.as_list(), self._index_dtype))

    def release(self) -> None:
        """Give the memory back."""
        self._values.assign(tf.zeros([0, *self._values.shape[1:]], self._values.dtype))
        self._indices.assign(tf.zeros([0], tf.int64))


def tables_of(layers: Iterable[Layer]) -> list[Any]:
    """Return the ``tf.Variable`` of each trained embedding, whose rows a :class:`RowBuffer` may hold."""
    found = [layer for layer in layers if isinstance(layer, keras.layers.Embedding) and layer.built and layer.trainable]
    return distinct(weight for layer in found for weight in layer.trainable_weights if len(weight.shape) == 2)


def _rows_per_sample(indices: Any, structure: Structure) -> int | None:
    """Return the most rows that a sample can have; None if the trace does not show it."""
    if tf.executing_eagerly() or any(not isinstance(spec, tf.TensorSpec) for spec in structure.specs):
        return None  # the first dimension of a ragged tensor's values does not count samples
    operation = indices.op
    if operation.type == "ConcatV2":  # of several uses of one table
        parts = [_rows_per_sample(part, structure) for part in operation.inputs[:-1]]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None
    if operation.type in (*_AS_MANY, *_NO_MORE):
        return _rows_per_sample(operation.inputs[0], structure)
    shape = indices.shape
    if operation.type in _ELEMENT_BY_ELEMENT:
        # Scalars and vectors of a known length may be broadcast to the others, which must have the result's own shape.
        others = [part for part in operation.inputs if not part.shape.is_fully_defined()]
        if not others or any(part.shape.rank is None or part.shape.as_list() != shape.as_list() for part in others):
            return None
        parts = [_rows_per_sample(part, structure) for part in others if part.dtype != tf.bool]
        known = [part for part in parts if part is not None]
        return max(known) if known and len(known) == len(parts) else None
    if operation.type != "Placeholder" or not shape.rank or shape[0] is not None or None in shape[1:]:
        return None
    return int(math.prod(shape[1:]))
