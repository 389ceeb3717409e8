"""Arrays: checks of their lengths, rows of them, and mapped files that are read a batch at a time.

Keras copies arrays into a tensor before it slices them. For an ``np.memmap`` that would read the whole file into
memory. Here Keras gets the numbers of the rows instead, and shuffles and batches those in its own way. The rows
themselves are read when their batch is due.
"""

from __future__ import annotations

import mmap
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.data import economy
from autobatch.seams import data_adapters
from autobatch.seams.data_adapters import DataAdapter
from autobatch.seams.versions import leaves_with_paths
from autobatch.tensors.batch_structure import row_sizes
from autobatch.types import Tensor

_PART_NAMES = ("x", "y", "sample_weight")


def require_usable(x: Any, y: Any, sample_weight: Any) -> None:
    """Refuse arrays without samples or with different numbers of samples, before anything is done with them.

    Raises:
        ValueError: the arrays are empty or differ in length; it names them and their lengths.
    """
    if not data_adapters.are_arrays(x, y, sample_weight):
        return
    shapes = [
        (name + "".join(f"[{key!r}]" for key in path), tuple(leaf.shape))
        for name, part in zip(_PART_NAMES, (x, y, sample_weight), strict=True)
        for path, leaf in leaves_with_paths(part)
        if leaf is not None and len(getattr(leaf, "shape", ()))
    ]
    received = ", ".join(f"{name} of shape {_written(shape)}" for name, shape in shapes)
    lengths = [(name, _length(shape)) for name, shape in shapes]
    if len({length for _, length in lengths}) > 1:
        counted = [f"{name} has {length} samples" for name, length in lengths]
        sentence = f"{', '.join(counted[:-1])} and {counted[-1]}"
        raise ValueError(f"All arrays must have the same number of samples, but {sentence}. Received: {received}")
    if any(length == 0 for _, length in lengths):
        raise ValueError(
            f"dataset is empty, so that there is nothing to train on. Give at least one sample. Received: {received}"
        )


def _length(shape: Any) -> int:
    return int(shape[0])


def _written(shape: Any) -> str:
    return str(tuple(None if size is None else int(size) for size in shape))


# -- files mapped into memory -----------------------------------------------------------------------------------------


def is_mapped(array: Any) -> bool:
    """Return True for an ``np.memmap`` and for a view of one, whose rows are read from a file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def is_read_by_rows(array: Any) -> bool:
    """Return True for an array whose rows are read as they are needed: from a file, or to spare a copy in memory."""
    return is_mapped(array) or economy.spares_copy_of(array)


def any_read_by_rows(*parts: Any) -> bool:
    """Return True if the rows of any array in these parts are read as they are needed."""
    return any(is_read_by_rows(leaf) for leaf in keras.tree.flatten(parts))


class MappedArrays(DataAdapter):  # type: ignore[misc]
    """Keras's array adapter for data with arrays mapped from files, or not to be copied: rows are read with each batch.

    ``options`` are those of ``Model.fit`` that its adapter takes. The order of the samples, shuffled or not, is the
    order that arrays in memory have.
    """

    def __init__(self, x: Any, y: Any, sample_weight: Any, **options: Any) -> None:
        self._arrays: dict[int, Any] = {}
        self._numbers: list[Any] = []  # kept alive, so that no other object gets their ids
        x = keras.tree.map_structure(self._number_rows, x)
        if options.get("class_weight") is None:  # with class weights Keras looks at all targets beforehand
            y = keras.tree.map_structure(self._number_rows, y)
        self.inner = data_adapters.data_adapter_for(x=x, y=y, sample_weight=sample_weight, **options)

    def _number_rows(self, array: Any) -> Any:
        if not is_read_by_rows(array):
            return array
        numbers = np.arange(len(array), dtype=np.int64)
        self._numbers.append(numbers)
        self._arrays[id(numbers)] = array
        return numbers

    def get_tf_dataset(self, behind: int = 0) -> Any:
        """Return the batches, from behind so many of them on, which are not read."""
        mapped = [self._arrays.get(id(leaf)) for leaf in keras.tree.flatten(data_adapters.packed_arrays(self.inner))]

        def read(*element: Any) -> Any:
            batch = element if len(element) > 1 or isinstance(spec, tuple) else element[0]
            leaves = [
                leaf if array is None else _read_rows(array, leaf)
                for leaf, array in zip(keras.tree.flatten(batch), mapped, strict=True)
            ]
            return keras.tree.pack_sequence_as(batch, leaves)

        dataset = economy.slices_in_turn(self.inner.get_tf_dataset())
        spec = dataset.element_spec
        return (dataset.skip(behind) if behind else dataset).map(read).prefetch(1)

    @property
    def num_batches(self) -> Any:
        return self.inner.num_batches

    @property
    def batch_size(self) -> Any:
        return self.inner.batch_size

    @property
    def has_partial_batch(self) -> Any:
        return self.inner.has_partial_batch

    @property
    def partial_batch_size(self) -> Any:
        return self.inner.partial_batch_size


def adapter_for(x: Any, y: Any, sample_weight: Any, *, are_arrays: bool, **options: Any) -> Any:
    """Return Keras's adapter for data, or :class:`MappedArrays`; ``options`` are those of ``Model.fit``."""
    economy.lessen_loader(x)
    if are_arrays and any_read_by_rows(x, y):
        return MappedArrays(x, y, sample_weight, **options)
    with warnings.catch_warnings():
        # shuffle=True may be fit's default rather than the user's choice; Keras would warn that it is ignored.
        warnings.filterwarnings("ignore", message="`shuffle=True` was passed")
        return data_adapters.data_adapter_for(x=x, y=y, sample_weight=sample_weight, **options)


def _read_rows(array: Any, numbers: Any) -> Any:
    """Read rows of a mapped array as a tensor; floats get Keras's own precision, as for arrays in memory."""
    dtype = (
        np.dtype(keras.config.floatx()) if np.issubdtype(array.dtype, np.floating) else array.dtype.newbyteorder("=")
    )

    def read(rows: Any) -> Any:
        first, last = int(rows[0]), int(rows[-1])
        in_order = last - first + 1 == len(rows) and bool(np.all(np.diff(rows) == 1))
        return np.array(array[first : last + 1] if in_order else array[rows], dtype=dtype)

    tensor = tf.numpy_function(read, [numbers], tf.as_dtype(dtype), stateful=False)
    tensor.set_shape([numbers.shape[0], *array.shape[1:]])
    return tensor


def split_arrays_for_validation(x: Any, y: Any, sample_weight: Any, validation_split: float) -> tuple[Any, Any]:
    """Split arrays as ``Model.fit(validation_split=...)`` does; mapped arrays become views of their files."""
    parts = (x, y, sample_weight)
    if not any_read_by_rows(*parts):
        return data_adapters.split_validation(*parts, validation_split)
    flat = keras.tree.flatten(parts)
    numbered = [np.arange(len(leaf)) if is_read_by_rows(leaf) else leaf for leaf in flat]
    x, y, sample_weight = keras.tree.pack_sequence_as(parts, numbered)
    sides = data_adapters.split_validation(x, y, sample_weight, validation_split)
    views = [
        [
            array[int(part[0]) : int(part[-1]) + 1] if is_read_by_rows(array) else part
            for array, part in zip(flat, keras.tree.flatten(side), strict=True)
        ]
        for side in sides
    ]
    return keras.tree.pack_sequence_as(parts, views[0]), keras.tree.pack_sequence_as(parts, views[1])


# -- rows -------------------------------------------------------------------------------------------------------------


def longest_rows(parts: Any, most: int) -> Any | None:
    """Return the numbers of the ``most`` largest samples, largest first; None if all have the same size."""
    sizes = [size for leaf in keras.tree.flatten(parts) if leaf is not None and (size := _sizes(leaf)) is not None]
    if not sizes:
        return None
    return np.argsort(-np.sum(sizes, axis=0), kind="stable")[:most]


def _sizes(leaf: Tensor) -> Any:
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)) or tf.is_tensor(leaf):
        return row_sizes(leaf)
    if hasattr(leaf, "tocsr"):
        return np.diff(leaf.tocsr().indptr) * leaf.dtype.itemsize
    if isinstance(leaf, np.ndarray) and leaf.dtype == object:
        return np.array([sum(len(str(word)) for word in np.ravel(row)) for row in leaf])
    return None


def take_rows(parts: Any, rows: Any) -> Any:
    """Return the structure of arrays with these samples only."""

    def take(leaf: Tensor) -> Any:
        if leaf is None:
            return None
        if hasattr(leaf, "iloc"):
            return leaf.iloc[rows]
        if hasattr(leaf, "tocsr"):
            return leaf.tocsr()[rows]
        if isinstance(leaf, tf.SparseTensor):
            ordered = [tf.sparse.slice(leaf, [row, *[0] * (leaf.shape.rank - 1)], [1, *leaf.shape[1:]]) for row in rows]
            return tf.sparse.concat(0, ordered)
        if isinstance(leaf, tf.RaggedTensor) or tf.is_tensor(leaf):
            return tf.gather(leaf, rows)
        return (leaf if hasattr(leaf, "__getitem__") else np.asarray(leaf))[rows]

    return keras.tree.map_structure(take, parts)
