"""Trials on the live model, in this process, that leave no trace.

Each trial runs what training will run: the accumulated step with its accumulators and the optimizer's update. Where one
micro-batch is the whole effective batch, that is Keras's plain step. Everything that a step can touch is copied to host
memory before the first trial, and put back by :meth:`LiveTrials.close`, bit for bit.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tensorflow as tf

from autobatch.differences import difference, rules
from autobatch.errors import CannotBeCutError, warn
from autobatch.graphs import sample_bytes
from autobatch.handover.causes import Death
from autobatch.handover.status import Doing, note_doing
from autobatch.memory import arena, limits
from autobatch.records import (
    Environment,
    Limit,
    Outcome,
    Report,
    SampleEstimate,
    TrialRequest,
    TrialResult,
)
from autobatch.recovery.keeper import Keeper
from autobatch.recovery.out_of_memory import CAUGHT, memory_failure
from autobatch.recovery.sample_lengths import LengthRule
from autobatch.seams import models
from autobatch.step import kept_steps
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.step.compiled_step import CompiledStep
from autobatch.step.fixed_size import SizeWantedError
from autobatch.tensors.batch_structure import Structure
from autobatch.tensors.snapshots import Snapshot
from autobatch.tensors.variables import bytes_of
from autobatch.trial import known_reports, other_processes, surroundings
from autobatch.trial.beside_copies import BesideCopies
from autobatch.trial.content_digest import content_digest, surroundings_of
from autobatch.trial.laid_anew import lay_anew
from autobatch.trial.timing import Timing
from autobatch.trial.waiting_batches import WaitingBatches
from autobatch.trial.worst_case import Data, WorstCaseSample
from autobatch.types import ElementSpec, Model
from autobatch.units import format_bytes


class LiveTrials:
    """A :class:`autobatch.trial.protocol.Trials` on a compiled model and its data.

    ``target_batch`` is None where only the largest micro-batch is wanted. A trial whose peak exceeds
    ``user_limit_bytes`` counts as out of memory, whatever the device itself allows.
    """

    replicas = 1
    notes: tuple[str, ...] = ()  # they are warned of at once
    step: CompiledStep
    died_at: Death | None = None
    """Death of an earlier process in a trial: sizes above half of its ``micro_batch`` count as out of memory."""

    def __init__(
        self,
        model: Model,
        batches: Data,
        *,
        target_batch: int | None,
        user_limit_bytes: int | None,
        headroom: float,
        clock: Callable[[], float] = time.perf_counter,
        find_limit: Callable[[str, int | None], Limit] = limits.find_limit,
        patience_seconds: float = other_processes.PATIENCE_SECONDS,
    ) -> None:
        if batches.structure.takes_elements_whole:
            target_batch = 1  # there is nothing to search for
        self._has_elements = batches.has_elements
        self._model = model
        self._target_batch = target_batch
        self._user_limit_bytes = user_limit_bytes
        self._headroom = headroom
        self._find_limit = find_limit
        self._patience_seconds = patience_seconds
        self._snapshots: list[Snapshot] = []
        self._saved: set[int] = set()
        self._content: tuple[int, str] | None = None
        self._any_ran = False
        self.device = limits.default_device()
        if self.device.startswith("CPU"):
            arena.reserve_in_one_piece()
        self._sample = WorstCaseSample(batches)
        self._pipeline = WaitingBatches(batches, self.device, target_batch=target_batch)
        self.host_uses = batches.host_uses()
        spec = batches.element_spec
        every = batches.samples_in_each if target_batch in (None, batches.samples_in_each) else None
        make_step = functools.partial(self._make_step, model, spec, target_batch, every)
        self.step = kept_steps.borrow_step(model, spec, (target_batch, every), make_step)
        self.step.on_traced = lambda: None
        self.step.on_optimizer_found = self._save
        self.keeper = self._make_keeper()
        holders = self._pipeline, self._sample
        self._timing = Timing(self.step, self.keeper, self.batch_of, self.device, holders=holders, clock=clock)
        self._copies = BesideCopies(self.step, self.keeper, self._timing, self.device)
        models.build_on(model, self.step.structure.element_spec)
        if user_limit_bytes is not None and limits.peak_bytes(self.device) is None:
            warn(
                f"memory_limit cannot be held to: TensorFlow's allocator on {self.device} keeps no figures. Call "
                "autobatch.limit_memory before TensorFlow starts, or leave oneDNN on.",
            )
        self.largest_useful = target_batch if batches.sample_limit is None else batches.sample_limit
        if target_batch is not None and self.largest_useful is not None:
            self.largest_useful = min(self.largest_useful, target_batch)
        self.samples_in_portion = batches.structure.samples_in_portion
        self.takes_elements_whole = batches.structure.takes_elements_whole
        self.model_name = str(getattr(model, "name", type(model).__name__))
        self.environment = self._look_around()
        self.fixed_bytes_hint: int | None = self._fixed_bytes()

    def _make_step(
        self, model: Model, element_spec: ElementSpec, effective_batch: int | None, every_batch: int | None
    ) -> CompiledStep:
        return AccumulatedStep(model, element_spec, effective_batch=effective_batch, every_batch=every_batch)

    def _prepare(self, micro_batch: int) -> None:
        self._on_one_device.prepare(samples=self._target_batch, micro_batch=micro_batch)

    def size_in_training(self, micro_batch: int) -> int:
        """Return the size that training cuts effective batches by, where ``micro_batch`` is planned.

        It is a smaller one where the model's code wants micro-batches of one size, and that cannot cut all alike.
        """
        target = self._target_batch
        return micro_batch if target is None else self._on_one_device.fitting_size(target, micro_batch)

    @property
    def _on_one_device(self) -> AccumulatedStep:
        assert isinstance(self.step, AccumulatedStep)
        return self.step

    def _make_keeper(self) -> Keeper:
        return Keeper(self.step, self.device, user_limit_bytes=self._user_limit_bytes, headroom=self._headroom)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Differences from the full batch where gradients are accumulated; complete once a trial has run."""
        return rules.differences(
            self._model,
            self.step.updating_optimizers,
            self.step.traced,
            tables_kept_as_rows=self.step.tables_kept_as_rows,
            written=self.step.variables_written_by_micro_steps,
        )

    def length_rule(self, report: Report, structure: Structure | None = None) -> LengthRule:
        """Return the rule by which training sizes micro-batches of samples shorter or longer than the trials'.

        ``structure`` shows which dimensions vary, where more of them do than in the data that the trials saw.
        """
        return LengthRule.after_search(structure or self._sample.structure, lambda: self._sample.leaves, report)

    @property
    def content(self) -> str:
        """Digest of model, data, optimizer and loss, of the device's name, and of the limits that somebody set."""
        # Only what the trials build changes it.
        variables = len(self._model.variables)
        if self._content is None or self._content[0] != variables:
            self._content = variables, self._digest()
        return self._content[1]

    def _digest(self) -> str:
        set_limits = surroundings_of(self.device, self._user_limit_bytes)
        return content_digest(self._model, self._sample.describe(), set_limits)

    def require_no_clock(self, max_seconds: float | None) -> None:
        """Refuse ``max_seconds`` where it cannot be kept to; a single process can keep to it."""

    def trace(self, micro_batch: int) -> None:
        """Trace the accumulated step without running it, so that :attr:`warnings` is complete without a trial.

        Some differences show only in the first step of a model that runs eagerly; they are warned of then.
        """
        try:
            self._prepare(micro_batch)
        except CAUGHT as error:
            memory_failure(error)  # what ran out of memory here will again in the first step, which recovers
        self._require_cuttable()
        if self._model.run_eagerly:
            known = self.warnings
            self.step.on_traced = lambda: self._say_what_else_differs(known)

    def trace_plain(self) -> None:
        """Trace Keras's own step, which training will need, to see whether batches are what they seem.

        Raises:
            CannotBeCutError: they can be neither cut nor joined.
        """
        try:
            self._on_one_device.prepare(whole=True, samples=self._target_batch)
        except CAUGHT as error:
            memory_failure(error)
        self._require_cuttable()

    def _require_cuttable(self) -> None:
        if self.step.cannot_be_cut and self._has_elements:
            raise CannotBeCutError(self.step.cannot_be_cut)

    def _say_what_else_differs(self, known: tuple[str, ...]) -> None:
        self.step.on_traced = lambda: None
        found = [sentence for sentence in self.warnings if sentence not in known]
        if found:
            # No report holds these, so the warning names all of them.
            clauses = "; ".join(difference.clause_of(sentence) for sentence in found)
            warn(
                f"The first micro-batch shows what else differs from the full batch: {clauses}. "
                f"See {difference.page_of(found[0])}.",
            )

    def estimate_sample(self) -> SampleEstimate | None:
        """Return what a sample needs, by the traced step; None where it is not traced or cannot be estimated.

        An error that the user's own code raises in the trace is passed on.
        """
        if self._model.run_eagerly or self._sample.structure.takes_elements_whole:
            return None
        try:
            graph = self._on_one_device.micro_graph
        except CAUGHT as error:
            memory_failure(error)  # the first trial will run out of memory as well
            return None
        except SizeWantedError:
            return None  # the first trial has a size
        self._require_cuttable()
        if graph is None:
            return None
        on_cpu = self.device.startswith("CPU")
        return sample_bytes.of_graph(graph, on_cpu=on_cpu, is_compiled=bool(self._model.jit_compile))

    def _fixed_bytes(self) -> int:
        """Return a lower bound on every peak.

        It is what is held already, or weights and slots if they are more, and the accumulators.
        """
        held = (limits.bytes_in_use(self.device) or 0) + self._pipeline.least_bytes
        return max(held, self._own_bytes()) + self.step.least_accumulator_bytes

    def _own_bytes(self) -> int:
        """Return the bytes of the model's variables and the optimizers' slots, as far as they exist."""
        slots = sum(bytes_of(optimizer.variables) for optimizer in self.step.optimizers)
        return bytes_of(self._model.variables) + slots

    def _look_around(self) -> Environment:
        return surroundings.environment_of(
            self._model, self.device, self._limit_now(), headroom=self._headroom, own_bytes=self._own_bytes()
        )

    def run(self, request: TrialRequest) -> TrialResult:
        """Run one size for real; an error that the user's own code raises is passed on."""
        size, died_at = request.micro_batch * self.samples_in_portion, self.died_at
        if died_at is not None and size > (died_at.micro_batch or size) // 2:  # none, if it died at one sample
            detail = f"not run: an earlier process died in a trial of {died_at.micro_batch} ({died_at.words})"
            return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY, detail=detail)
        note_doing(Doing.TRIAL, size)
        try:
            return self._run_size(request)
        finally:
            note_doing(Doing.ELSE)

    def _run_size(self, request: TrialRequest) -> TrialResult:
        if self._model.run_eagerly and not models.is_built(self._model):
            raise ValueError(
                "This model runs eagerly and is not built yet, so that its state before a trial cannot be kept. Build "
                "it first, by calling it on a batch or by model.build(input_shape); or give micro_batch, which skips "
                f"the search. Received: {type(self._model).__name__}"
            )
        whole = self._target_batch is not None and request.micro_batch >= self._target_batch
        before = self._limit_now()
        result = self._run_or_run_out(request, whole)
        if result.fits or result.peak_bytes is not None:
            return result  # a peak over the budget is this process's own
        taken = other_processes.taken_since(before, self._limit_now, requested_bytes=result.requested_bytes)
        if taken is None:
            return result
        if not other_processes.wait_until_back(before, self._limit_now, patience_seconds=self._patience_seconds):
            return replace(result, detail=f"{result.detail} ({taken}, and did not give it back)")
        return replace(self._run_or_run_out(request, whole), retried=True)

    def _limit_now(self) -> Limit:
        return self._find_limit(self.device, self._user_limit_bytes)

    def _run_or_run_out(self, request: TrialRequest, whole: bool) -> TrialResult:
        try:
            return self._run(request, whole)
        except CAUGHT as error:
            if not whole:
                self._on_one_device.explain(error, 2 * request.micro_batch, request.micro_batch)
            diagnosis = memory_failure(error)
        gc.collect()
        if self._copies.given_up(whole):
            return self._run_or_run_out(request, whole)
        return TrialResult(
            request.micro_batch,
            Outcome.OUT_OF_MEMORY,
            requested_bytes=diagnosis.requested_bytes,
            detail=diagnosis.detail,
        )

    def _run(self, request: TrialRequest, whole: bool) -> TrialResult:
        samples = request.micro_batch * (1 if whole else 2)
        if self._on_one_device.prepare(whole=whole, samples=samples, micro_batch=request.micro_batch):
            self.keeper.forget()
        self._require_cuttable()
        self._save()
        lay_anew((*self.step.variables, *self.step.accumulators), self.device)
        for_metrics = 0 if whole else self.step.traced.held_sample_bytes
        self._sample.read()  # before it is seen what is held
        self._pipeline.hold(samples, for_metrics)
        limits.reset_peak(self.device)
        held = limits.bytes_in_use(self.device)
        timed = (
            self._timing.of_plain_step(request, self._on_one_device.plain)
            if whole
            else self._timing.of_accumulated_step(request)
        )
        allocated = limits.peak_bytes(self.device)
        # A chunk may be larger than what was asked for, where the allocator had no smaller one: that is no need.
        peak = allocated if timed.asked_peak_bytes is None else min(timed.asked_peak_bytes, allocated or sys.maxsize)
        sample_peak = timed.sample_peak_bytes
        over = self._is_over(peak)
        self._any_ran = True
        if over and self._copies.given_up(whole):
            return self._run(request, whole)
        if not over:
            plain = functools.partial(self._on_one_device.plain, self.batch_of(request.micro_batch)) if whole else None
            self._copies.try_update(plain, self._is_over)
        return TrialResult(
            request.micro_batch,
            Outcome.OUT_OF_MEMORY if over else Outcome.FITS,
            peak_bytes=peak,
            step_seconds=timed.step_seconds,
            apply_seconds=timed.apply_seconds,
            first_step_seconds=timed.first_seconds,
            detail=f"its peak of {format_bytes(peak or 0)} is over the budget" if over else "",
            sample_peak_bytes=None if sample_peak is None else min(sample_peak, peak or sample_peak),
            allocated_peak_bytes=allocated,
            held_bytes=held,
            allocations=timed.allocations,
        )

    def batch_of(self, samples: int) -> Any:
        """Return a batch of ``samples`` samples on the host, made of the longest ones seen."""
        return self._sample.micro_batch(samples)

    def _is_over(self, peak_bytes: int | None) -> bool:
        budget = self.environment.budget_bytes
        return peak_bytes is not None and budget is not None and peak_bytes > budget

    def _save(self) -> None:
        """Copy the variables not copied before; called once everything is traced and nothing has run."""
        new = [variable for variable in self.step.variables if id(variable) not in self._saved]
        if new and tf.executing_eagerly():  # what a trace has found is copied when the trace has ended
            self._snapshots.append(Snapshot.on_host(new))
            self._saved.update(id(variable) for variable in new)

    def known_report(self) -> Report | None:
        """Return what an earlier search with this step has found, if it holds: see :mod:`.known_reports`."""
        known = known_reports.find(self.step.findings_kept, self._conditions(), self.environment)
        return None if known is None else replace(known, host_uses=self.host_uses)

    def keep_report(self, report: Report) -> None:
        """Keep the report of a search that has come to its end, for :meth:`known_report`."""
        known_reports.keep(self.step.findings_kept, self._conditions(), report)

    def _conditions(self) -> Any:
        return self._target_batch, self._user_limit_bytes, self._headroom, tuple(self._sample.describe())

    def close(self) -> None:
        """Put every variable back as it was before the first trial."""
        # First what trials held: the values that are put back need room on the device, each as much as its variable.
        self._pipeline.drop()
        self.step.on_optimizer_found = lambda: None
        if not self._snapshots:  # nothing was run
            return
        self.keeper.forget()
        if not self._any_ran:
            self.step.release_accumulators()
        if self.environment.limit_bytes is not None:
            gc.collect()  # what trials have left in circles has room that is needed now
        for snapshot in self._snapshots:
            snapshot.restore()
            snapshot.drop()
        lay_anew((*self.step.variables, *self.step.accumulators), self.device)
        self._snapshots, self._saved = [], set()
        gc.collect(1)  # the young objects alone: all of them take a third of a second
