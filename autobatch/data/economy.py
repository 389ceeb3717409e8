"""Economy with host memory in reading data, for a process that was started again because it had run out.

It changes how much is held at a time, and no sample, nor their order. Queues are shorter, a PyDataset has fewer
workers, and arrays are read row by row, as mapped files are, where Keras would copy them into a tensor.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.memory import limits
from autobatch.types import Dataset

_SHARE_OF_QUEUES = 20
"""Part of the free host memory that tf.data may fill with what it makes ahead: one twentieth, less at higher levels."""

_SMALL_BYTES = 2**20
"""Size below which copying an array costs nothing that matters."""

_level: contextvars.ContextVar[int] = contextvars.ContextVar("autobatch_economy", default=0)
_undo: contextvars.ContextVar[contextlib.ExitStack | None] = contextvars.ContextVar("autobatch_undo", default=None)


@contextlib.contextmanager
def economising(level: int) -> Iterator[None]:
    """Be economical while the ``with`` block runs: 0 not at all, 1 somewhat, from 2 on as much as possible."""
    with contextlib.ExitStack() as undo:
        tokens = _level.set(level), _undo.set(undo)
        try:
            yield
        finally:
            _level.reset(tokens[0])
            _undo.reset(tokens[1])


def prefetched(dataset: Dataset) -> Any:
    """Return the dataset with effective batches made ahead: as many as tf.data likes, one, or none.

    There is a prefetch in any case: the saved state of an iterator names the datasets that it runs through.
    """
    return with_short_queues(dataset.prefetch({0: tf.data.AUTOTUNE, 1: 1}.get(_level.get(), 0)))


def with_short_queues(dataset: Dataset) -> Any:
    """Return the dataset with a bound on what the queues hold whose length tf.data chooses, the user's among them."""
    level = _level.get()
    if not level:
        return dataset
    options = tf.data.Options()
    free = limits.find_limit("CPU:0").limit_bytes
    if free is not None:
        options.autotune.ram_budget = max(1, free // (_SHARE_OF_QUEUES * level))
    if level > 1:
        options.threading.private_threadpool_size = 1
    return dataset.with_options(options)


def spares_copy_of(array: Any) -> bool:
    """Return True for an array in memory that is not to be copied as a whole."""
    return (
        _level.get() > 0
        and isinstance(array, np.ndarray)
        and array.ndim > 0
        and array.dtype.kind in "biuf"
        and array.nbytes >= _SMALL_BYTES
    )


def lessen_loader(loader: Any) -> None:
    """Let a PyDataset or a torch loader have less ready, until the economy ends.

    A PyDataset on workers stays on workers, and a torch loader keeps their number, by which its random numbers go.
    """
    level, undo = _level.get(), _undo.get()
    if not level or undo is None:
        return
    if isinstance(loader, keras.utils.PyDataset):
        least = 1 if loader.use_multiprocessing else 2  # one thread alone would be no worker
        if loader.workers > least:
            _change(loader, "workers", max(least, loader.workers // 2) if level == 1 else least, undo)
        if loader.max_queue_size > 2:
            _change(loader, "max_queue_size", 2 if level == 1 else 1, undo)
    elif getattr(loader, "num_workers", 0) and (getattr(loader, "prefetch_factor", None) or 0) > 1:
        _change(loader, "prefetch_factor", 1, undo)


def _change(loader: Any, name: str, value: int, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, loader, name, getattr(loader, name))
    setattr(loader, name, value)
