"""Count a data set's samples and batches, without reading it where it can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from autobatch.seams import tf_data
from autobatch.types import Dataset, ElementSpec

Shape = Sequence["int | None"]

ONE_FOR_ONE = ("Prefetch", "Options", "Model", "Cache", "Shuffle", "AssertCardinality")
"""What passes elements on one for one, in whatever order."""

_BATCHES_OF_ONE_SIZE = ("Batch", "ParallelBatch", "PaddedBatch")
_BATCHES = (*_BATCHES_OF_ONE_SIZE, "Rebatch", "LegacyRebatch", "DenseToSparseBatch")

MAPS = ("Map", "ParallelMap", "Take", "Skip", "Repeat", "Shard")
"""What may change elements, but makes neither batches of samples nor samples of batches."""


def is_of_samples(dataset: Dataset, input_shapes: Sequence[tuple[str, Shape]] = ()) -> bool:
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
        kind = tf_data.kind_of(dataset)
        inputs = tf_data.inputs_of(dataset)
        if kind in _BATCHES or kind not in (*ONE_FOR_ONE, *MAPS) or len(inputs) != 1:
            return False
        dataset = inputs[0]


def _shape(spec: Any) -> Any:
    shape = getattr(spec, "shape", None)
    return None if shape is None or shape.rank is None else shape.as_list()


def _agree(one: Shape, other: Shape) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def _paired(element_spec: ElementSpec, input_shapes: Sequence[tuple[str, Shape]]) -> list[tuple[Any, Shape]]:
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


def sample_cardinality(dataset: Dataset, *, trust_maps: bool = False) -> int | None:
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
    kind = tf_data.kind_of(dataset)
    inputs = tf_data.inputs_of(dataset)
    if kind == "Concatenate":
        counts = [sample_cardinality(source, trust_maps=trust_maps) for source in inputs]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None
    if len(inputs) != 1:
        return None
    if kind in _BATCHES_OF_ONE_SIZE:
        samples = int(inputs[0].cardinality())
        return samples if samples >= 0 else None
    if kind in ONE_FOR_ONE or (trust_maps and kind in ("Map", "ParallelMap")):
        return sample_cardinality(inputs[0], trust_maps=trust_maps)
    if kind == "Repeat":
        samples_once = sample_cardinality(inputs[0], trust_maps=trust_maps)
        times = tf_data.constant_of(dataset, "_count")
        return None if samples_once is None or not isinstance(times, int) else samples_once * times
    return None


def is_endless(dataset: Dataset) -> bool:
    """Whether the dataset never ends, as far as tf.data can tell."""
    return bool(int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY)


def behind(dataset: Dataset, kinds: Sequence[str]) -> Any:
    while tf_data.kind_of(dataset) in kinds and len(tf_data.inputs_of(dataset)) == 1:
        dataset = tf_data.inputs_of(dataset)[0]
    return dataset


def samples_in_batch(dataset: Dataset) -> int | None:
    """The size of the batches that a ``batch`` makes; None for every other dataset, and where it is not constant."""
    if tf_data.kind_of(dataset) not in _BATCHES_OF_ONE_SIZE:
        return None
    size = tf_data.constant_of(dataset, "_batch_size")
    return size if isinstance(size, int) else None


def samples_in_element(dataset: Dataset) -> int | None:
    """The size of the batches that are a dataset's elements, as the ``batch`` that made them says."""
    return samples_in_batch(behind(dataset, (*ONE_FOR_ONE, *MAPS)))


def updates(samples: int | None, target_batch: int) -> int | None:
    """How many effective batches there are of so many samples."""
    return None if samples is None else math.ceil(samples / target_batch)
