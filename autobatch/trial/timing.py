"""Time the steps of a trial, and record what the first of them allocates."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.memory import allocations, limits
from autobatch.records import AllocationTrace, TrialRequest
from autobatch.recovery.keeper import Keeper
from autobatch.recovery.out_of_memory import CAUGHT
from autobatch.step.compiled_step import CompiledStep

ENOUGH_SECONDS = 4.0
"""Once a trial's steps have taken this long, one timed repeat is precise enough."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A trial's seconds, the peak before the update where the two come one after the other, and what was allocated."""

    first_seconds: float
    step_seconds: float
    apply_seconds: float
    sample_peak_bytes: int | None
    allocations: AllocationTrace | None


class Timing:
    """Times one model's steps.

    Args:
        batch_of: makes a batch of so many samples on the host.
        clock: returns seconds.
    """

    def __init__(
        self,
        step: CompiledStep,
        keeper: Keeper,
        batch_of: Callable[[int], Any],
        device: str,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._step = step
        self._keeper = keeper
        self._batch_of = batch_of
        self._device = device
        self._clock = clock
        self._has_accumulated = False

    def of_plain_step(self, request: TrialRequest, plain: Callable[[Any], Any]) -> Timed:
        """Time Keras's own step on one micro-batch, which is the whole effective batch."""
        with self._recorded(request) as recorded, self._undone_under_xla():
            data = self._batch_of(request.micro_batch)
            first = self.seconds(lambda: plain(data))
        repeats = request.timed_steps if first < ENOUGH_SECONDS else 1
        steps = [self.seconds(lambda: plain(data)) for _ in range(max(1, repeats))]
        return Timed(first, statistics.median(steps), 0.0, None, recorded())

    @contextlib.contextmanager
    def _undone_under_xla(self) -> Iterator[None]:
        """Keep under XLA what training would keep, and put it back at once: see :mod:`autobatch.recovery.keeper`."""
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
        """Time two micro-batches that are added up and their update, then one of each again as often as is asked."""
        # Two micro-batches first, so that the second is added to accumulators that hold the first one's gradients.
        micro_batch = request.micro_batch
        with self._recorded(request) as recorded:
            two = self._batch_of(2 * micro_batch)
            first = self.seconds(lambda: self._step.accumulate(two, micro_batch))
            sample_peak = limits.peak_bytes(self._device)
            first_apply = self.seconds(self._step.apply)
        repeats = request.timed_steps
        if not self._has_accumulated or first >= ENOUGH_SECONDS:
            # A graph's very first run optimises it, for seconds; and slow steps are measured well enough by one.
            repeats = 1 if repeats or not self._has_accumulated else 0
        self._has_accumulated = True
        one = self._batch_of(micro_batch)
        steps = [self.seconds(lambda: self._step.accumulate(one, micro_batch)) for _ in range(repeats)]
        applies = [self.seconds(self._step.apply) for _ in range(repeats)]
        return Timed(
            first / 2,
            statistics.median(steps or [first / 2]),
            statistics.median(applies or [first_apply]),
            sample_peak,
            recorded(),
        )

    @contextlib.contextmanager
    def _recorded(self, request: TrialRequest) -> Iterator[Callable[[], AllocationTrace | None]]:
        """What the block allocates, if that is asked for; to be called for once the block has ended."""
        if not request.record_allocations:
            yield lambda: None
            return
        touched = [*self._step.variables, *self._step.accumulators]
        weights = {tuple(variable.shape) for variable in touched if variable.shape.rank is not None}
        with allocations.recording(self._device, touched) as recording:
            yield lambda: allocations.trace_of(recording, request.micro_batch, weights)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the seconds that a call takes until the device is done."""
        start = self._clock()
        for part in tf.nest.flatten(call()):
            if tf.is_tensor(part):
                part.numpy()  # waits until the device is done
        if self._device.startswith("GPU"):
            tf.test.experimental.sync_devices()
        return self._clock() - start
