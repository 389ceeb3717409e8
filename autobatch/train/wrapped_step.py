"""Accumulation and recovery for a training loop of the user's own, without ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autobatch.data.loop_batches import OneBatch, element_spec_of, require_alike, widened
from autobatch.errors import CannotBeCutError
from autobatch.records import Recovery, Report
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.recovery.keeper import Keeper
from autobatch.recovery.sample_lengths import LengthRule
from autobatch.replicas.devices import OneDevice
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.step.compiled_step import CompiledStep
from autobatch.step.loop_model import LoopModel
from autobatch.tensors.batch_structure import UnevenSpec
from autobatch.tracebacks import showing_users_line
from autobatch.train.started_again import StartedAgain, told_to
from autobatch.types import Batch, ElementSpec


class StepSession:
    """Training behind a wrapped step: opened on the first batch, widened for batches of other lengths.

    ``report`` is None until it is opened.

    Args:
        model: The user's function and model in one.
        devices: The device that it trains on.
        find_report: Takes the trials that are opened on the first batch, and the ``target_batch`` in samples; returns
            a report with a plan.
        target_batch, user_limit_bytes, headroom: As for :func:`autobatch.wrap_step`.
    """

    def __init__(
        self,
        model: LoopModel,
        devices: OneDevice,
        find_report: Callable[..., Report],
        *,
        target_batch: int,
        user_limit_bytes: int | None,
        headroom: float,
    ) -> None:
        self._model = model
        self._devices = devices
        self._find_report = find_report
        self._target_batch = target_batch
        self._limits: dict[str, Any] = {"user_limit_bytes": user_limit_bytes, "headroom": headroom}
        self._target = target_batch
        self._trials: Any = None
        self.report: Report | None = None

    @property
    def samples_in_portion(self) -> int:
        """Number of samples in a portion, which sizes count where streams are cut in proportion; else 1."""
        return 1 if self._trials is None else int(self._trials.samples_in_portion)

    def open(self, batch: Batch) -> AnyTransaction:
        """Find the micro-batch with trials on the first batch; return the transaction for batches like it."""
        again = told_to(self._model)
        try:
            trials, report = self._search(again, OneBatch(batch, at_least=self._target_batch))
        except CannotBeCutError as found:
            whole = OneBatch(batch, at_least=self._target_batch, cannot_be_cut=found.reason)
            trials, report = self._search(again, whole)
        self._trials, self.report = trials, report
        transaction = self._transaction_over(trials.step, trials.length_rule(report), trials.keeper)
        again.begin_smaller(transaction, effective_batch=self._target * trials.samples_in_portion)
        return transaction

    def _search(self, again: StartedAgain, batches: OneBatch) -> tuple[Any, Report]:
        self._target = batches.target_batch
        trials = self._devices.open_trials(self._model, batches, target_batch=self._target, **self._limits)
        again.lower_trials(trials)
        return trials, self._find_report(trials, target_batch=self._target * trials.samples_in_portion)

    def widen(self, element_spec: ElementSpec, before: AnyTransaction) -> AnyTransaction:
        """Return the transaction for batches of ``element_spec``, which goes on where ``before`` has ended."""
        structure = self._trials.step.structure
        spec = UnevenSpec(element_spec, structure.rows) if structure.is_uneven else element_spec
        step = AccumulatedStep(self._model, spec, effective_batch=self._target)
        after = self._transaction_over(step, self._trials.length_rule(self.report, step.structure), None)
        after.follow(before)
        return after

    def _transaction_over(self, step: CompiledStep, lengths: LengthRule, keeper: Keeper | None) -> AnyTransaction:
        assert self.report is not None
        assert self.report.plan is not None
        return self._devices.open_transaction(
            step,
            self.report.plan.micro_batch // self.report.plan.samples_in_portion,
            device=self._trials.device,
            memory_model=self.report.memory_model,
            lengths=lengths,
            keeper=keeper,
            **self._limits,
        )


class WrappedStep:
    """A ``train_step`` that takes effective batches of any size; made by :func:`autobatch.wrap_step`.

    Args:
        session: Makes the transaction for the first batch, and for batches of other lengths.
        name: The name of the user's function.
        target_batch: The effective batch that the search is made for.
        micro_batch: The size that was given in place of a search.
    """

    def __init__(self, session: StepSession, *, name: str, target_batch: int, micro_batch: int | None) -> None:
        self._session = session
        self._name = name
        self._target_batch = target_batch
        self._micro_batch = micro_batch
        self._transaction: AnyTransaction | None = None
        self._element_spec: ElementSpec = None

    def __repr__(self) -> str:
        """Name the function, its effective batch, and the micro-batch as it is now."""
        if self._transaction is not None:
            size = str(self._transaction.policy.micro_batch * self._session.samples_in_portion)
            count = len(self._transaction.recoveries)
            how = (("searched" if self._micro_batch is None else "given"), *([f"{count} recovered"] if count else []))
        elif self._micro_batch is None:
            size, how = "'auto'", ("not searched yet: the first batch starts it",)
        else:
            size, how = str(self._micro_batch), ("given",)
        return f"<WrappedStep {self._name} target_batch={self._target_batch} micro_batch={size} ({', '.join(how)})>"

    @property
    def report(self) -> Report | None:
        """Report of the search; None before the first batch."""
        return self._session.report

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """Recoveries in turn: the times that a batch ran out of memory and the loop went on."""
        return () if self._transaction is None else tuple(self._transaction.recoveries)

    @showing_users_line
    def __call__(self, batch: Batch) -> Any:
        """Make one update with an effective batch; return what ``train_step`` returned, for the whole of it."""
        if self._transaction is None:
            self._transaction = self._session.open(batch)
            self._element_spec = element_spec_of(batch)
        else:
            require_alike(self._element_spec, batch)
        wider = widened(self._element_spec, batch)
        if wider is not self._element_spec:
            self._transaction = self._session.widen(wider, self._transaction)
            self._element_spec = wider
        return self._transaction.train(batch)
