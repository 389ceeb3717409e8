"""Gradients of a table's rows, kept as rows: for embeddings whose table is much larger than what an update touches.

The gradient of an ``Embedding`` names a row for each token looked up. Summed up in a dense accumulator it takes the
table's size. Here the rows of all micro-batches are put next to each other in a buffer for as many as an effective
batch can have, and the optimizer gets what it gets in plain Keras: the rows of the whole effective batch, in order.

How many that can be is read from the trace. It is certain where the ids come straight from the data: then a sample
has as many as its shape says. Where they do not, or lengths vary, the accumulator stays dense; so it does under XLA,
which cannot write at an offset that it does not know.
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
"""The buffer is used where it takes less than this share of the dense accumulator."""

_AS_MANY = ("Reshape", "Cast", "Identity", "ExpandDims", "Squeeze", "Transpose", "StopGradient")
"""Operations whose result has as many elements as their first input has."""

_NO_MORE = ("StridedSlice", "Slice")
"""Operations whose result has no more elements than their first input has."""

_ELEMENT_BY_ELEMENT = ("SelectV2", "AddV2", "BiasAdd", "Sub", "Mul", "FloorMod", "Maximum", "Minimum")
"""Operations on elements, one by one: ids from the end of a table, offsets, hashing."""


class RowBuffer:
    """The rows of one table's gradient in one update, and which they are.

    ``table`` is the ``tf.Variable``. It holds nothing before :meth:`reserve`; everything else may be traced before.
    """

    def __init__(self, table: Variable, dtype: Any) -> None:
        self._table = table
        self._index_dtype: Any = tf.int64
        self.rows_per_sample: int | None = None
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
        """All variables of the buffer."""
        return [self._values, self._indices, self._filled]

    def takes(self, gradient: Tensor, structure: Structure, samples: int) -> bool:
        """Whether a buffer for so many samples is certain to hold all rows and is worth it; to be asked in a trace."""
        rows = _rows_per_sample(gradient.indices, structure)
        if rows is None:
            return False
        width = math.prod(self._values.shape[1:]) * self._values.dtype.size
        if samples * rows * (width + self._indices.dtype.size) > WORTH_IT * self._table.shape[0] * width:
            return False
        self.rows_per_sample = rows
        return True

    def reserve(self, samples: int) -> None:
        """Take the memory for the rows of so many samples."""
        assert self.rows_per_sample is not None
        rows = samples * self.rows_per_sample
        self._values.assign(tf.zeros([rows, *self._values.shape[1:]], self._values.dtype))
        self._indices.assign(tf.zeros([rows], tf.int64))

    def clear(self) -> None:
        """Forget the rows of the update before."""
        with tf.device("CPU:0"):
            self._filled.assign(0)

    def add(self, gradient: Tensor, scale: Any) -> None:
        """Put the rows of one micro-batch's gradient, times ``scale``, behind those that are there."""
        self._index_dtype = gradient.indices.dtype
        with tf.device("CPU:0"):
            start = self._filled.read_value()
            stop = self._filled.assign_add(tf.shape(gradient.indices, out_type=tf.int64)[0])
        self._values[start:stop].assign(tf.cast(gradient.values, self._values.dtype) * scale)
        self._indices[start:stop].assign(tf.cast(gradient.indices, tf.int64))

    def gradient(self) -> Any:
        """The gradient of the effective batch: ``tf.IndexedSlices``, a row for each token."""
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
    """The ``tf.Variable`` of each embedding that is trained: the tables that a :class:`RowBuffer` may serve."""
    found = [layer for layer in layers if isinstance(layer, keras.layers.Embedding) and layer.built and layer.trainable]
    return distinct(weight for layer in found for weight in layer.trainable_weights if len(weight.shape) == 2)


def _rows_per_sample(indices: Any, structure: Structure) -> int | None:
    """How many rows a sample can have at the most; None if the trace does not tell."""
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
        # Scalars and vectors of a known length may be spread over the others, which must have the result's own shape.
        others = [part for part in operation.inputs if not part.shape.is_fully_defined()]
        if not others or any(part.shape.rank is None or part.shape.as_list() != shape.as_list() for part in others):
            return None
        parts = [_rows_per_sample(part, structure) for part in others if part.dtype != tf.bool]
        known = [part for part in parts if part is not None]
        return max(known) if known and len(known) == len(parts) else None
    if operation.type != "Placeholder" or not shape.rank or shape[0] is not None or None in shape[1:]:
        return None
    return int(math.prod(shape[1:]))
