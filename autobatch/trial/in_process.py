"""Trials on the live model, in this process, that leave no trace.

Each trial runs what training will run: the accumulated step with its accumulators and the optimizer's update, or
Keras's plain step where one micro-batch is the whole effective batch. Everything that a step can touch is copied to
host memory before the first trial and put back by :meth:`LiveTrials.close`, bit for bit.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from autobatch import __version__
from autobatch.errors import AutobatchWarning
from autobatch.memory import limits, oom
from autobatch.records import Environment, Outcome, TrialRequest, TrialResult
from autobatch.train import inexact, keras_seams
from autobatch.train.recovery import CAUGHT
from autobatch.train.step import AccumulatedStep
from autobatch.trial.sample import Data, Sample
from autobatch.trial.snapshot import Snapshot, bytes_of
from autobatch.units import format_bytes

ENOUGH_SECONDS = 4.0
"""Once a trial's steps have taken this long, one timed repeat is precise enough."""


class LiveTrials:
    """A :class:`autobatch.trial.protocol.Trials` on a compiled model and its data.

    ``target_batch`` is None where only the largest micro-batch is wanted. ``user_limit_bytes`` counts as out of memory
    wherever a trial's peak exceeds it, whatever the device itself allows.
    """

    replicas = 1

    def __init__(
        self,
        model: Any,
        batches: Data,
        *,
        target_batch: int | None,
        user_limit_bytes: int | None,
        headroom: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._target_batch = target_batch
        self._user_limit_bytes = user_limit_bytes
        self._headroom = headroom
        self._clock = clock
        self._snapshots: list[Snapshot] = []
        self._saved: set[int] = set()
        self.device = limits.default_device()
        self._sample = Sample(batches)
        self.host_uses = batches.host_uses()
        self.step = self._make_step(model, batches.element_spec)
        keras_seams.build_on(model, self.step.structure.pack(self.step.structure.specs))
        if user_limit_bytes is not None and limits.peak_bytes(self.device) is None:
            warnings.warn(
                f"memory_limit cannot be held to: TensorFlow's allocator on {self.device} keeps no figures. Call "
                "autobatch.limit_memory before TensorFlow starts, or leave oneDNN on.",
                AutobatchWarning,
                stacklevel=4,
            )
        self.largest_useful = target_batch if batches.sample_limit is None else batches.sample_limit
        if target_batch is not None and self.largest_useful is not None:
            self.largest_useful = min(self.largest_useful, target_batch)
        self.model_name = str(getattr(model, "name", type(model).__name__))
        self.environment = self._look_around()
        self.fixed_bytes_hint: int | None = self._fixed_bytes()

    def _make_step(self, model: Any, element_spec: Any) -> AccumulatedStep:
        return AccumulatedStep(model, element_spec)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will differ from the full batch where gradients are accumulated; complete once a trial was run."""
        return inexact.differences(self._model, self.step.updating_optimizers, self.step.scalar_losses)

    def require_no_clock(self, max_seconds: float | None) -> None:
        """Refuse ``max_seconds`` where it cannot be held to; one process can."""

    def trace(self) -> None:
        """Trace the accumulated step without running it, so that :attr:`warnings` is complete without a trial."""
        try:
            self.step.prepare(whole=False)
        except CAUGHT as error:
            if not oom.diagnose(error).is_memory:
                raise  # what ran out of memory here will again in the first step, which recovers

    def _fixed_bytes(self) -> int:
        """A lower bound on every peak: what is held already, weights and slots among it, and the accumulators."""
        slots = sum(bytes_of(optimizer.variables) for optimizer in self.step.optimizers)
        held = limits.bytes_in_use(self.device) or 0
        return max(held, bytes_of(self._model.variables) + slots) + bytes_of(self._model.trainable_variables)

    def _look_around(self) -> Environment:
        limit = limits.find_limit(self.device, self._user_limit_bytes)
        budget = None if limit.limit_bytes is None else int(limit.limit_bytes * (1 - self._headroom))
        versions = (("autobatch", __version__), ("tensorflow", tf.__version__), ("keras", keras.__version__))
        return Environment(
            device=self.device,
            limit_bytes=limit.limit_bytes,
            limit_source=limit.source,
            budget_bytes=budget,
            headroom=self._headroom,
            precision=str(self._model.dtype_policy.name),
            jit_compile=bool(self._model.jit_compile),
            versions=(*versions, ("python", platform.python_version())),
        )

    def run(self, request: TrialRequest) -> TrialResult:
        """Run one size for real; what the user's own code raises is passed on."""
        if self._model.run_eagerly and not keras_seams.is_built(self._model):
            raise ValueError(
                "This model runs eagerly and is not built yet, so that its state before a trial cannot be kept. Build "
                "it first, by calling it on a batch or by model.build(input_shape); or give micro_batch, which skips "
                f"the search. Received: {type(self._model).__name__}"
            )
        whole = self._target_batch is not None and request.micro_batch >= self._target_batch
        try:
            return self._run(request, whole)
        except CAUGHT as error:
            diagnosis = oom.diagnose(error)
            if not diagnosis.is_memory:
                raise
            error.__traceback__ = None  # it keeps the failed step's tensors alive
        gc.collect()
        return TrialResult(
            request.micro_batch,
            Outcome.OUT_OF_MEMORY,
            requested_bytes=diagnosis.requested_bytes,
            detail=diagnosis.detail,
        )

    def _run(self, request: TrialRequest, whole: bool) -> TrialResult:
        micro_batch = request.micro_batch
        self.step.prepare(whole=whole)
        self._save()
        limits.reset_peak(self.device)
        timings = self._time_plain(request) if whole else self._time_accumulated(request)
        first_seconds, step_seconds, apply_seconds = timings
        peak = limits.peak_bytes(self.device)
        budget = self.environment.budget_bytes
        over = peak is not None and budget is not None and peak > budget
        detail = f"its peak of {format_bytes(peak or 0)} is over the budget" if over else ""
        return TrialResult(
            micro_batch,
            Outcome.OUT_OF_MEMORY if over else Outcome.FITS,
            peak_bytes=peak,
            step_seconds=step_seconds,
            apply_seconds=apply_seconds,
            first_step_seconds=first_seconds,
            detail=detail,
        )

    def _time_plain(self, request: TrialRequest) -> tuple[float, float, float]:
        data = self._data(request.micro_batch)
        first = self._seconds(lambda: self.step.plain(data))
        steps = [first]
        for _ in range(request.timed_steps if first < ENOUGH_SECONDS else 1):
            steps.append(self._seconds(lambda: self.step.plain(data)))
        return first, statistics.median(steps[1:]), 0.0

    def _time_accumulated(self, request: TrialRequest) -> tuple[float, float, float]:
        # Two micro-batches first, so that the second is added to accumulators that hold the first one's gradients.
        micro_batch = request.micro_batch
        two = self._data(2 * micro_batch)
        first = self._seconds(lambda: self.step.accumulate(two, micro_batch))
        self.step.apply()
        repeats = request.timed_steps if first < ENOUGH_SECONDS else 1
        one = self._data(micro_batch)
        steps = [self._seconds(lambda: self.step.accumulate(one, micro_batch)) for _ in range(repeats)]
        applies = [self._seconds(self.step.apply) for _ in range(repeats)]
        return first / 2, statistics.median(steps), statistics.median(applies)

    def _data(self, samples: int) -> Any:
        return self._sample.micro_batch(samples)

    def _seconds(self, call: Callable[[], Any]) -> float:
        start = self._clock()
        for part in tf.nest.flatten(call()):
            if tf.is_tensor(part):
                part.numpy()  # waits until the device is done
        if self.device.startswith("GPU"):
            tf.test.experimental.sync_devices()
        return self._clock() - start

    def _save(self) -> None:
        """Copy what was not copied before; called once everything is traced and nothing has run."""
        new = [variable for variable in self.step.variables if id(variable) not in self._saved]
        if new:
            self._snapshots.append(Snapshot.on_host(new))
            self._saved.update(id(variable) for variable in new)

    def close(self) -> None:
        """Put every variable back as it was before the first trial."""
        for snapshot in self._snapshots:
            snapshot.restore()
            snapshot.drop()
        self._snapshots = []
        self._saved = set()
        gc.collect()
