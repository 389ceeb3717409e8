"""Trials on all replicas of all workers at once, each with the micro-batch asked for.

Every worker runs the same search, which is deterministic. Each trial's result is agreed on: the highest peak, the
longest time, the worst outcome. So all workers ask for the same sizes in the same order. The smallest device decides
for all.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable
from typing import Any

from autobatch.memory import limits, oom
from autobatch.records import Environment, Outcome, Report, TrialRequest, TrialResult
from autobatch.replicas.agreement import SingleProcess
from autobatch.replicas.keeper import ReplicatedKeeper
from autobatch.replicas.lockstep import Phase, run_in_lockstep
from autobatch.replicas.step import ReplicatedStep
from autobatch.seams import strategies
from autobatch.trial.live_trials import LiveTrials
from autobatch.trial.timing import ENOUGH_SECONDS
from autobatch.trial.worst_case import Data
from autobatch.types import ElementSpec, Model
from autobatch.units import format_bytes, format_seconds, headroom_share, less_headroom


class _OutOfMemoryError(Exception):
    """Memory ran out on some worker in a trial."""

    def __init__(self, diagnosis: oom.Diagnosis) -> None:
        super().__init__(diagnosis.detail)
        self.diagnosis = diagnosis


class ReplicatedTrials(LiveTrials):
    """A :class:`autobatch.trial.protocol.Trials` on a model made under a strategy.

    Sizes are those of one replica. ``target_batch`` counts the samples of all; None where only the largest micro-batch
    is wanted.
    """

    step: ReplicatedStep

    def __init__(
        self, model: Model, batches: Data, *, agreement: SingleProcess, target_batch: int | None, **options: Any
    ) -> None:
        if batches.structure.takes_elements_whole:
            raise ValueError(
                "The replicas of a strategy share each effective batch, and the elements of this dataset cannot be "
                "cut. Train on one device, or make elements whose rows are samples, as many in each part. Received: "
                f"{batches.structure.element_spec}"
            )
        self._agreement = agreement
        strategy = strategies.strategy_of(model)
        self.replicas = int(strategy.num_replicas_in_sync)
        self._devices = strategies.devices_of(strategy)
        self._trials_run = 0
        share = None if target_batch is None else -(-target_batch // self.replicas)
        super().__init__(model, batches, target_batch=share, **options)
        if batches.sample_limit is not None:
            most = -(-batches.sample_limit // self.replicas)
            self.largest_useful = most if share is None else min(most, share)
        rows = self._agree([float(self.fixed_bytes_hint or 0)], "the beginning of the search")
        self.fixed_bytes_hint = int(rows.max())

    def _make_step(
        self, model: Model, element_spec: ElementSpec, effective_batch: int | None, every_batch: int | None
    ) -> ReplicatedStep:
        return ReplicatedStep(model, element_spec)

    def _prepare(self, micro_batch: int) -> None:
        self.step.prepare()

    def size_in_training(self, micro_batch: int) -> int:
        return micro_batch

    def _make_keeper(self) -> ReplicatedKeeper:
        limit, share = self._user_limit_bytes, self._headroom
        return ReplicatedKeeper(self.step, self._agreement, user_limit_bytes=limit, headroom=share)

    def estimate_sample(self) -> None:
        """Return None: workers must run the same trials, and a trace may differ from one worker to the other."""

    def trace_plain(self) -> None:
        """Trace the accumulated step: replicas run no other."""
        self.trace(1)

    def known_report(self) -> Report | None:
        """Return what an earlier search has found, if all workers know the same: else they would run other trials."""
        known = super().known_report()
        size = -1.0 if known is None or known.plan is None else float(known.plan.micro_batch)
        rows = self._agree([size], "what is known of earlier searches")
        return known if bool((rows == size).all()) else None

    def require_no_clock(self, max_seconds: float | None) -> None:
        """Refuse a search by the clock on several workers: they would not stop at the same trial.

        Raises:
            ValueError: ``max_seconds`` is given, and there are several workers.
        """
        if max_seconds is not None and self._agreement.count > 1:
            raise ValueError(
                "max_seconds is not supported under several workers, whose clocks would end the search at different "
                f"trials: use max_trials. Received: max_seconds={max_seconds!r}"
            )

    def _agree(self, numbers: list[float], what: str) -> Any:
        return run_in_lockstep(self._agreement, lambda: numbers, Phase.BEGIN, what, {}).rows

    def _look_around(self) -> Environment:
        """Return the environment of the smallest device of all workers."""
        found = [
            (limit.limit_bytes, device, limit.source)
            for device in self._devices
            if (limit := limits.find_limit(device, self._user_limit_bytes)).limit_bytes is not None
        ]
        own = super()._look_around()
        smallest, device, source = min(found, default=(None, self._devices[0], own.limit_source))
        rows = self._agree([-1.0 if smallest is None else float(smallest)], "the limits of memory")
        known = [row for row in rows[:, 0] if row >= 0]
        limit_bytes = int(min(known)) if known else None
        if limit_bytes is not None and (smallest is None or limit_bytes < smallest):
            source = f"the smallest of {self._agreement.count} workers"
        return dataclasses.replace(
            own,
            device=f"{device}, the smallest of {self.replicas} replicas",
            limit_bytes=limit_bytes,
            limit_source=source,
            budget_bytes=None if limit_bytes is None else less_headroom(limit_bytes, self._headroom),
            headroom=headroom_share(limit_bytes, self._headroom),
        )

    def _run_size(self, request: TrialRequest) -> TrialResult:
        self._trials_run += 1
        try:
            return self._run_on_all(request)
        except _OutOfMemoryError as failure:
            diagnosis = failure.diagnosis
        gc.collect()
        return TrialResult(
            request.micro_batch,
            Outcome.OUT_OF_MEMORY,
            requested_bytes=diagnosis.requested_bytes,
            detail=diagnosis.detail,
        )

    def _run_on_all(self, request: TrialRequest) -> TrialResult:
        micro_batch, here = request.micro_batch, len(self._devices)

        def first_two() -> float:
            self.step.prepare()
            self._require_cuttable()
            self._save()
            self._pipeline.hold(2 * micro_batch * here, self.step.traced.held_sample_bytes)
            for device in self._devices:
                limits.reset_peak(device)
            # Two micro-batches each, so that the second is added to accumulators that hold the first one's gradients.
            two = self.batch_of(2 * micro_batch * here)
            return self._timing.seconds(lambda: self.step.accumulate(two, micro_batch))

        first = self._longest(first_two, micro_batch)
        first_apply = self._longest(self._apply_seconds, micro_batch)
        one = self.batch_of(micro_batch * here)
        repeats = request.timed_steps if first < ENOUGH_SECONDS else min(1, request.timed_steps)
        steps = [
            self._longest(lambda: self._timing.seconds(lambda: self.step.accumulate(one, micro_batch)), micro_batch)
            for _ in range(repeats)
        ]
        applies = [self._longest(self._apply_seconds, micro_batch) for _ in range(repeats)]
        found = {device: limits.peak_bytes(device) for device in self._devices}
        peaks = {device: peak for device, peak in found.items() if peak is not None}
        highest = self._largest(float(max(peaks.values(), default=-1)), micro_batch)
        budget = self.environment.budget_bytes
        peak = None if highest < 0 else int(highest)
        over = peak is not None and budget is not None and peak > budget
        self._any_ran = True
        told = self._of_each(peaks, micro_batches=1 if steps else 2)
        return TrialResult(
            micro_batch,
            Outcome.OUT_OF_MEMORY if over else Outcome.FITS,
            peak_bytes=peak,
            step_seconds=statistics.median(steps or [first / 2]),
            apply_seconds=statistics.median(applies or [first_apply]),
            first_step_seconds=first / 2,
            detail=f"its peak of {format_bytes(highest)} is over the budget" if over else told,
        )

    def _of_each(self, peaks: dict[str, int], micro_batches: int) -> str:
        """Return the peaks and times of this process's replicas in words, "" if it has only one.

        ``micro_batches`` is the count that each replica ran last.
        """
        if len(self._devices) < 2:
            return ""
        parts = [f"{format_bytes(peak)} on {device}" for device, peak in peaks.items()]
        told = [f"peaks: {', '.join(parts)}"] if parts else []
        seconds = dict(zip(self._devices, (self.step.replica_seconds.numpy() / micro_batches).tolist(), strict=True))
        slowest = max(seconds, key=lambda device: seconds[device])
        each = ", ".join(f"{format_seconds(taken)} on {device}" for device, taken in seconds.items())
        return "; ".join([*told, f"a micro-batch: {each}; the slowest is {slowest}"])

    def _apply_seconds(self) -> float:
        with self._agreement.waiting(f"trial {self._trials_run}"):
            return self._timing.seconds(self.step.apply)

    def _largest(self, number: float, micro_batch: int) -> float:
        return self._longest(lambda: number, micro_batch)

    def _longest(self, work: Callable[[], float], micro_batch: int) -> float:
        """Return the largest number that the work gives on any worker.

        Raises:
            _OutOfMemoryError: Memory ran out on a worker.
        """
        same = {"micro-batch": float(micro_batch)}
        what = f"trial {self._trials_run}"
        outcome = run_in_lockstep(self._agreement, lambda: [work()], Phase.TRIAL, what, same)
        if outcome.diagnosis is not None:
            raise _OutOfMemoryError(outcome.diagnosis)
        return float(outcome.rows.max())
