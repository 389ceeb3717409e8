"""A ``tf.data.Dataset`` of batches of any size, or of single samples, as one of effective batches.

Knows tf.data; knows nothing of Keras's data adapters, of models or of training.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from autobatch.data.cardinality import MAPS, ONE_FOR_ONE, behind, is_endless, samples_in_batch
from autobatch.seams import tf_data
from autobatch.tensors.batch_structure import NONE_SPEC
from autobatch.types import Dataset

# -- cutting anew -----------------------------------------------------------------------------------------------------


class Rebatched:
    """The samples of a dataset of batches, in their order, ``target_batch`` at a time.

    ``dataset`` yields ``(effective batch, whether batches of different lengths were padded for it)`` if
    :attr:`pads`, and effective batches otherwise. Batches that were padded to different lengths are padded to the
    longest of an effective batch with what ``padded_batch`` padded them with, as far as the dataset shows it.
    """

    def __init__(self, dataset: Dataset, target_batch: int) -> None:
        self.element_spec = dataset.element_spec
        self.pads = False
        self.dataset = _cut_before_padding(dataset, target_batch)
        if self.dataset is not None:
            self.element_spec = self.dataset.element_spec
        elif samples_in_batch(behind(dataset, ("Prefetch", "Options", "Cache"))) == target_batch:
            self.dataset = dataset
            return  # as it is: it has its own prefetch if it wants one
        else:
            self.dataset = self._cut(_without_optionals(dataset), target_batch)
        if is_endless(dataset):
            self.dataset = self.dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        self.dataset = self.dataset.prefetch(tf.data.AUTOTUNE)

    def _cut(self, dataset: Dataset, target_batch: int) -> Any:
        self.element_spec = dataset.element_spec
        specs = tf.nest.flatten(dataset.element_spec)
        varying = [_ragged_rank(spec) for spec in specs]
        if any(varying):
            self.pads = True
            return self._pad_together(dataset, target_batch, varying)
        dense = all(isinstance(spec, (tf.TensorSpec, NONE_SPEC)) for spec in specs)
        recut = dataset.rebatch(target_batch) if dense else dataset.unbatch().batch(target_batch)
        self.element_spec = recut.element_spec
        return recut

    def _pad_together(self, dataset: Dataset, target_batch: int, varying: list[int]) -> Any:
        """By way of ragged tensors, which can be batched whatever their lengths, next to leaves of every kind."""
        spec = dataset.element_spec
        leaf_specs = tf.nest.flatten(spec)
        padding = _padding_values(dataset)
        self.padding = sorted({str(padding[i]) for i, rank in enumerate(varying) if rank})

        def to_ragged(*element: Any) -> Any:
            leaves = tf.nest.flatten(_whole(spec, element))
            ragged = [
                tf.RaggedTensor.from_tensor(leaf, ragged_rank=rank) if rank else leaf
                for leaf, rank in zip(leaves, varying, strict=True)
            ]
            return tf.nest.pack_sequence_as(spec, ragged)

        def to_dense(*element: Any) -> Any:
            leaves = tf.nest.flatten(_whole(spec, element))
            differ = tf.constant(False)
            dense = []
            for leaf, leaf_spec, rank, value in zip(leaves, leaf_specs, varying, padding, strict=True):
                if not rank:
                    dense.append(leaf)
                    continue
                for lengths in leaf.nested_row_lengths():
                    differ = tf.logical_or(differ, tf.reduce_any(lengths != lengths[:1]))
                tensor = leaf.to_tensor(default_value=tf.cast(value, leaf.dtype) if leaf.dtype != tf.string else value)
                tensor.set_shape([None, *leaf_spec.shape[1:]])
                dense.append(tensor)
            return tf.nest.pack_sequence_as(spec, dense), differ

        batches = (
            dataset.map(to_ragged).unbatch().batch(target_batch).map(to_dense, num_parallel_calls=tf.data.AUTOTUNE)
        )
        self.element_spec = batches.element_spec[0]
        return batches


def _whole(spec: Any, element: tuple[Any, ...]) -> Any:
    return element if isinstance(spec, tuple) else element[0]


def _ragged_rank(spec: Any) -> int:
    """The last dimension after the first that is left open in a dense batch; 0 where none is, or nothing is known."""
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        return 0
    return max((axis for axis, size in enumerate(spec.shape) if axis and size is None), default=0)


def _without_optionals(dataset: Dataset) -> Any:
    """Keras's adapters put an empty Optional where a part is missing, which cannot be cut; None can."""
    spec = dataset.element_spec
    leaves = tf.nest.flatten(spec)
    if not any(isinstance(leaf, tf.OptionalSpec) for leaf in leaves):
        return dataset

    def drop(*element: Any) -> Any:
        kept = [
            None if isinstance(leaf_spec, tf.OptionalSpec) else leaf
            for leaf, leaf_spec in zip(tf.nest.flatten(_whole(spec, element)), leaves, strict=True)
        ]
        return tf.nest.pack_sequence_as(spec, kept)

    return dataset.map(drop)


def _cut_before_padding(dataset: Dataset, target_batch: int) -> Any:
    """Where ``padded_batch`` comes last, the same with the effective batch: what the user would have written for it."""
    plain = behind(dataset, ("Prefetch", "Options"))
    padding = tf_data.padding_of(plain)
    if padding is None or tf_data.constant_of(plain, "_drop_remainder") is not False:
        return None
    shapes, values = padding
    source = tf_data.inputs_of(plain)[0]
    return source.padded_batch(target_batch, padded_shapes=shapes, padding_values=values).with_options(
        dataset.options()
    )


def _padding_values(dataset: Dataset) -> list[Any]:
    """What each leaf was padded with: as its ``padded_batch`` says, where one is found that made these leaves."""
    dtypes = [getattr(spec, "dtype", None) for spec in tf.nest.flatten(dataset.element_spec)]
    zeros = ["" if dtype == tf.string else 0 for dtype in dtypes]
    plain = behind(dataset, (*ONE_FOR_ONE, *MAPS))
    padding = tf_data.padding_of(plain)
    if padding is None:
        return zeros
    made = [getattr(spec, "dtype", None) for spec in tf.nest.flatten(plain.element_spec)]
    values = [tf.get_static_value(value) for value in tf.nest.flatten(padding[1])]
    same = made == dtypes and len(values) == len(zeros)
    return [zero if value is None else value for value, zero in zip(values, zeros, strict=True)] if same else zeros
