"""Timing of a trial's steps, with a record of what the first of them allocates."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf

from autobatch.allocation_trace import AllocationTrace
from autobatch.memory import allocations, limits
from autobatch.records import TrialRequest
from autobatch.recovery.keeper import Keeper, SnapshotPlace
from autobatch.recovery.out_of_memory import CAUGHT
from autobatch.step.compiled_step import CompiledStep
from autobatch.types import Tensor

ENOUGH_SECONDS = 0.4
"""Seconds of two steps from which on one timed repeat is precise enough, with these two as a second measurement. Three
repeats of such a step took as long as the first update of the training itself."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a trial, its peak before the update where that comes separately, and what was allocated.

    ``asked_peak_bytes`` is the peak by what was asked for; None where nothing was recorded.
    """

    first_seconds: float
    step_seconds: float
    apply_seconds: float
    sample_peak_bytes: int | None
    asked_peak_bytes: int | None
    allocations: AllocationTrace | None


class Holder(Protocol):
    """Holder of tensors that lie in memory beside a trial."""

    @property
    def tensors(self) -> list[Tensor]: ...


class Timing:
    """Timer of one model's steps.

    Args:
        batch_of: Makes a batch of the given number of samples on the host.
        holders: Holders of tensors that lie in memory beside a trial.
        clock: Returns seconds.
    """

    def __init__(
        self,
        step: CompiledStep,
        keeper: Keeper,
        batch_of: Callable[[int], Any],
        device: str,
        *,
        holders: Iterable[Holder],
        clock: Callable[[], float],
    ) -> None:
        self._step = step
        self._keeper = keeper
        self._batch_of = batch_of
        self._device = device
        self._holders = tuple(holders)
        self._clock = clock
        self._has_accumulated = False
        self.ran_beside_copies = False
        """True if the accumulated step tried last ran beside copies of the weights on the device."""

    def of_plain_step(self, request: TrialRequest, plain: Callable[[Any], Any]) -> Timed:
        """Time Keras's own step on one micro-batch, which is the whole effective batch."""
        with self._recorded(request) as recorded, self._undone_under_xla():
            data = self._batch_of(request.micro_batch)
            first = self.seconds(lambda: plain(data))
        steps = [self.seconds(lambda: plain(data))]
        if 2 * steps[0] < ENOUGH_SECONDS:
            steps += [self.seconds(lambda: plain(data)) for _ in range(request.timed_steps - 1)]
        return Timed(first, statistics.median(steps), 0.0, None, *recorded())

    @contextlib.contextmanager
    def _undone_under_xla(self) -> Iterator[None]:
        """Keep under XLA what training would keep, and put it back if the step fails.

        See :mod:`autobatch.recovery.keeper` for the reason.
        """
        if not self._step.model.jit_compile:
            yield
            return
        kept = self._keeper.take(whole=True, proven=False)
        try:
            yield
        except CAUGHT:
            kept.restore()
            raise
        finally:
            kept.drop()

    def of_accumulated_step(self, request: TrialRequest) -> Timed:
        """Time two micro-batches added up and their update, then repeats of one of each.

        There are ``request.timed_steps`` repeats, at most one where the first steps were slow. The first trial has one.
        """
        # Two micro-batches first, so that the second is added to accumulators that hold the first one's gradients.
        micro_batch = request.micro_batch
        with self._recorded(request) as recorded, self._beside_copies():
            two = self._batch_of(2 * micro_batch)
            first = self.seconds(lambda: self._step.accumulate(two, micro_batch))
            sample_peak = limits.peak_bytes(self._device)
            first_apply = self.seconds(self._step.apply)
        repeats = request.timed_steps
        is_first, is_slow = not self._has_accumulated, first >= ENOUGH_SECONDS
        if is_first or is_slow:
            # A graph's first run spends seconds on optimising it, so it is repeated once. Slow steps need no more.
            repeats = 1 if repeats or is_first else 0
        if self._step.model.jit_compile:
            repeats = max(1, repeats)  # the first steps were compiled as well, which is no time of a step
        self._has_accumulated = True
        one = self._batch_of(micro_batch)
        steps, applies = [], []
        in_turn = self._step.computes_between_updates(whole=False)  # its last update needs the batch
        for _ in range(repeats):
            steps.append(self.seconds(lambda: self._step.accumulate(one, micro_batch)))
            applies += [self.seconds(self._step.apply)] if in_turn else []
        applies += [] if in_turn else [self.seconds(self._step.apply) for _ in range(repeats)]
        step = statistics.median(steps or [first / 2])
        return Timed(
            first / 2,
            min(step, first / 2) if is_slow else step,  # one repeat may have been held up
            statistics.median(applies or [first_apply]),
            sample_peak,
            *recorded(),
        )

    @contextlib.contextmanager
    def _beside_copies(self) -> Iterator[None]:
        """Keep what training would keep, if the step goes on computing after its first update.

        Only then do the copies take memory while micro-batches run.
        """
        self.ran_beside_copies = False
        if not self._step.computes_between_updates(whole=False):
            yield
            return
        kept = self._keeper.take(whole=False, proven=False)
        self.ran_beside_copies = kept.weights_at is SnapshotPlace.DEVICE
        try:
            yield
        finally:
            kept.drop()

    @contextlib.contextmanager
    def _recorded(self, request: TrialRequest) -> Iterator[Callable[[], tuple[int | None, AllocationTrace | None]]]:
        """Record what the block allocates, if ``request`` asks for it.

        Once the block has ended, the function that is yielded returns the peak of what was asked for, and the record;
        both are None if no record was asked for.
        """
        if not request.record_allocations:
            yield lambda: (None, None)
            return
        touched = [*self._step.variables, *self._step.accumulators]
        weights = {tuple(variable.shape) for variable in touched if variable.shape.rank is not None}
        beside = [tensor for holder in self._holders for tensor in holder.tensors]
        with allocations.recording(self._device, [*touched, *beside]) as recording:
            yield lambda: (
                allocations.asked_peak_bytes(recording),
                allocations.trace_of(recording, request.micro_batch, weights),
            )

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the seconds that a call takes until the device is done."""
        start = self._clock()
        for part in tf.nest.flatten(call()):
            if tf.is_tensor(part):
                part.numpy()  # waits until the device is done
        if self._device.startswith("GPU"):
            tf.test.experimental.sync_devices()
        return self._clock() - start
