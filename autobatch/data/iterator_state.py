"""State of a ``tf.data`` iterator, its shuffle buffers included, as arrays: where no seed decides the order."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

MOST_BYTES = 256 * 2**20
"""Most bytes of a state that is kept; a shuffle buffer of larger samples would be written with every backup."""

_PREFIX = "iterator"


def state_of(iterator: Any) -> dict[str, Any] | None:
    """Return the state of an iterator; None where tf.data cannot save it, or it is larger than :data:`MOST_BYTES`."""
    with tempfile.TemporaryDirectory(prefix="autobatch-iterator-") as folder:
        try:
            tf.train.Checkpoint(iterator=iterator).write(str(Path(folder) / _PREFIX))
        except (tf.errors.OpError, NotImplementedError, TypeError, ValueError):
            return None
        files = sorted(Path(folder).iterdir())
        if sum(file.stat().st_size for file in files) > MOST_BYTES:
            return None
        return {file.name: np.fromfile(file, np.uint8) for file in files}


def restore_iterator(iterator: Any, state: dict[str, Any]) -> None:
    """Put an iterator over the same kind of dataset into a state that :func:`state_of` has returned.

    Raises:
        ValueError: The dataset is made in another way.
    """
    with tempfile.TemporaryDirectory(prefix="autobatch-iterator-") as folder:
        for name, content in state.items():
            content.tofile(Path(folder) / name)
        try:
            tf.train.Checkpoint(iterator=iterator).read(str(Path(folder) / _PREFIX)).assert_consumed()
        except (tf.errors.NotFoundError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                "The backup holds the place in a dataset whose order no seed decides, and this dataset is made in "
                "another way: by other steps, or in a limited CPU arena where that one was not (limit_memory). Make it "
                "as it was made then, give another folder, or remove the backup to train from the start. "
                f"TensorFlow says: {error.message.partition(' Make sure')[0]}"
            ) from error
