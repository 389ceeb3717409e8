"""Effective batches cut from a ``tf.data.Dataset`` of batches of any size.

This module uses tf.data, but none of Keras's data adapters, models or training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from autobatch.data import economy
from autobatch.data.cardinality import MAPS, ONE_FOR_ONE, behind, is_endless, samples_in_batch
from autobatch.errors import warn
from autobatch.seams import tf_data
from autobatch.tensors.batch_structure import NONE_SPEC
from autobatch.types import Dataset

# -- cutting again ----------------------------------------------------------------------------------------------------


class Rebatched:
    """Samples of a dataset of batches, in their order, ``target_batch`` at a time.

    Batches that were padded to different lengths are padded again to the longest of their effective batch. The padding
    values are those of ``padded_batch`` if the dataset shows them, else zeros or empty strings. With ``as_they_come``
    the batches stay as they are. There are ``ahead`` effective batches made ahead.

    Attributes:
        pads: True if batches may need that padding.
        dataset: yields effective batches; if :attr:`pads`, pairs of an effective batch and a boolean that is True if
            batches of different lengths were padded for it.
    """

    def __init__(self, dataset: Dataset, target_batch: int, *, as_they_come: bool = False, ahead: int) -> None:
        dataset = economy.without_prefetch(dataset)
        if as_they_come:
            dataset = _without_optionals(dataset)
        self.element_spec = dataset.element_spec
        self.pads = False
        self.padding: list[str] = []
        self.dataset = dataset if as_they_come else _cut_before_padding(dataset, target_batch)
        if self.dataset is not None:
            self.element_spec = self.dataset.element_spec
        elif samples_in_batch(behind(dataset, ("Prefetch", "Options", "Cache"))) == target_batch:
            self.dataset = dataset
            return  # as it is: it has its own prefetch if it wants one
        else:
            self.dataset = self._cut(_without_optionals(dataset), target_batch)
        if is_endless(dataset):
            self.dataset = self.dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        self.dataset = economy.prefetched(self.dataset, ahead)

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
        """Cut the dataset by way of ragged tensors, which can be batched with any lengths, next to other leaves."""
        spec = dataset.element_spec
        leaf_specs = tf.nest.flatten(spec)
        padding = padding_values(dataset)
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

        batches = dataset.map(to_ragged).unbatch().batch(target_batch).map(to_dense, economy.maps_at_once())
        self.element_spec = batches.element_spec[0]
        return batches


class PaddingNote:
    """Warning, given once, that batches of different lengths were padded together; ``padding`` are the values."""

    def __init__(self, padding: Sequence[str]) -> None:
        self._padding = padding
        self._said = False

    def batches(self, pairs: Iterator[tuple[Any, Any]]) -> Iterator[Any]:
        """Yield the first of each pair; the second is True if batches of different lengths were padded for it."""
        for batch, differed in pairs:
            if not self._said and bool(differed):
                self._said = True
                warn(
                    "Batches of this dataset that are padded to different lengths come together in one effective "
                    f"batch. They are padded with {' and '.join(self._padding)} to the longest of them. If that is not "
                    "your padding, pad to one length yourself, or let padded_batch be the dataset's last step: then "
                    "what it pads with is known.",
                )
            yield batch
            del batch


def explained(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches; where tf.data cannot make one of its elements, say what is wrong with these.

    Raises:
        ValueError: the samples that were to be batched differ in size, or the parts of an element in their rows.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except tf.errors.InvalidArgumentError as error:
            found = next((remedy for words, remedy in _REMEDIES.items() if words in error.message), None)
            if found is None:
                raise
            raise ValueError(f"{found} Received: {error.message}") from error
        yield batch
        del batch  # nothing holds it while the next one is made


_REMEDIES = {
    "Cannot batch tensors with different shapes": (
        "The samples of this dataset differ in size, so that they cannot be batched. Batch them yourself, by "
        "padded_batch or ragged_batch. If each element is one batch for your train_step, as a graph is, give all of "
        "its parts a first dimension: label[None] for a single label."
    ),
    "must have the same batch size in each component": (
        "The first elements of this dataset had the same number of rows in all parts, and this one has not, so that it "
        "cannot be cut with the others. Give all parts of each element the same number of rows."
    ),
}
"""Words of tf.data's errors, each with what the user can do."""


def _whole(spec: Any, element: tuple[Any, ...]) -> Any:
    return element if isinstance(spec, tuple) else element[0]


def _ragged_rank(spec: Any) -> int:
    """Return the last axis after the first whose size is open in a dense batch; 0 if there is none or it is unknown."""
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        return 0
    return max((axis for axis, size in enumerate(spec.shape) if axis and size is None), default=0)


def _without_optionals(dataset: Dataset) -> Any:
    """Replace the empty Optionals that Keras's adapters put for missing parts by None: Optionals cannot be cut."""
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
    """Return the dataset with its last step, a ``padded_batch``, made of ``target_batch`` samples.

    It is None if the last step is another one, or drops a remainder.
    """
    plain = behind(dataset, ("Prefetch", "Options"))
    padding = tf_data.padding_of(plain)
    if padding is None or tf_data.constant_of(plain, "_drop_remainder") is not False:
        return None
    shapes, values = padding
    source = tf_data.inputs_of(plain)[0]
    return source.padded_batch(target_batch, padded_shapes=shapes, padding_values=values).with_options(
        dataset.options()
    )


def padding_values(dataset: Dataset) -> list[Any]:
    """Return the value that each leaf was padded with; zero or "" if no ``padded_batch`` is found that made them."""
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
