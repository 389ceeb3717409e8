"""A ``tf.data.Dataset`` of batches of any size, or of single samples, as one of effective batches.

Knows tf.data; knows nothing of Keras's data adapters, of models or of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from autobatch.train import data_seams
from autobatch.train.structure import NONE_SPEC

Shape = Sequence["int | None"]

_ONE_FOR_ONE = ("Prefetch", "Options", "Model", "Cache", "Shuffle", "AssertCardinality")
"""What passes elements on one for one, in whatever order."""

_BATCHES_OF_ONE_SIZE = ("Batch", "ParallelBatch", "PaddedBatch")
_BATCHES = (*_BATCHES_OF_ONE_SIZE, "Rebatch", "LegacyRebatch", "DenseToSparseBatch")

_MAPS = ("Map", "ParallelMap", "Take", "Skip", "Repeat", "Shard")
"""What may change elements, but makes neither batches of samples nor samples of batches."""


def is_of_samples(dataset: Any, input_shapes: Sequence[tuple[str, Shape]] = ()) -> bool:
    """Whether the dataset's elements are single samples rather than batches.

    The first of these that tells decides:

    1. A scalar among an element's parts: samples. (A batch has no scalar parts.)
    2. Parts whose first dimensions are known and differ: samples. (A batch has as many of each.)
    3. The model's inputs, where their shapes are known: with one dimension less, and sizes that agree, an element is a
       sample; with as many dimensions or more, a batch. Where an input has the shape ``(None, 1)``, a vector of
       unknown length may be either, and does not tell.
    4. The dataset itself: if what makes its elements is ``batch`` or one of its kind, batches.
    5. Otherwise batches, as Keras takes them.

    Args:
        dataset: a ``tf.data.Dataset``.
        input_shapes: name and shape of each of the model's inputs, the batch dimension included; empty if not known.
    """
    specs = [spec for spec in tf.nest.flatten(dataset.element_spec) if _shape(spec) is not None]
    shapes = [_shape(spec) for spec in specs]
    if any(len(shape) == 0 for shape in shapes):
        return True
    if len({shape[0] for shape in shapes if shape[0] is not None}) > 1:
        return True
    for element, wanted in _paired(dataset.element_spec, input_shapes):
        if len(element) >= len(wanted):
            return False
        if len(element) == len(wanted) - 1:
            if not _agree(element, wanted[1:]):
                return False
            if not (len(wanted) == 2 and wanted[1] == 1 and element[0] is None):
                return True
    while True:
        kind = data_seams.kind_of(dataset)
        inputs = data_seams.inputs_of(dataset)
        if kind in _BATCHES or kind not in (*_ONE_FOR_ONE, *_MAPS) or len(inputs) != 1:
            return False
        dataset = inputs[0]


def _shape(spec: Any) -> Any:
    shape = getattr(spec, "shape", None)
    return None if shape is None or shape.rank is None else shape.as_list()


def _agree(one: Shape, other: Shape) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def _paired(element_spec: Any, input_shapes: Sequence[tuple[str, Shape]]) -> list[tuple[Any, Shape]]:
    """The shapes of the inputs among an element's parts, each with that of the model's input that it goes to."""
    x = element_spec[0] if isinstance(element_spec, tuple) else element_spec
    if isinstance(x, dict) and all(name in x for name, _ in input_shapes):
        pairs = [(x[name], shape) for name, shape in input_shapes]
    else:
        flat = tf.nest.flatten(x)
        pairs = list(zip(flat, (shape for _, shape in input_shapes), strict=False)) if input_shapes else []
        if len(flat) != len(input_shapes):
            pairs = []
    return [(_shape(spec), shape) for spec, shape in pairs if _shape(spec) is not None]


# -- how many samples -------------------------------------------------------------------------------------------------


def sample_cardinality(dataset: Any, *, trust_maps: bool = False) -> int | None:
    """How many samples a dataset of batches has; None where tf.data does not tell without reading it, or it is endless.

    ``trust_maps`` supposes that a ``map`` over batches leaves the number of samples in each as it is, which nearly
    all do, but none has to.
    """
    batches = int(dataset.cardinality())
    if batches < 0:
        return None
    first = next((shape for spec in tf.nest.flatten(dataset.element_spec) if (shape := _shape(spec))), None)
    if first is not None and first[0] is not None:
        return batches * int(first[0])
    kind = data_seams.kind_of(dataset)
    inputs = data_seams.inputs_of(dataset)
    if kind == "Concatenate":
        counts = [sample_cardinality(source, trust_maps=trust_maps) for source in inputs]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None
    if len(inputs) != 1:
        return None
    if kind in _BATCHES_OF_ONE_SIZE:
        samples = int(inputs[0].cardinality())
        return samples if samples >= 0 else None
    if kind in _ONE_FOR_ONE or (trust_maps and kind in ("Map", "ParallelMap")):
        return sample_cardinality(inputs[0], trust_maps=trust_maps)
    if kind == "Repeat":
        samples_once = sample_cardinality(inputs[0], trust_maps=trust_maps)
        times = data_seams.constant_of(dataset, "_count")
        return None if samples_once is None or not isinstance(times, int) else samples_once * times
    return None


def is_endless(dataset: Any) -> bool:
    """Whether the dataset never ends, as far as tf.data can tell."""
    return bool(int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY)


# -- cutting anew -----------------------------------------------------------------------------------------------------


class Recut:
    """The samples of a dataset of batches, in their order, ``target_batch`` at a time.

    ``dataset`` yields ``(effective batch, whether batches of different lengths were padded for it)`` if
    :attr:`pads`, and effective batches otherwise. Batches that were padded to different lengths are padded to the
    longest of an effective batch with what ``padded_batch`` padded them with, as far as the dataset shows it.
    """

    def __init__(self, dataset: Any, target_batch: int) -> None:
        self.element_spec = dataset.element_spec
        self.pads = False
        self.dataset = _cut_before_padding(dataset, target_batch)
        if self.dataset is not None:
            self.element_spec = self.dataset.element_spec
        elif samples_in_batch(_behind(dataset, ("Prefetch", "Options", "Cache"))) == target_batch:
            self.dataset = dataset
            return  # as it is: it has its own prefetch if it wants one
        else:
            self.dataset = self._cut(_without_optionals(dataset), target_batch)
        if is_endless(dataset):
            self.dataset = self.dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        self.dataset = self.dataset.prefetch(tf.data.AUTOTUNE)

    def _cut(self, dataset: Any, target_batch: int) -> Any:
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

    def _pad_together(self, dataset: Any, target_batch: int, varying: list[int]) -> Any:
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


def _without_optionals(dataset: Any) -> Any:
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


def _behind(dataset: Any, kinds: Sequence[str]) -> Any:
    while data_seams.kind_of(dataset) in kinds and len(data_seams.inputs_of(dataset)) == 1:
        dataset = data_seams.inputs_of(dataset)[0]
    return dataset


def samples_in_batch(dataset: Any) -> int | None:
    """The size of the batches that a ``batch`` makes; None for every other dataset, and where it is not constant."""
    if data_seams.kind_of(dataset) not in _BATCHES_OF_ONE_SIZE:
        return None
    size = data_seams.constant_of(dataset, "_batch_size")
    return size if isinstance(size, int) else None


def samples_in_element(dataset: Any) -> int | None:
    """The size of the batches that are a dataset's elements, as the ``batch`` that made them says."""
    return samples_in_batch(_behind(dataset, (*_ONE_FOR_ONE, *_MAPS)))


def _cut_before_padding(dataset: Any, target_batch: int) -> Any:
    """Where ``padded_batch`` comes last, the same with the effective batch: what the user would have written for it."""
    plain = _behind(dataset, ("Prefetch", "Options"))
    padding = data_seams.padding_of(plain)
    if padding is None or data_seams.constant_of(plain, "_drop_remainder") is not False:
        return None
    shapes, values = padding
    source = data_seams.inputs_of(plain)[0]
    return source.padded_batch(target_batch, padded_shapes=shapes, padding_values=values).with_options(
        dataset.options()
    )


def _padding_values(dataset: Any) -> list[Any]:
    """What each leaf was padded with: as its ``padded_batch`` says, where one is found that made these leaves."""
    dtypes = [getattr(spec, "dtype", None) for spec in tf.nest.flatten(dataset.element_spec)]
    zeros = ["" if dtype == tf.string else 0 for dtype in dtypes]
    plain = _behind(dataset, (*_ONE_FOR_ONE, *_MAPS))
    padding = data_seams.padding_of(plain)
    if padding is None:
        return zeros
    made = [getattr(spec, "dtype", None) for spec in tf.nest.flatten(plain.element_spec)]
    values = [tf.get_static_value(value) for value in tf.nest.flatten(padding[1])]
    same = made == dtypes and len(values) == len(zeros)
    return [zero if value is None else value for value, zero in zip(values, zeros, strict=True)] if same else zeros


def updates(samples: int | None, target_batch: int) -> int | None:
    """How many effective batches there are of so many samples."""
    return None if samples is None else math.ceil(samples / target_batch)
