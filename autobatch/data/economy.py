"""Economy with host memory in reading data.

It changes how much is held at a time, and no sample, nor their order. There are two occasions:

- A process was started again because it had run out of host memory. Queues are shorter, a PyDataset has fewer workers,
  and arrays are read row by row, as mapped files are, where Keras would copy them into a tensor.
- A limited CPU arena holds the data beside what the steps need. There nothing is made ahead: a step may fill the arena,
  so that a batch being made beside it finds no room, and TensorFlow ends the training or crashes. The copy of an array
  is given up where it would take more than a tenth of the limit. Micro-batches have that room then.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.data import cardinality
from autobatch.memory import arena, limits
from autobatch.seams import tf_data
from autobatch.types import Dataset

_SHARE_OF_QUEUES = 20
"""Part of the free host memory that tf.data may fill with what it makes ahead: one twentieth, less at higher levels."""

AHEAD = 2
"""Effective batches that are made ahead of the one in use, where memory is not short, and no arena holds them."""

_SHARE_OF_ARENA = 10
"""Part of a CPU arena's limit that the copy of an array may take, and queues in the user's pipeline: one tenth. What
they take costs a micro-batch as much of its size. Without a copy a step waits for the rows of the array."""

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


def batches_ahead() -> int:
    """Return the number of effective batches to be made ahead, beside the steps."""
    return max(0, AHEAD - _level.get()) if _room_in_arena() is None else 0


def _room_in_arena() -> int | None:
    limit = arena.arena_limit_bytes("CPU:0")
    return None if limit is None else limit // _SHARE_OF_ARENA


def under_way(ahead: int, what: str) -> str:
    """Return what to call the effective batches of ``what`` that exist at a time, ``ahead`` of them made ahead."""
    why = ", since memory is short" if _room_in_arena() is None else ": a limited arena holds them"
    short = "" if ahead >= AHEAD else why if ahead else f", none made ahead{why}"
    return f"{1 + ahead} effective batch{'es' if ahead else ''} of {what}{short}"


def prefetched(dataset: Dataset, ahead: int | None = None) -> Any:
    """Return the dataset with ``ahead`` elements made ahead; without that, as many as effective batches.

    There is a prefetch in any case: the saved state of an iterator names the datasets that it runs through.
    """
    return with_short_queues(without_prefetch(dataset).prefetch(batches_ahead() if ahead is None else ahead))


def slices_ahead(dataset: Dataset) -> tuple[Any, int]:
    """Return a dataset over arrays with batches made ahead, and their number: at least one by Keras, none in an arena.

    Keras lets tf.data choose how many slices are cut at once, and each of them waits in a queue before the prefetch: on
    16 cores up to 16. Here one is cut at a time. The tuner could only choose that number; on a few cores it takes more
    time than the slices do: 90 ms of an epoch of 640 ms.
    """
    if _room_in_arena() is not None:
        return prefetched(slices_in_turn(dataset)), 0
    slices = cardinality.behind(dataset, ("Prefetch",))
    least = 1 if tf_data.kind_of(cardinality.behind(slices, ("Options",))) == "ParallelMap" else 0
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    ahead = max(least, batches_ahead())
    return slices.with_options(options).prefetch(ahead - least), ahead


def slices_in_turn(dataset: Dataset) -> Any:
    """Return Keras's dataset over arrays; in an arena each slice is cut when it is asked for."""
    return tf_data.mapped_in_turn(without_prefetch(dataset)) if _room_in_arena() is not None else dataset


def without_prefetch(dataset: Dataset) -> Any:
    """Return the dataset; in an arena without the prefetch at its end, the user's or Keras's."""
    if _room_in_arena() is None or tf_data.kind_of(cardinality.behind(dataset, ("Options",))) != "Prefetch":
        return dataset
    return cardinality.behind(dataset, ("Prefetch", "Options")).with_options(dataset.options())


def maps_at_once() -> int | None:
    """Return how many elements a function of this project is to be called on at once, as ``Dataset.map`` takes it."""
    return tf.data.AUTOTUNE if _room_in_arena() is None else None


def with_short_queues(dataset: Dataset) -> Any:
    """Return the dataset with a bound on what the queues hold whose length tf.data chooses, the user's among them.

    In an arena tf.data also adds none of its own: by itself it calls functions on several elements ahead.
    """
    level, room = _level.get(), _room_in_arena()
    if not level and room is None:
        return dataset
    options = tf.data.Options()
    free = limits.find_limit("CPU:0").limit_bytes if level else None
    shares = [room, None if free is None else free // (_SHARE_OF_QUEUES * level)]
    options.autotune.ram_budget = max(1, min((share for share in shares if share is not None), default=0))
    if level > 1:
        options.threading.private_threadpool_size = 1
    if room is not None:
        options.experimental_optimization.map_parallelization = False
        options.experimental_optimization.inject_prefetch = False
    return dataset.with_options(options)


def spares_copy_of(array: Any) -> bool:
    """Return True for an array in memory that is not to be copied as a whole."""
    if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.kind not in "biuf":
        return False
    room = _room_in_arena()
    return array.nbytes >= _SMALL_BYTES and (_level.get() > 0 or (room is not None and array.nbytes > room))


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
