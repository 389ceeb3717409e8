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

from autobatch.errors import UpdateInterruptedError
from autobatch.metrics.merged_logs import Logs
from autobatch.recovery.abstract_transaction import AbstractTransaction, RolledBackError
from autobatch.recovery.keeper import PROVEN_UPDATES, SavedState, SnapshotPlace
from autobatch.recovery.out_of_memory import CAUGHT, memory_failure
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.tensors.snapshots import SnapshotTaker
from autobatch.types import Batch


class Transaction(AbstractTransaction[AccumulatedStep]):
    """Steps of one training on one device, each undone and run again if memory runs out."""

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
            if step.prepare(whole=whole):
                self._keeper.forget()
            kept = self._keeper.take(whole=whole, proven=self._good_updates >= PROVEN_UPDATES)
            if whole:
                logs = step.plain(data)
            else:
                step.accumulate(data, micro_batch)
                logs = step.apply()
        except CAUGHT as error:
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

    def _evaluate_once(self, step: AccumulatedStep, data: Batch, samples: int) -> Logs:
        micro_batch = self._validation_policy.micro_batch
        kept: list[SavedState] = []
        try:
            if step.prepare_evaluation() or id(step) not in self._evaluation_recorders:
                self._evaluation_recorders[id(step)] = SnapshotTaker(step.changed_before_update)
            kept.append(SavedState(SnapshotPlace.NOWHERE, (self._evaluation_recorders[id(step)].take(),)))
            step.evaluate(data, micro_batch)
            return step.evaluation_logs()
        except CAUGHT as error:
            diagnosis = memory_failure(error)
        self.roll_back(kept)
        raise RolledBackError(step.test_divider.division(samples, micro_batch).larger, samples, diagnosis)
