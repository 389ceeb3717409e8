"""Effective batches as lists of leaves: their number of samples, and cuts of some of the samples.

A leaf is a dense, ragged or sparse tensor whose first dimension counts samples. Missing parts (no targets, no sample
weight) are None in the structure, or an empty ``tf.experimental.Optional`` where Keras's data adapters put one.
"""

from __future__ import annotations

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
    """Return a type spec with its first dimension left open, so that one trace serves all sizes."""
    shape = tf.TensorShape(None) if spec.shape.rank is None else tf.TensorShape([None, *spec.shape[1:]])
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec(shape, spec.dtype)
    return tf.TensorSpec(shape, spec.dtype)


class Structure:
    """Nesting of one data set's elements.

    ``element_spec`` describes a batch: a nest of type specs, with None in place of a missing part.
    """

    def __init__(self, element_spec: ElementSpec) -> None:
        self.element_spec = element_spec
        self.specs: list[Any] = [
            open_batch_dimension(part) for part in tf.nest.flatten(element_spec) if not is_missing(part)
        ]

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
        """Return the tensors of one batch, in order; missing parts are left out."""
        parts = [part for part in tf.nest.flatten(data) if not is_missing(part)]
        if all(tf.is_tensor(part) for part in parts):
            return parts
        with tf.device("CPU:0"):  # arrays are not to land on the device whole
            return [
                part if isinstance(part, (tf.RaggedTensor, tf.SparseTensor)) else tf.convert_to_tensor(part)
                for part in parts
            ]

    def pack(self, leaves: list[Tensor]) -> Any:
        """Return the leaves in the structure that ``train_step`` takes."""
        remaining = iter(leaves)
        flat = [None if is_missing(part) else next(remaining) for part in tf.nest.flatten(self.element_spec)]
        return tf.nest.pack_sequence_as(self.element_spec, flat)


def sample_count(leaves: list[Tensor]) -> Any:
    """Return the number of samples in a batch: a scalar int64 tensor."""
    first = leaves[0]
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int64)
    if isinstance(first, tf.SparseTensor):
        return first.dense_shape[0]
    return tf.shape(first, out_type=tf.int64)[0]


def count_samples(data: Batch) -> int:
    """Return the number of samples in a batch outside of any graph; a dense batch needs no operation for it."""
    first = next(part for part in tf.nest.flatten(data) if not is_missing(part))
    if isinstance(first, (tf.RaggedTensor, tf.SparseTensor)):
        return int(sample_count([first]))
    return int(first.shape[0])


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
