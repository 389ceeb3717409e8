"""Private parts of Keras's data adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras.src.trainers import data_adapters as _data_adapters
from keras.src.trainers.data_adapters import array_data_adapter as _array_data_adapter
from keras.src.trainers.data_adapters import array_slicing as _array_slicing
from keras.src.trainers.data_adapters.data_adapter import DataAdapter as DataAdapter


def are_arrays(*parts: Any) -> bool:
    """Return True if Keras would slice these parts of the data itself. A part that is None counts as an array."""
    return bool(_array_data_adapter.can_convert_arrays(parts))


def packed_arrays(adapter: Any) -> Any:
    """Return the arrays that an array adapter slices, in the structure of its batches."""
    return adapter._inputs


def array_samples(adapter: Any) -> int:
    """Return the number of samples of an array adapter."""
    return int(adapter._num_samples)


def py_dataset_of(adapter: Any) -> Any:
    """Return the ``keras.utils.PyDataset`` behind an adapter; None for every other kind of data."""
    return getattr(adapter, "py_dataset", None)


def has_epoch_hooks(dataset: Any) -> bool:
    """Return True if a ``keras.utils.PyDataset`` does something at the beginning or the end of an epoch."""
    names = ("on_epoch_begin", "on_epoch_end")
    return any(getattr(type(dataset), name) is not getattr(keras.utils.PyDataset, name) for name in names)


def reads_by_index(adapter: Any) -> bool:
    """Return True if an adapter asks a PyDataset for its batches in turn, on no workers of its own."""
    return py_dataset_of(adapter) is not None and getattr(adapter, "enqueuer", None) is None


def generate_by(adapter: Any, make: Callable[[Callable[[], Iterator[Any]]], Iterator[Any]]) -> None:
    """Let a PyDataset's adapter give the batches of ``make(original)`` in each pass, where it gave ``original()``."""
    original = adapter._get_iterator
    adapter._get_iterator = lambda: make(original)


@contextlib.contextmanager
def batches_unread(adapter: Any, batches: int) -> Iterator[None]:
    """Let an adapter ask for no batch of its PyDataset, while the context is open: it gets empty ones."""
    dataset = adapter.py_dataset
    adapter.py_dataset = _Unread(dataset) if batches else dataset
    try:
        yield
    finally:
        adapter.py_dataset = dataset


class _Unread:
    """A PyDataset whose batches are not made."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __getitem__(self, index: int) -> Any:
        return np.zeros([0])


def torch_loader_of(adapter: Any) -> Any:
    """Return the ``torch.utils.data.DataLoader`` behind an adapter; None for every other kind of data."""
    return getattr(adapter, "_dataloader", None)


def is_grain_adapter(adapter: Any) -> bool:
    """Return True if the adapter passes on batches of Grain's, which not every Keras takes."""
    kind = getattr(_data_adapters, "GrainDatasetAdapter", None)
    return kind is not None and isinstance(adapter, kind)


def is_dataset_adapter(adapter: Any) -> bool:
    """Return True if the adapter passes on a ``tf.data.Dataset``."""
    return isinstance(adapter, _data_adapters.TFDatasetAdapter)


def batches_without_iterating(adapter: Any) -> Iterator[Any]:
    """Yield a PyDataset's batches by index, or a torch loader's from a new iterator, as the adapter gives them."""
    dataset = py_dataset_of(adapter)
    if dataset is None:
        yield from adapter.get_numpy_iterator()
        return
    index = 0
    while dataset.num_batches is None or index < dataset.num_batches:
        yield adapter._standardize_batch(dataset[index])
        index += 1


def samples_of_loader(adapter: Any, first_batch_samples: int | None) -> tuple[int | None, int | None]:
    """Return the least and the greatest number of samples in an epoch of a PyDataset or a torch loader.

    ``first_batch_samples`` is the size of its first batch, None if nobody has looked at it. The last batch may have
    fewer. Both numbers are None where they cannot be known.
    """
    loader = torch_loader_of(adapter)
    if (
        loader is not None
        and adapter.num_batches is not None
        and loader.batch_size is not None
        and not loader.drop_last
    ):
        return len(loader.sampler), len(loader.sampler)
    is_loader = loader is not None or py_dataset_of(adapter) is not None
    if not is_loader or not first_batch_samples or not adapter.num_batches:
        return None, None
    batches = int(adapter.num_batches)
    return (batches - 1) * first_batch_samples + 1, batches * first_batch_samples


def signature_of(adapter: Any) -> Any:
    """Return the element spec of a PyDataset's or a torch loader's batches. The adapter must have made its dataset."""
    return adapter._output_signature


def data_adapter_for(**arguments: Any) -> Any:
    """Return Keras's own adapter for the data that ``Model.fit`` accepts. The arguments are those of ``Model.fit``."""
    return _data_adapters.get_data_adapter(**arguments)


def is_array_adapter(adapter: Any) -> bool:
    """Return True if the adapter slices arrays, so that it makes batches of any size itself."""
    return isinstance(adapter, _data_adapters.ArrayDataAdapter)


def split_validation(x: Any, y: Any, sample_weight: Any, validation_split: float) -> tuple[Any, Any]:
    """Split arrays as ``Model.fit(validation_split=...)`` does: ``((x, y, sample_weight), validation_data)``."""
    train, validation = _array_slicing.train_validation_split((x, y, sample_weight), validation_split=validation_split)
    return train, validation
