"""Exceptions that may mean out of memory, and what becomes of those that do."""

from __future__ import annotations

import tensorflow as tf

from autobatch.handover.status import note_poison
from autobatch.memory import oom

CAUGHT = (tf.errors.OpError, MemoryError)
"""Exceptions that TensorFlow and NumPy raise when memory runs out, and for much else."""


def memory_failure(error: BaseException) -> oom.Diagnosis:
    """Return the diagnosis of an error about memory; raise any other again.

    The traceback is dropped, because it keeps the failed step's tensors alive.
    """
    diagnosis = oom.diagnose(error)
    if not diagnosis.is_memory:
        _note_if_poisoned(diagnosis)
        raise error
    error.__traceback__ = None
    return diagnosis


def look_for_poison(error: BaseException) -> None:
    """Note an error of a device that nothing will work on in this process any more, for who starts it again."""
    _note_if_poisoned(oom.diagnose(error))


def _note_if_poisoned(diagnosis: oom.Diagnosis) -> None:
    if diagnosis.kind is oom.FailureKind.POISONED:
        note_poison(diagnosis.detail)
