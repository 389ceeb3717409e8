"""The first elements of a dataset, read before training without losing one and without changing the order of an epoch.

A ``tf.data.Dataset`` is read from an independent copy, a PyDataset by index, a torch loader with the random states put
back. Data without a copy are read themselves: the first epoch goes on with what was read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.data import random_states
from autobatch.data.layouts import LOOK
from autobatch.data.portion_cutter import PortionCutter
from autobatch.seams import data_adapters, tf_data
from autobatch.tensors.batch_structure import Structure, is_missing, rows_of
from autobatch.types import Dataset, Tensor


@dataclass(slots=True)
class Seen:
    """The first elements, and an iterator over those that follow. They are a copy's, or the data's own."""

    elements: list[Any]
    rest: Iterator[Any]
    of_copy: bool

    def effective_batch(self, cutter: PortionCutter, structure: Structure, target: int) -> Any:
        """Return the first effective batch, or the largest element if they are taken whole; read on as needed."""
        if structure.takes_elements_whole:
            return max(self.elements, key=lambda element: _bytes_of(structure.leaves(element)))
        portions = 0
        for place in itertools.count():
            if place == len(self.elements):
                self.elements += itertools.islice(self.rest, 1)
            if place == len(self.elements) or portions >= target:
                break
            portions += structure.portions_in(self.elements[place]) or target
        return next(cutter.batches(self.elements))[0]


class FirstLook:
    """Reader of the first elements.

    Args:
        adapter: Keras's adapter of the data.
        source: the dataset that the adapter has made.
        only_look: True if a copy may call Python's functions within the dataset.
        reads_again: True if another pass over ``source`` is a copy.
    """

    def __init__(self, adapter: Any, source: Dataset, *, only_look: bool, reads_again: bool = False) -> None:
        self._adapter = adapter
        self._source = source
        self._only_look = only_look
        self._reads_again = reads_again
        self.rows_in_first: int | None = None
        """Rows of the first batch of a PyDataset or a torch loader; None before it was read, and for other data."""

    @property
    def loader(self) -> Any:
        """The user's PyDataset or torch loader; None for other data."""
        dataset = data_adapters.py_dataset_of(self._adapter)
        return data_adapters.torch_loader_of(self._adapter) if dataset is None else dataset

    def elements(self, target_batch: int, begin: Callable[[], Iterator[Any]]) -> Seen:
        """Return the first elements; ``begin`` starts reading the data themselves where they have no copy."""
        copy: Any = self._loaded(target_batch) if self._loads() else self.copy(target_batch)
        rest = begin() if copy is None else iter(copy)
        return Seen(list(itertools.islice(rest, LOOK)), rest, of_copy=copy is not None)

    def copy(self, target_batch: int) -> Any:
        """Return a dataset of at least ``target_batch`` of the same samples; None if only the data can be read."""
        if data_adapters.is_dataset_adapter(self._adapter):
            specs = [spec for spec in tf.nest.flatten(self._source.element_spec) if not is_missing(spec)]
            varies = any(spec.dtype == tf.string or _is_open(spec.shape) for spec in specs)
            return tf_data.independent_copy(self._source, keep_order=varies, may_call_python=self._only_look)
        if self._loads():
            batches = self._first_batches(target_batch)
            signature = data_adapters.signature_of(self._adapter)
            return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
        return self._source if self._reads_again else None

    def _loads(self) -> bool:
        """Return True if the data are a PyDataset or a torch loader."""
        if data_adapters.is_dataset_adapter(self._adapter):
            return False
        return data_adapters.signature_of(self._adapter) is not None and self.loader is not None

    def _loaded(self, target_batch: int) -> Any:
        """Return the first batches as tensors; making a dataset of them, as Keras does, would take far longer."""
        signature = data_adapters.signature_of(self._adapter)
        if not all(isinstance(spec, tf.TensorSpec) and spec.dtype.is_numeric for spec in tf.nest.flatten(signature)):
            return self.copy(target_batch)

        def tensor(spec: tf.TensorSpec, leaf: Any) -> Tensor:
            return tf.convert_to_tensor(np.asarray(leaf, spec.dtype.as_numpy_dtype))

        with tf.device("CPU:0"):
            return [
                keras.tree.map_structure_up_to(signature, tensor, signature, batch)
                for batch in self._first_batches(target_batch)
            ]

    def _first_batches(self, target_batch: int) -> list[Any]:
        """Read the first batches, and enough for ``target_batch`` samples; put the random states back."""
        batches: list[Any] = []
        samples = 0
        with random_states.random_states_kept(self.loader):
            for batch in data_adapters.batches_without_iterating(self._adapter):
                batches.append(batch)
                rows = rows_of(batch)[0] or 1
                self.rows_in_first = self.rows_in_first or rows
                samples += rows
                if samples >= target_batch and len(batches) >= LOOK:
                    break
        return batches


def _is_open(shape: Any) -> bool:
    return shape.rank is None or None in shape[1:]


def _bytes_of(leaves: list[Any]) -> int:
    """Return the bytes of an element's tensors; strings count as one each."""
    total = 0
    for leaf in leaves:
        values = leaf.flat_values if isinstance(leaf, tf.RaggedTensor) else getattr(leaf, "values", leaf)
        total += int(tf.size(values)) * int(values.dtype.size or 1)
    return total
