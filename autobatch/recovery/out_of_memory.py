"""Exceptions that may mean out of memory, and what becomes of those that do."""

from __future__ import annotations

import tensorflow as tf

from autobatch.memory import oom

CAUGHT = (tf.errors.OpError, MemoryError)
"""Exceptions that TensorFlow and NumPy raise when memory runs out, and for much else."""


def memory_failure(error: BaseException) -> oom.Diagnosis:
    """Return the diagnosis of an error about memory; raise any other again.

    The traceback is dropped, because it keeps the failed step's tensors alive.
    """
    diagnosis = oom.diagnose(error)
    if not diagnosis.is_memory:
        raise error
    error.__traceback__ = None
    return diagnosis
