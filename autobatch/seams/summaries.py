"""``tf.summary`` within a step: written once an update, in its first micro-batch, and never in a trial.

Private: ``_summary_state`` of ``tensorflow.python.ops.summary_ops_v2``, which holds the state of each thread: its
``writer``, and ``is_recording_distribution_strategy``, a condition that every ``tf.summary`` function asks beside the
user's own ``tf.summary.record_if``. Under a strategy it lets the first replica write alone. Where they are missing,
summaries are written once a micro-batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

try:
    from tensorflow.python.ops.summary_ops_v2 import _summary_state
except ImportError:
    _summary_state = None

_CONDITION = "is_recording_distribution_strategy"
_NOBODY = object()
"""Writer in the place of none, for which nothing is ever recorded: so a step is seen to have something to write."""


class SummaryTurn:
    """Turn of one micro-batch to write summaries: open at the start of an update, over once a micro-batch has run.

    ``is_compiled`` says whether XLA compiles the step, which cannot compile a summary: then none is written.

    It is kept in a table and in no variable, since variables that a step writes are put back when it is undone. What
    was written before memory ran out is not written again.
    """

    def __init__(self, is_compiled: Callable[[], bool]) -> None:
        self._is_compiled = is_compiled
        self._table: Any = None
        self._is_open = False  # for a table that is made in the middle of an update
        self._writers: list[Any] = []
        """Writers that the step was traced under, if it writes anything; None among them stands for no writer."""
        self._has_own = False  # a writer that the step's code sets by itself

    def wants_another_writer(self) -> bool:
        """Return True if the step writes summaries, and was traced before the present writer was there.

        ``keras.callbacks.TensorBoard`` sets its own when training begins, after the search.
        """
        now = getattr(_summary_state, "writer", None)
        return now is not None and bool(self._writers) and all(writer is not now for writer in self._writers)

    def once(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return ``step``, traced or not, writing summaries only while it is the turn, which it ends."""
        if not hasattr(_summary_state, _CONDITION):
            return step

        @functools.wraps(step)
        def wrapper(data: Any) -> Any:
            with self._asked():
                return step(data)

        return wrapper

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Let the next micro-batch write while the ``with`` block runs, and none after it."""
        now = getattr(_summary_state, "writer", None)
        # What was traced under a writer that is not there any more has nowhere to write to.
        self._set(self._has_own or not self._writers or any(writer is now for writer in self._writers if writer))
        try:
            yield
        finally:
            self._set(False)

    def _set(self, is_open: bool) -> None:
        self._is_open = is_open
        self._insert(is_open)

    def _insert(self, is_open: bool) -> None:
        if self._table is not None:
            with tf.device("CPU:0"):
                self._table.insert(tf.constant(0, tf.int64), tf.constant(int(is_open), tf.int64))

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        before, writer = getattr(_summary_state, _CONDITION), _summary_state.writer
        asked: list[bool] = []

        def is_turn() -> Any:
            allowed = before() if callable(before) else before
            now = None if _summary_state.writer is _NOBODY else _summary_state.writer
            if allowed is False or self._is_compiled():
                return False
            if now is not writer:
                self._has_own = True
            elif all(known is not now for known in self._writers):
                self._writers.append(now)
            if now is None:
                return False
            asked.append(True)
            return tf.logical_and(allowed, self._lookup())

        setattr(_summary_state, _CONDITION, is_turn)
        if writer is None:
            _summary_state.writer = _NOBODY
        try:
            yield
        finally:
            setattr(_summary_state, _CONDITION, before)
            _summary_state.writer = writer
        if asked:
            self._insert(False)

    def _lookup(self) -> Any:
        with tf.init_scope():
            if self._table is None:
                self._table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, default_value=0)
                self._insert(self._is_open)
        with tf.device("CPU:0"):
            return self._table.lookup(tf.constant(0, tf.int64)) > 0
