"""Repetition of a step in smaller micro-batches, after memory ran out and the step was undone.

Running and undoing a single step is done by :mod:`autobatch.recovery.transaction` on one device, and by
:mod:`autobatch.replicas.transaction` on several.
"""

from __future__ import annotations

import abc
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import tenacity

from autobatch.errors import NoFeasibleBatchError
from autobatch.handover.status import Doing, is_watched, note_doing
from autobatch.memory import limits
from autobatch.memory.other_users import explain_pressure
from autobatch.metrics.merged_logs import Logs
from autobatch.records import MemoryModel, Recovery
from autobatch.recovery.keeper import Keeper, SavedState
from autobatch.recovery.micro_batch_policy import MicroBatchPolicy
from autobatch.recovery.rolled_back import RolledBackError
from autobatch.recovery.sample_lengths import LengthRule
from autobatch.step import kept_steps
from autobatch.step.compiled_step import CompiledStep
from autobatch.tensors.batch_structure import Structure, UnevenSpec, rows_of
from autobatch.terminal import kept_aside, notices
from autobatch.types import Batch, ElementSpec, Variable
from autobatch.units import format_bytes, less_headroom

StepT = TypeVar("StepT", bound=CompiledStep)


class AbstractTransaction(abc.ABC, Generic[StepT]):
    """Steps of one training, on one device or several, each undone and run again if memory runs out.

    Args:
        step: the model's compiled steps.
        micro_batch: the largest size to use, proven or chosen.
        begin_at: the size to begin with; None begins with ``micro_batch``.
        effective_batch: samples in all updates but an epoch's last; None if batches may have any size.
        device: TensorFlow's name of the device, such as "GPU:0".
        memory_model: predicts the peak, to choose the next size after a failure.
        lengths: sizes the micro-batch by the length of the samples; None leaves it as it is.
        keeper: the keeper of the trials before, which knows their findings; None makes one.
        user_limit_bytes, headroom: as for ``fit``.
    """

    def __init__(
        self,
        step: StepT,
        micro_batch: int,
        *,
        device: str,
        begin_at: int | None = None,
        effective_batch: int | None = None,
        memory_model: MemoryModel | None = None,
        lengths: LengthRule | None = None,
        keeper: Keeper | None = None,
        user_limit_bytes: int | None = None,
        headroom: float = 0.0,
    ) -> None:
        self.recoveries: list[Recovery] = []
        one_shape = bool(step.model.jit_compile) and not step.model.run_eagerly
        self.policy = MicroBatchPolicy(micro_batch, begin_at=begin_at, one_shape=one_shape)
        self._validation_policy = MicroBatchPolicy(micro_batch, begin_at=begin_at, one_shape=one_shape)
        self._step = step
        self._keeper = keeper or Keeper(step, device, user_limit_bytes=user_limit_bytes, headroom=headroom)
        self._good_updates = 0
        self._device = device
        self._effective_batch = effective_batch
        self._memory_model = memory_model
        self._lengths = lengths or LengthRule(step.structure, None)
        self._user_limit_bytes = user_limit_bytes
        self._headroom = headroom
        self.told: Callable[[], list[float]] = list
        """Returns numbers that every process of the training gives to all in each update, beside what it must."""
        self.heard: list[float] = []
        """Sums over all processes of what each has told in the last update; empty where they tell nothing."""
        self._updates = 0
        self._policy_of_whole_elements = MicroBatchPolicy(1)
        self._is_outdated = False
        self._below = 0, 0

    @property
    def micro_batch(self) -> int:
        """Size of micro-batches now, in samples."""
        return self.policy.micro_batch * self._step.structure.samples_in_portion

    def release(self) -> None:
        """Let go of the memory that the steps hold between updates; their traces may be kept for the next training."""
        kept_steps.give_back(self._step)

    def renew(self) -> None:
        """Trace the step anew before the next update, with the model's optimizer, loss and trainable weights then."""
        self._is_outdated = True

    def renew_evaluation(self) -> None:
        """Trace the evaluation anew before the next validation batch."""
        self._step.evaluations = {}

    def _renew_now(self) -> None:
        self._is_outdated = False
        self._step.release_accumulators()
        kept_steps.forget_steps(self._step.model)
        kept_steps.begin_training(self._step.model)
        self._step = self._step.renewed()
        self._keeper.follow(self._step)
        self._good_updates = 0

    def follow(self, before: AbstractTransaction[StepT]) -> None:
        """Continue another transaction of the same training: take over its sizes, recoveries and count of updates.

        The other one's accumulators are released.
        """
        self.recoveries = before.recoveries
        self.policy = before.policy
        self._updates = before._updates
        before._step.release_accumulators()

    def as_plain(self) -> dict[str, Any]:
        """Return the count of updates, the sizes and what has failed as plain values, for :meth:`continue_from`."""
        return {
            "updates": self._updates,
            "good_updates": self._good_updates,
            "train": self.policy.as_plain(),
            "validation": self._validation_policy.as_plain(),
            "longest_factor": self._lengths.most,
            "recoveries": [dataclasses.astuple(recovery) for recovery in self.recoveries],
        }

    def continue_from(self, plain: dict[str, Any]) -> None:
        """Go on from the updates, sizes and failures of a transaction in an earlier process."""
        self._updates, self._good_updates = plain["updates"], plain["good_updates"]
        self.policy.continue_from(plain["train"])
        self._validation_policy.continue_from(plain["validation"])
        self._lengths.most = plain["longest_factor"]
        self.recoveries[:] = [Recovery(*values) for values in plain["recoveries"]]

    def begin_below(self, died_at: int, phase: str, why: str, *, samples: int) -> None:
        """Begin below a size at which the process died in this phase; grow back as after any failure.

        ``samples`` is the size of an effective batch.
        """
        each = self._step.structure.samples_in_portion
        policy = self.policy if phase == "update" else self._validation_policy
        before = policy.micro_batch
        after = policy.begin_below(max(1, died_at // each), samples=max(1, samples // each))
        self.recoveries.append(Recovery(self._updates, "restart", before * each, after * each, why))

    @property
    def updates(self) -> int:
        """Updates that were made, those of earlier processes included."""
        return self._updates

    @abc.abstractmethod
    def trace(self) -> None:
        """Trace the step of a full effective batch at the present size, so that :attr:`variables` is complete."""

    @property
    def variables(self) -> list[Variable]:
        """Variables that the steps traced so far can touch."""
        return self._step.variables

    @property
    def updated_variables(self) -> list[Variable]:
        """Variables that the optimizers' updates change, alike on all replicas."""
        return self._step.updated_variables

    @property
    def hidden_draws(self) -> list[str]:
        """Types of operations in the steps whose random numbers come from no variable, so that no backup holds them."""
        return self._step.hidden_draws

    def train(self, data: Batch) -> Logs:
        """Make one update with an effective batch, in smaller and smaller micro-batches if memory runs out.

        Raises:
            NoFeasibleBatchError: not even one sample fits; the model holds the last completed update.
            UpdateInterruptedError: memory ran out in the middle of an update whose weights were not kept.
        """
        if self._is_outdated or self._step.summaries.wants_another_writer():
            self._renew_now()
        samples = self._step.structure.portions_in(data)
        if samples is None:
            return self._train_apart(data)
        with self._step.summaries.opened():
            logs = self._run(data, samples, self._train_once, self.policy, "train", self._step.structure)
        self._updates += 1
        self._good_updates += 1
        before = self.policy.micro_batch
        self.policy.succeeded(self._samples_here(samples))
        if self.policy.micro_batch > before:
            self._good_updates = 0  # no update was made yet beside a micro-batch of this size
            self._tell_of_growth(before, samples)
        return logs

    def _tell_of_growth(self, before: int, samples: int) -> None:
        each, after = self._step.structure.samples_in_portion, self.policy.micro_batch
        steps = -(-self._samples_here(samples) // after)
        notices.tell(
            f"larger again from update {self._updates} on: micro-batch {before * each} -> {after * each} x {steps}",
            level=logging.INFO,
        )

    def evaluate(self, data: Batch, element_spec: ElementSpec) -> Logs:
        """Run ``test_step`` over one validation batch, of any size.

        It is cut as the training data are where its parts are in the same proportions. Otherwise it is run whole if its
        parts differ in their number of rows.
        """
        step = self._step.evaluation_for(self._cut_like_training(data, element_spec))
        samples = step.structure.count(data)
        whole = step.structure.takes_elements_whole
        policy = self._policy_of_whole_elements if whole else self._validation_policy

        def once(data: Batch, samples: int) -> Logs:
            return self._evaluate_once(step, data, samples)

        with step.summaries.opened():
            logs = self._run(data, samples, once, policy, "validation", step.structure)
        policy.succeeded(self._samples_here(samples))
        return logs

    def _cut_like_training(self, data: Batch, element_spec: ElementSpec) -> Any:
        rows = rows_of(data)
        if len(set(rows)) <= 1 and None not in rows:
            return element_spec
        portion = self._step.structure.rows
        if portion is not None and len(portion) == len(rows):
            spec = UnevenSpec(element_spec, portion)
            if Structure(spec).portions_in(data):
                return spec
        return UnevenSpec(element_spec, None)

    @abc.abstractmethod
    def _train_apart(self, data: Batch) -> Logs:
        """Make one update with an element that is not of the proportions of the others, or refuse it."""

    def _samples_here(self, samples: int) -> int:
        """Return the number of a step's samples that are cut into micro-batches together."""
        return samples

    def _run(
        self,
        data: Batch,
        samples: int,
        once: Callable[[Any, int], Logs],
        policy: MicroBatchPolicy,
        phase: str,
        structure: Structure,
    ) -> Logs:
        with kept_aside.window() as window:
            self._note(policy, phase, structure, samples)
            try:
                logs = once(data, samples)
            except RolledBackError as first:
                failure: RolledBackError = first
            else:
                note_doing(Doing.ELSE)
                return logs
            window.failure_dealt_with()
            self._shrink(policy, phase, failure, structure)
            logs = self._retrying(policy, phase, structure)(once, data, samples)
            note_doing(Doing.ELSE)
            return logs

    def _note(self, policy: MicroBatchPolicy, phase: str, structure: Structure, samples: int) -> None:
        """Note what begins, for who starts this process again should it die."""
        if not is_watched():
            return
        size = policy.micro_batch
        if self._below[0] != size:
            self._below = size, policy.below(size, samples=max(self._effective_batch or 1, samples))
        doing = Doing.UPDATE if phase == "train" else Doing.VALIDATION
        note_doing(doing, *(size * structure.samples_in_portion for size in self._below))

    def _retrying(self, policy: MicroBatchPolicy, phase: str, structure: Structure) -> tenacity.Retrying:
        """Return what runs a step again, smaller each time, until it fits."""

        def shrink(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome is not None else None
            if isinstance(error, RolledBackError):
                self._shrink(policy, phase, error, structure)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RolledBackError),
            stop=tenacity.stop_never,  # _shrink ends it: sizes fall at every try, down to 1
            wait=tenacity.wait_none(),  # the allocator has waited already
            before_sleep=shrink,
            reraise=True,
        )

    @abc.abstractmethod
    def _train_once(self, data: Batch, samples: int) -> Logs:
        """Make one update, or leave everything as before.

        Raises:
            RolledBackError: memory ran out.
        """

    @abc.abstractmethod
    def _evaluate_once(self, step: StepT, data: Batch, samples: int) -> Logs:
        """Run a validation batch, or leave everything as before.

        Raises:
            RolledBackError: memory ran out.
        """

    @staticmethod
    def roll_back(kept: Iterable[SavedState]) -> None:
        gc.collect()
        for each in kept:
            each.restore()

    def _shrink(self, policy: MicroBatchPolicy, phase: str, failure: RolledBackError, structure: Structure) -> None:
        before = failure.micro_batch
        self._good_updates = 0
        self._keeper.forget()
        self._step.findings_kept.clear()  # what trials found no longer holds
        after = self._smaller(policy, failure)
        if after is None:
            limit = limits.find_limit(self._device, self._user_limit_bytes).limit_bytes
            known = "unknown" if limit is None else format_bytes(limit)
            raise NoFeasibleBatchError(
                f"Not even {structure.smallest_in_words} fits in memory any more ({failure.diagnosis.detail}; the "
                f"limit now is {known}). The model holds the last completed update. "
                "Free memory on the device, make the samples smaller, or use a smaller model."
                + "".join(f" {cause}" for cause in explain_pressure(self._device)),
                needed_bytes=failure.diagnosis.requested_bytes,
                limit_bytes=limit,
            )
        steps = -(-failure.samples // after)
        each = structure.samples_in_portion
        before, after = before * each, after * each
        self.recoveries.append(Recovery(self._updates, phase, before, after, failure.diagnosis.detail))
        self._note(policy, phase, structure, failure.samples)
        change = f"micro-batch {before} -> {after} ({steps} accumulation steps)"
        in_short = f"micro-batch {before} -> {after} x {steps}"
        if failure.beside_copies:
            change = f"micro-batch {before} as before, without a copy of the weights on the device"
            in_short = f"micro-batch {before} x {steps}, without a copy of the weights"
        notices.tell(
            f"out of memory in update {self._updates}{'' if phase == 'train' else f', {phase}'}: {in_short}",
            log=f"Out of memory in update {self._updates}, {phase} ({failure.diagnosis.detail}): rolled back; "
            f"{change}; the same samples run again.",
            level=logging.WARNING,
        )

    def _smaller(self, policy: MicroBatchPolicy, failure: RolledBackError) -> int | None:
        """Return the size to run the same samples with again; None if one sample failed."""
        before, ratio, samples = failure.micro_batch, failure.length_ratio, failure.samples
        if failure.beside_copies:
            self._keeper.ran_out_beside_copies = True
            return before
        if before > policy.micro_batch:  # a size grown for short samples: the one that trials proved is not in doubt
            self._lengths.failed(before / policy.micro_batch)
            return self._lengths.sized(policy.micro_batch, ratio, samples)
        if ratio <= 1:
            return policy.failed(before, samples=samples, fitting_now=self._fitting_now())
        if before <= 1:
            return None
        # The policy counts sizes at the length of the trials. Several of them may give the same size here.
        smaller = policy.failed(policy.micro_batch, samples=samples, fitting_now=None)
        while smaller is not None and min(samples, self._lengths.sized(smaller, ratio, samples)) >= before:
            smaller = policy.shrink()
        return None if smaller is None else min(samples, self._lengths.sized(smaller, ratio, samples))

    def _fitting_now(self) -> int | None:
        model = self._memory_model
        limit = limits.find_limit(self._device, self._user_limit_bytes).limit_bytes
        if model is None or limit is None or model.per_sample_bytes <= 0:
            return None
        samples = int((less_headroom(limit, self._headroom) - model.fixed_bytes) // model.per_sample_bytes)
        return samples // self._step.structure.samples_in_portion


AnyTransaction = AbstractTransaction[Any]
"""Transaction of any kind of step."""
