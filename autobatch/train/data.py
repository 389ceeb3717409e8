"""Whatever ``Model.fit`` accepts, as effective batches on the host.

Keras's own data adapters read the data, so that what Keras accepts is accepted and means what it means there; their
``tf.data`` datasets are then cut anew into effective batches. Keras is handed the result through its own
``DataAdapter`` interface. The first effective batch can be looked at before training without losing it, and without
starting a shuffle once more: the first epoch goes on from the iterator that it came from.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from autobatch.errors import AutobatchWarning
from autobatch.train import keras_seams
from autobatch.train.structure import Structure

_KEEPS_ELEMENTS = ("_PrefetchDataset", "PrefetchDataset", "_OptionsDataset", "OptionsDataset", "CacheDataset")
"""tf.data's private names of the datasets that pass elements on one for one (TensorFlow 2.20, 2.21)."""


class EffectiveBatches(keras_seams.DataAdapter):  # type: ignore[misc]
    """An iterable of effective batches that Keras's ``fit`` accepts as its data.

    Args:
        x, y, sample_weight, shuffle, class_weight, steps_per_epoch: as for ``Model.fit``.
        target_batch: samples in an effective batch; the last of an epoch may have fewer.
        input_rank: rank of the model's first input, the batch dimension included, where it is known; tells a dataset
            of samples from one of batches.

    Raises:
        ValueError: the data are empty, or Keras refuses them.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        target_batch: int,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        steps_per_epoch: int | None = None,
        input_rank: int | None = None,
    ) -> None:
        if _is_unbatched(x, input_rank):
            x = x.batch(target_batch)
        arguments = {"x": x, "y": y, "sample_weight": sample_weight, "class_weight": class_weight}
        with warnings.catch_warnings():
            # fit's own default of shuffle=True is not the user's word; Keras warns that it is ignored.
            warnings.filterwarnings("ignore", message="`shuffle=True` was passed")
            self._inner = keras_seams.data_adapter_for(
                **arguments, batch_size=target_batch, steps_per_epoch=steps_per_epoch, shuffle=shuffle
            )
        self.target_batch = target_batch
        dataset = self._inner.get_tf_dataset()
        self.sample_limit: int | None = None
        if keras_seams.is_array_adapter(self._inner):
            self.sample_limit = int(self._inner._num_samples)
            self._batches: int | None = self._inner.num_batches
        else:
            samples = _sample_cardinality(dataset)
            self.sample_limit = samples
            self._batches = None if samples is None else -(-samples // target_batch)
            dataset = _cut_anew(dataset, target_batch)
        self._dataset = dataset
        self._pending: tuple[Any, Iterator[Any]] | None = None
        self.element_spec = dataset.element_spec
        self.structure = Structure(self.element_spec)

    def first(self) -> Any:
        """The first effective batch of the coming epoch, which will yield it again.

        Raises:
            ValueError: there is none.
        """
        if self._pending is None:
            iterator = iter(self._dataset)
            try:
                self._pending = (next(iterator), iterator)
            except StopIteration:
                raise ValueError(
                    "dataset is empty, so that there is nothing to train on. Give at least one sample. "
                    f"Received: {self._dataset}"
                ) from None
        return self._pending[0]

    def __iter__(self) -> Iterator[Any]:
        if self._pending is None:
            return iter(self._dataset)
        first, rest = self._pending
        self._pending = None
        return itertools.chain([first], rest)

    # What Keras asks of a data adapter.

    def get_tf_dataset(self) -> EffectiveBatches:
        return self

    @property
    def num_batches(self) -> int | None:
        return self._batches

    @property
    def batch_size(self) -> int | None:
        return self.target_batch

    @property
    def has_partial_batch(self) -> bool | None:
        return None

    @property
    def partial_batch_size(self) -> int | None:
        return None

    def on_epoch_begin(self) -> None:
        self._inner.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._inner.on_epoch_end()


def _is_unbatched(x: Any, input_rank: int | None) -> bool:
    """Whether ``x`` is a ``tf.data.Dataset`` of single samples.

    A scalar among its parts settles it; otherwise the rank of the model's first input does, where it is known.
    """
    if not isinstance(x, tf.data.Dataset):
        return False
    specs = [spec for spec in tf.nest.flatten(x.element_spec) if isinstance(spec, (tf.TensorSpec, tf.RaggedTensorSpec))]
    ranks = [spec.shape.rank for spec in specs]
    if any(rank == 0 for rank in ranks):
        return True
    return bool(ranks) and input_rank is not None and ranks[0] == input_rank - 1


def _sample_cardinality(dataset: Any) -> int | None:
    """How many samples a dataset of batches has, where tf.data tells without reading it."""
    dataset = _behind_wrappers(dataset)
    batches = int(dataset.cardinality())
    if batches < 0:
        return None
    first = next(
        (spec for spec in tf.nest.flatten(dataset.element_spec) if getattr(spec, "shape", None) is not None), None
    )
    if first is not None and first.shape.rank and first.shape[0] is not None:
        return batches * int(first.shape[0])
    if type(dataset).__name__.lstrip("_") in ("BatchDataset", "ParallelBatchDataset", "PaddedBatchDataset"):
        samples = int(dataset._input_dataset.cardinality())
        return samples if samples >= 0 else None
    return None


def _behind_wrappers(dataset: Any) -> Any:
    while type(dataset).__name__ in _KEEPS_ELEMENTS and hasattr(dataset, "_input_dataset"):
        dataset = dataset._input_dataset
    return dataset


def _cut_anew(dataset: Any, target_batch: int) -> Any:
    """The same samples in the same order, ``target_batch`` at a time."""
    plain = _behind_wrappers(dataset)
    if type(plain).__name__.lstrip("_") in ("BatchDataset", "ParallelBatchDataset"):
        try:
            if int(tf.get_static_value(plain._batch_size)) == target_batch:
                return dataset
        except (AttributeError, TypeError):
            pass  # a dataset without a static batch size is cut anew like any other
    specs = tf.nest.flatten(dataset.element_spec)
    dense = [spec for spec in specs if isinstance(spec, tf.TensorSpec)]
    infinite = int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY
    if any(None in spec.shape[1:] for spec in dense if spec.shape.rank is not None):
        warnings.warn(
            "The batches of this dataset are padded to varying lengths. Those that form one effective batch are padded "
            "with zeros to the longest of them: pad to one length yourself if zero is not your padding.",
            AutobatchWarning,
            stacklevel=2,
        )
        dataset = dataset.unbatch().padded_batch(target_batch)
    elif len(dense) == len(specs):
        dataset = dataset.rebatch(target_batch)
    else:
        dataset = dataset.unbatch().batch(target_batch)
    if infinite:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return dataset.prefetch(tf.data.AUTOTUNE)
