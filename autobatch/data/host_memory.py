"""Host memory that the input pipeline will hold, estimated before training.

Only what is known without reading the data counts, so an estimate is a lower bound. A ``cache()`` of unknown length is
left out. So are the shuffles and caches inside the function of an ``interleave`` or a ``flat_map``, whose size is known
only when it runs. Device memory is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.data import arrays, cardinality
from autobatch.errors import warn
from autobatch.memory import limits
from autobatch.records import HostUse, Limit
from autobatch.seams import data_adapters, tf_data
from autobatch.tensors.batch_structure import row_sizes, sample_count
from autobatch.types import Batch, Dataset, ElementSpec, Tensor
from autobatch.units import format_bytes

AUTOTUNED_PREFETCH = 2
"""Elements counted for a prefetch whose size tf.data chooses; it may choose more if there is room."""


def uses_of_arrays(x: Any, y: Any, sample_weight: Any) -> tuple[HostUse, ...]:
    """Return the tensors into which Keras copies arrays; tensors and mapped files are not copied."""
    uses = []
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        copied_bytes = sum(_copied_bytes(leaf) for leaf in keras.tree.flatten(part) if leaf is not None)
        if copied_bytes:
            uses.append(HostUse(f"the copy of {name} as a tensor", copied_bytes))
    return tuple(uses)


def _copied_bytes(leaf: Tensor) -> int:
    if tf.is_tensor(leaf) or isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)) or arrays.is_read_by_rows(leaf):
        return 0
    if hasattr(leaf, "tocsr"):
        return int(leaf.nnz) * (8 * 2 + int(leaf.dtype.itemsize))  # two coordinates and a value
    elements = int(np.prod([int(size) for size in leaf.shape], dtype=np.int64))
    return elements * _item_bytes(leaf)


def _item_bytes(array: Any) -> int:
    floatx_bytes = int(np.dtype(keras.config.floatx()).itemsize)
    dtypes = array.dtypes if hasattr(array, "dtypes") and hasattr(array, "iloc") else array.dtype
    if isinstance(dtypes, np.dtype):
        return floatx_bytes if np.issubdtype(dtypes, np.floating) else int(dtypes.itemsize)
    return floatx_bytes  # pandas' own and torch's types: numbers of about that size


def uses_of_dataset(dataset: Dataset, *, sample_bytes: int) -> tuple[HostUse, ...]:
    """Return the buffers of a dataset and its sources: shuffles, caches in memory and prefetches, the last one first.

    Args:
        dataset: the user's dataset, before it is cut into effective batches.
        sample_bytes: bytes of one sample as training gets it; used if the shape of an element is not known.
    """
    kind = tf_data.kind_of(dataset)
    one_bytes = _element_bytes(dataset.element_spec, sample_bytes, cardinality.samples_in_element(dataset) or 1)
    uses = []
    if kind.startswith("Shuffle"):
        size = tf_data.constant_of(dataset, "_buffer_size")
        total = int(dataset.cardinality())
        if isinstance(size, int):
            held = size if total < 0 or tf_data.constant_of(dataset, "_count") else min(size, total)
            uses.append(HostUse(f"shuffle({size})", held * one_bytes))
    elif kind == "Cache":
        total = int(dataset.cardinality())
        if total >= 0 and tf_data.constant_of(dataset, "_filename") in ("", b""):
            uses.append(HostUse("cache()", total * one_bytes))
    elif kind == "Prefetch":
        size = tf_data.constant_of(dataset, "_buffer_size")
        if isinstance(size, int):
            held = AUTOTUNED_PREFETCH if size == tf.data.AUTOTUNE else size
            uses.append(HostUse(f"prefetch({'AUTOTUNE' if size == tf.data.AUTOTUNE else size})", held * one_bytes))
    for source in tf_data.inputs_of(dataset):
        uses += uses_of_dataset(source, sample_bytes=sample_bytes)
    return tuple(uses)


def _element_bytes(element_spec: ElementSpec, sample_bytes: int, rows: int) -> int:
    total = 0
    for spec in tf.nest.flatten(element_spec):
        shape = getattr(spec, "shape", None)
        if shape is None:
            continue
        fixed = isinstance(spec, tf.TensorSpec) and shape.rank is not None and spec.dtype != tf.string
        if fixed and None not in shape[1:]:
            sizes = [rows if size is None else size for size in shape]
            total += int(np.prod(sizes, dtype=np.int64)) * spec.dtype.size
        else:
            return rows * sample_bytes  # a size that varies is assumed to be that of the samples that were looked at
    return total


def uses_of_loader(loader: Any, *, sample_bytes: int, batch_samples: int | None) -> tuple[HostUse, ...]:
    """Return the batches that workers of a PyDataset or a torch loader have ready; nothing for other data.

    Args:
        loader: the user's data.
        sample_bytes: bytes of one sample.
        batch_samples: samples in each batch; None takes the loader's ``batch_size``, or 1 if it has none.
    """
    batch_bytes = sample_bytes * (batch_samples or getattr(loader, "batch_size", None) or 1)
    if isinstance(loader, keras.utils.PyDataset):
        if loader.workers > 1 or (loader.workers > 0 and loader.use_multiprocessing):
            size = int(loader.max_queue_size)
            return (HostUse(f"the PyDataset's queue (max_queue_size={size})", size * batch_bytes),)
    elif getattr(loader, "num_workers", 0):
        size = int(loader.num_workers * (loader.prefetch_factor or 1))
        return (HostUse(f"the DataLoader's workers ({size} batches)", size * batch_bytes),)
    return ()


def uses_of_validation(data: Batch, *, sample_bytes: int) -> tuple[HostUse, ...]:
    """Return the memory that validation data hold as long as training lasts; the names begin with "validation".

    Args:
        data: ``validation_data`` as given to ``Model.fit``, before it is made into batches.
        sample_bytes: bytes of one sample for training; used if the size of one for validation is not known.
    """
    if data is None:
        return ()
    if isinstance(data, tf.data.Dataset):
        uses = uses_of_dataset(data, sample_bytes=sample_bytes)
    else:
        parts = keras.utils.unpack_x_y_sample_weight(data) if isinstance(data, (tuple, list)) else (data, None, None)
        if data_adapters.are_arrays(*parts):
            uses = uses_of_arrays(*parts)
        else:
            uses = uses_of_loader(parts[0], sample_bytes=sample_bytes, batch_samples=None)
    return tuple(HostUse(f"validation: {use.name}", use.held_bytes) for use in uses)


def fixed_bytes(spec: Any) -> int | None:
    """Return the bytes of one sample of a leaf; None if they vary."""
    if not isinstance(spec, tf.TensorSpec) or spec.dtype == tf.string or spec.shape.rank is None:
        return None
    return None if None in spec.shape[1:] else int(np.prod(spec.shape[1:], dtype=np.int64)) * int(spec.dtype.size)


def mean_bytes(leaves: list[Tensor]) -> int:
    """Return the mean bytes of one sample of a batch, rounded up."""
    total = 0
    for leaf in leaves:
        sizes = row_sizes(leaf)
        total += int(tf.size(leaf)) * leaf.dtype.size if sizes is None else int(np.sum(sizes))
    return -(-total // max(int(sample_count(leaves)), 1))


def available() -> Limit | None:
    """Return the lowest known limit on this process's host memory, the machine's or its control group's, or None."""
    known = [limit for limit in limits.all_limits("CPU:0") if limit.limit_bytes is not None]
    return min(known, key=lambda limit: limit.limit_bytes or 0, default=None)


def warn_if_short(uses: Iterable[HostUse], limit: Limit | None) -> bool:
    """Warn, with the names of the uses, if they exceed the limit; return True if it warned."""
    largest_first = sorted(uses, key=lambda use: -use.held_bytes)
    total = sum(use.held_bytes for use in largest_first)
    if limit is None or limit.limit_bytes is None or total <= limit.limit_bytes:
        return False
    named = ", ".join(f"{use.name} {format_bytes(use.held_bytes)}" for use in largest_first if use.held_bytes)
    warn(
        f"The input pipeline will hold at least {format_bytes(total)} in host memory ({named}), and there are "
        f"{format_bytes(limit.limit_bytes)} ({limit.source}). Use a smaller shuffle buffer, cache to a file, or an "
        "np.memmap, whose rows are read as they are needed.",
    )
    return True
