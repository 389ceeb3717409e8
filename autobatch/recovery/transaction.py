"""A step on one device as a transaction: it is done whole, or everything is as it was before it.

The variables that a step touches fall in two parts:

* Seeds, metrics and the like change with every micro-batch, running averages after the last. They are small. Their
  values are kept on the device before each step, and put back when it fails. If one micro-batch is the whole effective
  batch, the step itself keeps them. The accumulators need no copy: each step begins by clearing them.
* The weights and the optimizer's variables change in the update alone, which begins when the last gradient is there.
  :mod:`autobatch.recovery.keeper` keeps their values too, on the device or on the host, and a failed update is undone.
  Once updates have proven to fit, it may keep nothing. The update is then secured beforehand. It asks the allocator for
  the memory that its trace was found to need (:mod:`autobatch.step.update_room`), and gives it back before it starts.
  If it runs out of memory all the same, half done, :class:`~autobatch.errors.UpdateInterruptedError` ends training.

A step that updates more than once goes on computing after its first update. There the weights are always kept, and
running out of memory in a later part undoes the updates before it.

After rolling back, the same samples run again with a smaller micro-batch
(:mod:`autobatch.recovery.micro_batch_policy`). There is one exception: if the update ran out of memory beside copies of
the weights, the size is kept and the copies are not. A smaller micro-batch would not make an update smaller.
"""

from __future__ import annotations

import logging
from typing import Any

import tensorflow as tf

from autobatch.errors import FixedBatchSizeError, NoFeasibleBatchError, UpdateInterruptedError, warn
from autobatch.metrics.merged_logs import Logs
from autobatch.recovery.abstract_transaction import AbstractTransaction
from autobatch.recovery.keeper import PROVEN_UPDATES, SavedState, SnapshotPlace
from autobatch.recovery.out_of_memory import CAUGHT, memory_failure
from autobatch.recovery.rolled_back import RolledBackError
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.tensors.batch_structure import UnevenSpec, in_words, rows_of
from autobatch.tensors.snapshots import SnapshotTaker
from autobatch.types import Batch

logger = logging.getLogger("autobatch")


class Transaction(AbstractTransaction[AccumulatedStep]):
    """Steps of one training on one device, each undone and run again if memory runs out."""

    _apart: Transaction | None = None
    """Transaction of whole elements, among others that are cut; None before the first of them."""

    def trace(self) -> None:
        micro_batch, samples = self.policy.micro_batch, self._effective_batch
        whole = samples is not None and micro_batch >= samples
        self._step.prepare(whole=whole, samples=samples, micro_batch=micro_batch)

    def _train_once(self, data: Batch, samples: int) -> Logs:
        micro_batch = self.policy.micro_batch
        # An epoch's last, smaller batch is accumulated like the others: no plain step was proven beside accumulators.
        whole = micro_batch >= max(samples, self._effective_batch or samples)
        ratio = self._lengths.ratio(data)
        micro_batch = self._lengths.sized(micro_batch, ratio, samples)
        whole = whole and micro_batch >= samples
        step = self._step
        kept: SavedState | None = None
        try:
            if step.prepare(whole=whole, samples=samples, micro_batch=micro_batch):
                self._keeper.forget()
            kept = self._keeper.take(whole=whole, proven=self._good_updates >= PROVEN_UPDATES)
            if whole:
                logs = step.plain(data)
            else:
                step.accumulate(data, micro_batch)
                logs = step.apply()
        except CAUGHT as error:
            self._explain(error, kept, samples, micro_batch)
            diagnosis = memory_failure(error)
        else:
            return logs
        updating_beside = kept.weights_at if kept is not None and step.update_has_begun() else None
        if updating_beside is SnapshotPlace.NOWHERE:
            raise UpdateInterruptedError(
                f"The optimizer's update ran out of memory half-way ({diagnosis.detail}), and the weights were not "
                f"kept beside it, for want of room or because {PROVEN_UPDATES} updates like it had gone well. They are "
                "unusable now: load the last checkpoint, and use a smaller model, an optimizer with fewer slots, or a "
                "device with more memory."
            )
        self.roll_back(() if kept is None else (kept,))
        raise RolledBackError(
            step.train_divider.division(samples, micro_batch).larger,
            samples,
            diagnosis,
            length_ratio=ratio,
            beside_copies=updating_beside is SnapshotPlace.DEVICE,
        )

    def _train_apart(self, data: Batch) -> Logs:
        """Make one update with a whole element, by Keras's own step; say so the first time."""
        if self._apart is None:
            structure = self._step.structure
            warn(
                f"An element's parts have {in_words(rows_of(data))} rows, which are not the proportions of the others. "
                "It is trained whole, as an update of its own, and so are others like it. Where that is not meant, "
                "leave out what remains of a stream, by drop_remainder=True."
            )
            step = self._step.for_data(UnevenSpec(structure.element_spec, None))
            limits: dict[str, Any] = {"user_limit_bytes": self._user_limit_bytes, "headroom": self._headroom}
            self._apart = Transaction(step, 1, device=self._device, effective_batch=1, **limits)
            self._apart.recoveries = self.recoveries
        self._apart._updates = self._updates
        try:
            logs = self._apart.train(data)
        except NoFeasibleBatchError:
            if not self._step.accumulators:
                raise
            logger.warning("Trying again without the accumulators of the other elements, which take memory beside it.")
            self._step.release_accumulators()
            logs = self._apart.train(data)
        self._updates += 1
        return logs

    def _explain(self, error: BaseException, kept: SavedState | None, samples: int, micro_batch: int) -> None:
        """Undo the step and say so, if it failed because the code works with one number of samples alone."""
        try:
            self._step.explain(error, samples, micro_batch)
        except FixedBatchSizeError:
            self.roll_back(() if kept is None else (kept,))
            raise

    def _evaluate_once(self, step: AccumulatedStep, data: Batch, samples: int) -> Logs:
        micro_batch = self._validation_policy.micro_batch
        kept: list[SavedState] = []
        try:
            if step.prepare_evaluation(samples, micro_batch) or "evaluation" not in step.recorders:
                step.recorders["evaluation"] = SnapshotTaker(step.changed_before_update)
            kept.append(SavedState(SnapshotPlace.NOWHERE, (step.recorders["evaluation"].take(),)))
            step.evaluate(data, micro_batch)
            return step.evaluation_logs()
        except CAUGHT as error:
            if isinstance(error, tf.errors.InvalidArgumentError) and not step.evaluates_whole and micro_batch < samples:
                step.evaluates_whole = True  # the code may hold a number of samples; otherwise it fails again
                self.roll_back(kept)
                return self._evaluate_once(step, data, samples)
            diagnosis = memory_failure(error)
        self.roll_back(kept)
        micro_batch = step.evaluation_size(samples, micro_batch)
        raise RolledBackError(step.test_divider.division(samples, micro_batch).larger, samples, diagnosis)
