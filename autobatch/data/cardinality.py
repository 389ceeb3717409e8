"""Numbers of a data set's samples and batches, as far as tf.data shows them without reading it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from autobatch.seams import data_adapters, tf_data
from autobatch.tensors.batch_structure import is_missing
from autobatch.types import Dataset, ElementSpec

Shape = Sequence["int | None"]

ONE_FOR_ONE = ("Prefetch", "Options", "Model", "Cache", "Shuffle", "AssertCardinality")
"""Kinds of datasets that pass elements on one for one, in any order."""

_BATCHES_OF_ONE_SIZE = ("Batch", "ParallelBatch", "PaddedBatch")
BATCHES = (*_BATCHES_OF_ONE_SIZE, "Rebatch", "LegacyRebatch", "DenseToSparseBatch")
"""Kinds of datasets that make batches of samples, all parts alike."""

SOME_OF = ("Take", "Skip", "Repeat", "Shard")
"""Kinds of datasets that pass on some of the elements, or all of them several times."""

MAPS = ("Map", "ParallelMap", *SOME_OF)
"""Kinds of datasets that may change elements, but make neither batches of samples nor samples of batches."""


def is_of_samples(dataset: Dataset, input_shapes: Sequence[tuple[str, Shape]] = ()) -> bool:
    """Return True if the dataset's elements are single samples rather than batches.

    The first rule that applies decides:

    1. A scalar among an element's parts, unless batches were zipped with it: samples. (A batch has no scalar parts.)
       But two other parts of unknown length make it a graph with one number, say, which is taken as it is.
    2. The model's inputs, if their shapes are known. An element with one dimension less, and sizes that agree, is a
       sample. One with as many dimensions or more is a batch, and so is one whose sizes disagree. For an input of the
       shape ``(None, 1)`` a vector of unknown length may be either, so that input does not decide.
    3. Batches of several datasets that were zipped: batches, whatever their sizes.
    4. Parts whose first dimensions are known and differ: samples. (A batch has the same number of each.)
    5. The dataset itself: if its elements are made by ``batch`` or a similar method, batches.
    6. Otherwise batches, as Keras takes them.

    Args:
        dataset: a ``tf.data.Dataset``.
        input_shapes: name and shape of each of the model's inputs, the batch dimension included; empty if not known.
    """
    by_shape, known = _by_shape(dataset, input_shapes)
    return by_shape if known else _differ(_shapes(dataset))


def is_of_samples_by_guess(dataset: Dataset, input_shapes: Sequence[tuple[str, Shape]] = ()) -> bool:
    """Return True if elements count as single samples for no other reason than that their first dimensions differ.

    They may be batches of several streams as well, unless ``unbatch`` has made them.
    """
    _, known = _by_shape(dataset, input_shapes)
    made = behind(dataset, (*ONE_FOR_ONE, *MAPS))
    return not known and _differ(_shapes(dataset)) and tf_data.kind_of(made) != "Unbatch"


def _by_shape(dataset: Dataset, input_shapes: Sequence[tuple[str, Shape]]) -> tuple[bool, bool]:
    """Return whether elements are samples by the rules that are sure, and whether one of them applies."""
    shapes = _shapes(dataset)
    zipped = made_of_batches(dataset, zipped=True)
    if any(len(shape) == 0 for shape in shapes) and not zipped:
        open_ones = sum(bool(shape) and shape[0] is None for shape in shapes)
        return open_ones < 2, True
    for element, wanted in _paired(dataset.element_spec, input_shapes):
        if len(element) >= len(wanted):
            return False, True
        if len(element) == len(wanted) - 1:
            if not _agree(element, wanted[1:]):
                return False, True
            if not (len(wanted) == 2 and wanted[1] == 1 and element[0] is None):
                return True, True
    return False, zipped


def _shapes(dataset: Dataset) -> list[Any]:
    return [shape for spec in tf.nest.flatten(dataset.element_spec) if (shape := _shape(spec)) is not None]


def _differ(shapes: Sequence[Shape]) -> bool:
    return len({shape[0] for shape in shapes if shape[0] is not None}) > 1


def made_of_batches(dataset: Dataset, *, zipped: bool = False) -> bool:
    """Return True if ``batch`` or a similar method has made elements, or the parts of elements that were zipped.

    ``zipped`` asks for the latter alone.
    """
    made = behind(dataset, (*ONE_FOR_ONE, *MAPS))
    if tf_data.kind_of(made) == "Zip":
        return any(made_of_batches(source) for source in tf_data.inputs_of(made))
    return not zipped and tf_data.kind_of(made) in BATCHES


def _shape(spec: Any) -> Any:
    shape = getattr(spec, "shape", None)
    return None if shape is None or shape.rank is None else shape.as_list()


def _agree(one: Shape, other: Shape) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def _paired(element_spec: ElementSpec, input_shapes: Sequence[tuple[str, Shape]]) -> list[tuple[Any, Shape]]:
    """Return pairs of shapes: of each input part of an element, and of the model's input that it goes to."""
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
    """Return the number of samples in a dataset of batches; None if it is endless or must be read to know.

    ``trust_maps`` assumes that a ``map`` over batches leaves the number of samples in each as it is. Nearly all do, but
    none has to.
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
    """Return True if tf.data knows that the dataset never ends."""
    return bool(int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY)


def behind(dataset: Dataset, kinds: Sequence[str]) -> Any:
    while tf_data.kind_of(dataset) in kinds and len(tf_data.inputs_of(dataset)) == 1:
        dataset = tf_data.inputs_of(dataset)[0]
    return dataset


def samples_in_batch(dataset: Dataset) -> int | None:
    """Return the batch size of a dataset made by ``batch`` or ``padded_batch``; None if not constant, or for others."""
    if tf_data.kind_of(dataset) not in _BATCHES_OF_ONE_SIZE:
        return None
    size = tf_data.constant_of(dataset, "_batch_size")
    return size if isinstance(size, int) else None


def samples_in_element(dataset: Dataset) -> int | None:
    """Return the size of the batches that are a dataset's elements, from the ``batch`` that made them, or None."""
    return samples_in_batch(behind(dataset, (*ONE_FOR_ONE, *MAPS)))


def updates(samples: int | None, target_batch: int) -> int | None:
    """Return the number of effective batches that ``samples`` samples make; None if ``samples`` is None."""
    return None if samples is None else math.ceil(samples / target_batch)


def samples_in_each(dataset: Dataset, element_spec: ElementSpec, samples: int | None, target_batch: int) -> int | None:
    """Return the number of samples in every effective batch, if Keras would know it beforehand; None otherwise.

    Keras knows it of arrays without a remainder, and of batches that drop theirs. ``element_spec`` is that of the
    effective batches that are made of ``dataset``, and ``samples`` their number in all.
    """
    if _fixed_samples(element_spec) is not None:
        return _fixed_samples(element_spec)
    if _fixed_samples(dataset.element_spec) is None:
        return None
    divides = is_endless(dataset) if samples is None else samples % target_batch == 0
    return target_batch if divides else None


def _fixed_samples(element_spec: ElementSpec) -> int | None:
    """Return the number of samples in each batch if the type specs of all its parts have it; None otherwise."""
    sizes = {spec.shape[0] if spec.shape.rank else None for spec in _dense_parts(element_spec)}
    return sizes.pop() if len(sizes) == 1 else None


def _dense_parts(element_spec: ElementSpec) -> list[Any]:
    parts = [part for part in tf.nest.flatten(element_spec) if not is_missing(part)]
    return [part for part in parts if isinstance(part, tf.TensorSpec)]


def never_ends(adapter: Any, dataset: Dataset) -> bool:
    """Return True if the data of Keras's ``adapter``, which has made the ``dataset``, are known to be endless."""
    py_dataset = data_adapters.py_dataset_of(adapter)
    if py_dataset is not None:
        return py_dataset.num_batches is None
    return not data_adapters.is_array_adapter(getattr(adapter, "inner", adapter)) and is_endless(dataset)
