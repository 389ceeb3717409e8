"""Plan, trials, recoveries and micro-batch in TensorBoard, where a training has a ``keras.callbacks.TensorBoard``.

They are a run of their own, ``autobatch``, beside Keras's ``train`` and ``validation``. They are written as TensorFlow
stores them, so that no package of TensorBoard's is needed for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from autobatch import display
from autobatch.records import Recovery, Report
from autobatch.recovery.abstract_transaction import AnyTransaction

RUN = "autobatch"
"""Folder of the run in the callback's ``log_dir``."""


def beside(callbacks: Iterable[Any], report: Report, transaction: AnyTransaction) -> list[TrainingInTensorBoard]:
    """Return a callback for the first ``keras.callbacks.TensorBoard`` among ``callbacks``; none where there is none."""
    boards = [callback for callback in callbacks if isinstance(callback, keras.callbacks.TensorBoard)]
    return [TrainingInTensorBoard(boards[0].log_dir, report, transaction)] if boards else []


class TrainingInTensorBoard(keras.callbacks.Callback):  # type: ignore[misc]  # Keras ships no types
    """Callback that writes the report of the search once, then the micro-batch whenever it has changed.

    Steps count trials under ``trials/`` and optimizer updates elsewhere.
    """

    def __init__(self, log_dir: str, report: Report, transaction: AnyTransaction) -> None:
        super().__init__()
        self._folder = os.path.join(str(log_dir), RUN)
        self._report = report
        self._transaction = transaction
        self._writer: Any = None
        self._size: int | None = None
        self._recovered = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Write the report, as text and each of its trials."""
        del logs
        # Those of an earlier process, whose training this one goes on with, are written already.
        self._recovered = len(self._transaction.recoveries)
        self._writer = tf.summary.create_file_writer(self._folder)
        with self._writer.as_default(), tf.summary.record_if(True):
            _write_text("report", str(display.report_format("markdown").render(self._report)), 0)
            for place, trial in enumerate(self._report.trials):
                _write_scalar("trials/micro_batch", trial.micro_batch, place)
                _write_scalar("trials/fits", float(trial.fits), place)
                if trial.peak_bytes is not None:
                    _write_scalar("trials/peak_mib", trial.peak_bytes / 2**20, place)
                if trial.samples_per_second is not None:
                    _write_scalar("trials/samples_per_second", trial.samples_per_second, place)
            self._note_size()
        self._writer.flush()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write what has changed in the update."""
        del batch, logs
        recoveries = self._transaction.recoveries[self._recovered :]
        if not recoveries and self._size == self._transaction.micro_batch:
            return
        with self._writer.as_default(), tf.summary.record_if(True):
            for recovery in recoveries:
                _write_text("recoveries", _in_words(recovery), self._transaction.updates)
            self._recovered += len(recoveries)
            if recoveries:
                _write_scalar("recoveries", self._recovered, self._transaction.updates)
            self._note_size()
        self._writer.flush()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write the size once an epoch, so that its line goes on."""
        del epoch, logs
        with self._writer.as_default(), tf.summary.record_if(True):
            self._note_size()

    def on_train_end(self, logs: Any = None) -> None:
        """Close the file."""
        del logs
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _note_size(self) -> None:
        self._size = self._transaction.micro_batch
        _write_scalar("micro_batch", self._size, self._transaction.updates)


def _in_words(recovery: Recovery) -> str:
    before, after = recovery.micro_batch_before, recovery.micro_batch_after
    if recovery.phase == "restart":
        return f"started again in update {recovery.update}: {recovery.detail}; micro-batch {before} to {after}"
    return f"out of memory in update {recovery.update}, {recovery.phase}: micro-batch {before} to {after}"


def _write_scalar(tag: str, value: float, step: int) -> None:
    metadata = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_SCALAR")
    metadata.plugin_data.plugin_name = "scalars"
    tf.summary.write(tag, tf.constant(value, tf.float32), step=step, metadata=metadata)


def _write_text(tag: str, text: str, step: int) -> None:
    metadata = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_TENSOR")
    metadata.plugin_data.plugin_name = "text"
    tf.summary.write(tag, tf.constant(text), step=step, metadata=metadata)
