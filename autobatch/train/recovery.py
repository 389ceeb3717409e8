"""A step as a transaction: it is done whole, or everything is as it was before it.

What a step touches falls in two parts:

* BatchNormalization's statistics, seeds, metrics and the like change with every micro-batch. They are small; their
  values are kept on the device before each step and put back when it fails. The accumulators need nothing: each step
  begins by clearing them.
* The weights and the optimizer's variables change in the update alone, which begins when the last gradient is there.
  Keeping their values costs nothing until the update overwrites them, and then their own size for as long as the
  update lasts: memory that the activations, gone by then, have just given back. Where it fits the budget next to what
  is held anyway, they are kept, and a failed update is undone. Where it does not, nothing can be undone, so the
  update makes sure beforehand: it asks the allocator for one block as large as the weights, gives it back, and only
  then starts, with room for its temporaries. Should it run out of memory all the same, half done,
  :class:`~autobatch.errors.UpdateInterruptedError` says so rather than training on with it. The same holds where one
  micro-batch is the whole effective batch and :data:`PROVEN_UPDATES` updates went well: keeping the weights would cost
  a small model more time than its step, and what an update needs does not change from one to the next.

After rolling back, the same samples run again with a smaller micro-batch (:mod:`autobatch.train.policy`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import tenacity
import tensorflow as tf

from autobatch.errors import NoFeasibleBatchError, UpdateInterruptedError
from autobatch.memory import limits, oom
from autobatch.records import MemoryModel, Recovery
from autobatch.train.micro_step import Logs
from autobatch.train.policy import MicroBatchPolicy
from autobatch.train.step import AccumulatedStep
from autobatch.train.structure import count_samples
from autobatch.trial.snapshot import Recorder, Snapshot, bytes_of
from autobatch.units import format_bytes

logger = logging.getLogger("autobatch")

# What TensorFlow and NumPy raise when memory runs out, and much else: memory.oom tells which it was.
CAUGHT = (tf.errors.OpError, MemoryError)


PROVEN_UPDATES = 4
"""So many updates in a row show that the optimizer's update fits beside all else that is held."""


class _RolledBackError(Exception):
    """A step ran out of memory and was undone. It carries no traceback, which would keep the failed tensors alive."""

    def __init__(self, micro_batch: int, samples: int, diagnosis: oom.Diagnosis) -> None:
        super().__init__(diagnosis.detail)
        self.micro_batch = micro_batch
        self.samples = samples
        self.diagnosis = diagnosis


class Transaction:
    """Runs the steps of one training so that running out of memory never spoils it.

    Args:
        step: the model's compiled steps.
        micro_batch: the size to begin with, proven or chosen.
        effective_batch: samples in all updates but an epoch's last; None where batches may have any size.
        device: TensorFlow's name of the device, such as "GPU:0".
        memory_model: predicts the peak; picks the next size after a failure.
        user_limit_bytes, headroom: as for ``fit``.
    """

    def __init__(
        self,
        step: AccumulatedStep,
        micro_batch: int,
        *,
        device: str,
        effective_batch: int | None = None,
        memory_model: MemoryModel | None = None,
        user_limit_bytes: int | None = None,
        headroom: float = 0.0,
    ) -> None:
        self.recoveries: list[Recovery] = []
        self.policy = MicroBatchPolicy(micro_batch)
        self._validation_policy = MicroBatchPolicy(micro_batch)
        self._step = step
        self._recorder: Recorder | None = None
        self._keeps_weights = True
        self._proven = False
        self._good_updates = 0
        self._evaluations: dict[str, AccumulatedStep] = {}
        self._evaluation_recorders: dict[int, Recorder] = {}
        self._device = device
        self._effective_batch = effective_batch
        self._memory_model = memory_model
        self._user_limit_bytes = user_limit_bytes
        self._headroom = headroom
        self._updates = 0

    def train(self, data: Any) -> Logs:
        """Make one update with an effective batch, whatever it takes.

        Raises:
            NoFeasibleBatchError: not even one sample fits; the model holds the last completed update.
            UpdateInterruptedError: see this module's docstring.
        """
        logs = self._run(data, self._train_once, self.policy, "train")
        self._updates += 1
        self._good_updates += 1
        self.policy.succeeded()
        return logs

    def evaluate(self, data: Any, element_spec: Any) -> Logs:
        """Run ``test_step`` over one validation batch, of any size."""
        key = repr(element_spec)
        if key not in self._evaluations:
            self._evaluations[key] = self._step.for_data(element_spec)
        step = self._evaluations[key]
        logs = self._run(
            data, lambda data, samples: self._evaluate_once(step, data, samples), self._validation_policy, "validation"
        )
        self._validation_policy.succeeded()
        return logs

    def _run(self, data: Any, once: Callable[[Any, int], Logs], policy: MicroBatchPolicy, phase: str) -> Logs:
        samples = count_samples(data)
        try:
            return once(data, samples)
        except _RolledBackError as first:
            failure: _RolledBackError = first

        def shrink(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome is not None else None
            if isinstance(error, _RolledBackError):
                self._shrink(policy, phase, error)

        self._shrink(policy, phase, failure)
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_RolledBackError),
            stop=tenacity.stop_never,  # _shrink ends it: sizes fall at every try, down to 1
            wait=tenacity.wait_none(),  # the allocator has waited already
            before_sleep=shrink,
            reraise=True,
        )
        return again(once, data, samples)

    def _train_once(self, data: Any, samples: int) -> Logs:
        micro_batch = self.policy.micro_batch
        # An epoch's last, smaller batch goes the way of the others: the plain step was never run beside accumulators.
        whole = micro_batch >= max(samples, self._effective_batch or samples)
        step = self._step
        kept: list[Snapshot] = []
        try:
            proven = whole and self._good_updates >= PROVEN_UPDATES
            if step.prepare(whole=whole) or self._recorder is None or proven is not self._proven:
                self._proven = proven
                self._recorder = self._make_recorder()
            kept.append(self._recorder.take())
            logs = step.plain(data) if whole else step.accumulate(data, micro_batch)
            if not whole:
                step.apply()
        except CAUGHT as error:
            diagnosis = self._diagnose(error)
        else:
            return logs
        if kept and not self._keeps_weights and step.update_has_begun():
            raise UpdateInterruptedError(
                f"The optimizer's update ran out of memory half-way ({diagnosis.detail}), and there was no room to "
                "keep the weights beside it. They are unusable now: load the last checkpoint, and use a smaller "
                "model, an optimizer with fewer slots, or a device with more memory."
            )
        self._roll_back(kept)
        raise _RolledBackError(min(samples, micro_batch), samples, diagnosis)

    def _make_recorder(self) -> Recorder:
        """A recorder of what each micro-batch changes, and of what the update changes if there is room to keep it."""
        updated = self._step.updated_variables
        # The update itself needs room at the same time: for gradients that have no accumulators, for temporaries.
        weights = [bytes_of([variable]) for variable in self._step.model.trainable_variables]
        temporaries = sum(weights) + 2 * max(weights, default=0)
        self._keeps_weights = not self._proven and self._can_keep(bytes_of(updated) + temporaries)
        left_out = set() if self._keeps_weights else {id(variable) for variable in updated}
        return Recorder(
            (variable for variable in self._step.variables if id(variable) not in left_out),
            beforehand=self._step.note_no_update,
        )

    def _evaluate_once(self, step: AccumulatedStep, data: Any, samples: int) -> Logs:
        micro_batch = min(samples, self._validation_policy.micro_batch)
        kept: list[Snapshot] = []
        try:
            if step.prepare_evaluation() or id(step) not in self._evaluation_recorders:
                updated = {id(variable) for variable in step.updated_variables}
                self._evaluation_recorders[id(step)] = Recorder(
                    variable for variable in step.variables if id(variable) not in updated
                )
            kept.append(self._evaluation_recorders[id(step)].take())
            return step.evaluate(data, micro_batch)
        except CAUGHT as error:
            diagnosis = self._diagnose(error)
        self._roll_back(kept)
        raise _RolledBackError(micro_batch, samples, diagnosis)

    @staticmethod
    def _diagnose(error: BaseException) -> oom.Diagnosis:
        """Tell what ``error`` is; raise it again if it is not about memory, let go of its traceback if it is."""
        diagnosis = oom.diagnose(error)
        if not diagnosis.is_memory:
            raise error
        error.__traceback__ = None
        return diagnosis

    @staticmethod
    def _roll_back(kept: list[Snapshot]) -> None:
        gc.collect()
        for snapshot in kept:
            snapshot.restore()
            snapshot.drop()

    def _can_keep(self, size_bytes: int) -> bool:
        limit = limits.find_limit(self._device, self._user_limit_bytes)
        in_use = limits.bytes_in_use(self._device)
        if limit.limit_bytes is None or in_use is None:
            return True
        return in_use + size_bytes <= limit.limit_bytes * (1 - self._headroom)

    def _shrink(self, policy: MicroBatchPolicy, phase: str, failure: _RolledBackError) -> None:
        before = failure.micro_batch
        self._good_updates = 0
        self._recorder = None  # what there is room for may have changed
        after = policy.failed(before, samples=failure.samples, fitting_now=self._fitting_now())
        if after is None:
            limit = limits.find_limit(self._device, self._user_limit_bytes).limit_bytes
            raise NoFeasibleBatchError(
                f"Not even one sample fits in memory any more ({failure.diagnosis.detail}; the limit now is "
                f"{'unknown' if limit is None else format_bytes(limit)}). The model holds the last completed update. "
                "Free memory on the device, make the samples smaller, or use a smaller model.",
                needed_bytes=failure.diagnosis.requested_bytes,
                limit_bytes=limit,
            )
        self.recoveries.append(Recovery(self._updates, phase, before, after, failure.diagnosis.detail))
        steps = -(-failure.samples // after)
        logger.warning(
            "Out of memory in update %d, %s (%s): rolled back; micro-batch %d -> %d (%d accumulation steps); the same "
            "samples run again.",
            self._updates,
            phase,
            failure.diagnosis.detail,
            before,
            after,
            steps,
        )

    def _fitting_now(self) -> int | None:
        model = self._memory_model
        limit = limits.find_limit(self._device, self._user_limit_bytes).limit_bytes
        if model is None or limit is None or model.per_sample_bytes <= 0:
            return None
        return int((limit * (1 - self._headroom) - model.fixed_bytes) // model.per_sample_bytes)
