"""Effective batches as lists of leaves: their number of samples, and cuts of some of the samples.

A leaf is a dense, ragged or sparse tensor whose first dimension counts samples. The parts of an element may differ in
their number of rows, as two streams of 8 and 24 samples do. Their leaves then count portions, which keep the streams'
proportions; a whole element is one portion where there is no common measure. Missing parts (no targets, no sample
weight) are None in the structure, or an empty ``tf.experimental.Optional`` where Keras's data adapters put one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.types import Batch, ElementSpec, Tensor

NONE_SPEC = type(tf.type_spec_from_value(None))
"""Class of the type spec by which tf.data describes a part that is None."""


def is_missing(part: Any) -> bool:
    """Return True if this part of a batch, or its type spec, stands for a missing part."""
    return part is None or isinstance(part, (tf.experimental.Optional, tf.OptionalSpec, NONE_SPEC))


def open_batch_dimension(spec: Any) -> Any:
    """Return a type spec with its first dimension left open, so that one trace serves all sizes.

    A scalar has no dimension, and stays as it is.
    """
    if spec.shape.rank == 0:
        return spec
    shape = tf.TensorShape(None) if spec.shape.rank is None else tf.TensorShape([None, *spec.shape[1:]])
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec(shape, spec.dtype)
    return tf.TensorSpec(shape, spec.dtype)


@dataclass(frozen=True, slots=True)
class UnevenSpec:
    """Type specs of elements whose parts have different numbers of rows, in place of a plain nest of specs.

    ``rows`` holds the rows of each part that make up one portion, in order: 1 and 3 where each labelled sample comes
    with three unlabelled ones. It is None if elements cannot be cut, so that each of them is a portion.
    """

    nest: ElementSpec
    rows: tuple[int, ...] | None


class Structure:
    """Nesting of one data set's elements, and the rows of each part that belong together.

    ``element_spec`` describes a batch: a nest of type specs, with None in place of a missing part; or an
    :class:`UnevenSpec`. Everywhere else a *portion* counts as one sample. It is one sample of a batch whose parts have
    a row for each, and some rows of each part where the parts differ. The leaves have a first dimension that counts
    portions; :meth:`pack` takes it away again.
    """

    def __init__(self, element_spec: ElementSpec | UnevenSpec) -> None:
        self.given_spec = element_spec
        uneven = element_spec if isinstance(element_spec, UnevenSpec) else None
        self._nest = element_spec if uneven is None else uneven.nest
        parts = [part for part in tf.nest.flatten(self._nest) if not is_missing(part)]
        self._parts = [open_batch_dimension(part) for part in parts]
        self._rows: tuple[int | None, ...] = (1,) * len(parts)
        if uneven is not None:
            self._rows = (None,) * len(parts) if uneven.rows is None else uneven.rows
        self.is_uneven = uneven is not None
        self.specs: list[Any] = [_in_portions(part, rows) for part, rows in zip(self._parts, self._rows, strict=True)]

    @property
    def element_spec(self) -> ElementSpec:
        """Nest of type specs of a batch, whose first dimensions are left open."""
        return self._packed(self._parts)

    @property
    def takes_elements_whole(self) -> bool:
        """True if elements cannot be cut."""
        return None in self._rows

    @property
    def rows(self) -> tuple[int, ...] | None:
        """Rows of each part in a portion; None if elements cannot be cut."""
        known = tuple(rows for rows in self._rows if rows is not None)
        return known if len(known) == len(self._rows) else None

    @property
    def samples_in_portion(self) -> int:
        """Number of rows of the first part in a portion; 1 if elements cannot be cut."""
        return (self._rows[0] if self._rows else None) or 1

    @property
    def smallest_in_words(self) -> str:
        """The smallest batch that can be made, for a message."""
        if self.takes_elements_whole:
            return "one element, which cannot be cut,"
        if not self.is_uneven:
            return "one sample"
        return f"a batch of {in_words(self.rows or ())} rows"

    def portions_in(self, data: Batch) -> int | None:
        """Return the number of portions in a batch; None if its parts are not of this structure's proportions."""
        if self.takes_elements_whole:
            return 1
        found = {
            divmod(rows, of_portion or 1) if rows is not None else (None, 0)
            for rows, of_portion in zip(rows_of(data), self._rows, strict=True)
        }
        portions, left = next(iter(found), (None, 0))
        return portions if len(found) == 1 and not left else None

    def count(self, data: Batch) -> int:
        """Return the number of portions in a batch, outside of any graph.

        Raises:
            ValueError: the parts of the batch are not of this structure's proportions.
        """
        portions = self.portions_in(data)
        if portions is None:
            raise ValueError(
                f"The parts of this batch cannot be cut together: they have {in_words(rows_of(data))} rows. Give all "
                f"parts the same number of rows, or keep their proportions. Received: rows {rows_of(data)}"
            )
        return portions

    def specs_of(self, samples: int | None) -> list[Any]:
        """Return the leaves' type specs, those of dense ones with a number of samples; None leaves it open."""
        if samples is None:
            return self.specs
        return [
            tf.TensorSpec([samples, *spec.shape[1:]], spec.dtype)
            if isinstance(spec, tf.TensorSpec) and spec.shape.rank
            else spec
            for spec in self.specs
        ]

    def leaves(self, data: Batch) -> list[Tensor]:
        """Return the tensors of one batch, in order, with their rows in portions; missing parts are left out."""
        parts = [part for part in tf.nest.flatten(data) if not is_missing(part)]
        if not all(tf.is_tensor(part) for part in parts):
            with tf.device("CPU:0"):  # arrays are not to land on the device whole
                parts = [part if _is_composite(part) else tf.convert_to_tensor(part) for part in parts]
        if not self.is_uneven:
            return parts
        with tf.device("CPU:0"):
            return [_to_portions(part, rows) for part, rows in zip(parts, self._rows, strict=True)]

    def pack(self, leaves: list[Tensor]) -> Any:
        """Return the leaves in the structure that ``train_step`` takes."""
        if self.is_uneven:
            leaves = [_from_portions(leaf, rows) for leaf, rows in zip(leaves, self._rows, strict=True)]
        return self._packed(leaves)

    def _packed(self, parts: list[Any]) -> Any:
        remaining = iter(parts)
        flat = [None if is_missing(part) else next(remaining) for part in tf.nest.flatten(self._nest)]
        return tf.nest.pack_sequence_as(self._nest, flat)


def _is_composite(part: Any) -> bool:
    return isinstance(part, (tf.RaggedTensor, tf.SparseTensor))


def _in_portions(spec: Any, rows: int | None) -> Any:
    """Return the spec of a leaf whose first dimension counts portions of ``rows`` rows each, or whole elements."""
    if rows == 1:
        return spec
    shape = tf.TensorShape(None)
    if spec.shape.rank is not None:
        shape = tf.TensorShape([None, *spec.shape] if rows is None else [None, rows, *spec.shape[1:]])
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank + 1, spec.row_splits_dtype)
    return type(spec)(shape, spec.dtype)


def _to_portions(part: Tensor, rows: int | None) -> Any:
    if rows == 1:
        return part
    if isinstance(part, tf.SparseTensor):
        rest = part.dense_shape if rows is None else part.dense_shape[1:]
        return tf.sparse.reshape(part, tf.concat([tf.constant([-1, rows or 1][: 1 + bool(rows)], tf.int64), rest], 0))
    if rows is None:
        return tf.expand_dims(part, 0)
    return tf.reshape(part, tf.concat([[-1, rows], tf.shape(part)[1:]], 0))


def _from_portions(leaf: Tensor, rows: int | None) -> Any:
    if rows == 1:
        return leaf
    if isinstance(leaf, tf.SparseTensor):
        rest = leaf.dense_shape[1:] if rows is None else leaf.dense_shape[2:]
        return tf.sparse.reshape(leaf, rest if rows is None else tf.concat([[-1], rest], 0))
    if isinstance(leaf, tf.RaggedTensor):
        return leaf[0]
    if rows is None:
        return tf.squeeze(leaf, [0])
    known = leaf.shape[2:]
    rest = known.as_list() if known.is_fully_defined() else tf.unstack(tf.shape(leaf)[2:])
    return tf.reshape(leaf, [-1, *rest])


def rows_of(data: Batch) -> list[int | None]:
    """Return the number of rows of each part of a batch, outside of any graph; None for a part that is a scalar."""
    return [_rows_of(part) for part in tf.nest.flatten(data) if not is_missing(part)]


def _rows_of(part: Any) -> int | None:
    if _is_composite(part):
        return int(sample_count([part]))
    shape = np.shape(part) if not hasattr(part, "shape") else part.shape
    return int(shape[0]) if len(shape) else None


def in_words(numbers: Sequence[int | None]) -> str:
    """Return the different ones of these numbers, in order, joined for a sentence: "8 and 24"."""
    found = [str(number) for number in dict.fromkeys(numbers) if number is not None]
    return " and ".join(part for part in (", ".join(found[:-1]), *found[-1:]) if part)


def sample_count(leaves: list[Tensor]) -> Any:
    """Return the number of samples in a batch: a scalar int64 tensor."""
    first = leaves[0]
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int64)
    if isinstance(first, tf.SparseTensor):
        return first.dense_shape[0]
    return tf.shape(first, out_type=tf.int64)[0]


def cut(leaf: Tensor, start: Any, stop: Any) -> Any:
    """Return samples ``start`` to ``stop`` (int64 scalars) of one leaf; an aligned dense slice is no copy."""
    if isinstance(leaf, tf.SparseTensor):
        begin = tf.concat([[start], tf.zeros_like(leaf.dense_shape[1:])], axis=0)
        extent = tf.concat([[stop - start], leaf.dense_shape[1:]], axis=0)
        return tf.sparse.slice(leaf, begin, extent)
    return leaf[start:stop]


def repeat_to(leaf: Tensor, samples: int) -> Any:
    """Return the leaf with its samples repeated in order until there are ``samples`` of them."""
    if isinstance(leaf, tf.SparseTensor):
        times = -(-samples // max(int(leaf.dense_shape[0]), 1))
        return cut(tf.sparse.concat(0, [leaf] * times), tf.constant(0, tf.int64), tf.constant(samples, tf.int64))
    rows = leaf.nrows() if isinstance(leaf, tf.RaggedTensor) else tf.shape(leaf, out_type=tf.int64)[0]
    return tf.gather(leaf, tf.range(samples, dtype=tf.int64) % tf.cast(rows, tf.int64))


def row_sizes(leaf: Tensor) -> Any:
    """Return the bytes of each sample of a leaf as an array of integers; None if all samples have the same.

    A ragged sample counts its values, a sparse one its stored values, a sample of strings their characters.
    """
    if isinstance(leaf, tf.SparseTensor):
        return np.bincount(leaf.indices.numpy()[:, 0], minlength=int(leaf.dense_shape[0])) * leaf.dtype.size
    if isinstance(leaf, tf.RaggedTensor):
        ends = leaf.row_splits.numpy()
        values = leaf.values
        while isinstance(values, tf.RaggedTensor):
            ends = values.row_splits.numpy()[ends]
            values = values.values
        if values.dtype == tf.string:
            return np.diff(np.concatenate([[0], np.cumsum(_characters(values))])[ends])
        return np.diff(ends) * int(np.prod(values.shape[1:], initial=1)) * values.dtype.size
    return _characters(leaf) if leaf.dtype == tf.string else None


def _characters(strings: Any) -> Any:
    lengths = tf.strings.length(strings).numpy()
    return np.sum(lengths, axis=tuple(range(1, np.ndim(lengths))))
