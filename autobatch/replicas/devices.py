"""Devices that a model trains on: one, or the replicas of a strategy. Only this module asks which of the two."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import tensorflow as tf

from autobatch.records import Plan, Report
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.recovery.transaction import Transaction
from autobatch.replicas.agreement import SingleProcess, agreement_for
from autobatch.replicas.chief_state import FromTheChief, share_seed
from autobatch.replicas.processes import OneProcess, SeveralProcesses
from autobatch.replicas.resume import PlanBackup, backup_of
from autobatch.replicas.step import ReplicatedStep
from autobatch.replicas.transaction import ReplicatedTransaction
from autobatch.replicas.trials import ReplicatedTrials
from autobatch.seams import strategies
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.step.compiled_step import CompiledStep
from autobatch.trial.live_trials import LiveTrials
from autobatch.trial.worst_case import Data
from autobatch.types import Model, Strategy


class Devices(Protocol):
    """Opener of what differs between a model that trains on one device and one that trains on several replicas."""

    def open_trials(self, model: Model, batches: Data, **options: Any) -> LiveTrials:
        """Open trials of ``model``; ``options`` are those of :class:`LiveTrials`."""
        ...

    def open_transaction(self, step: CompiledStep, micro_batch: int, **options: Any) -> AnyTransaction:
        """Open a transaction over the ``step`` of trials opened here; ``options`` are those of :class:`Transaction`."""
        ...

    def callbacks(self, given: Any, plan: Plan, transaction: AnyTransaction) -> Sequence[keras.callbacks.Callback]:
        """Make the callbacks that a training needs beside those that its user has ``given``."""
        ...

    def during_fit(self, model: Model, transaction: AnyTransaction) -> contextlib.AbstractContextManager[None]:
        """Let Keras's ``fit`` hand on autobatch's data as they are, and read no metrics of its own."""
        ...

    def gather(self, numbers: list[float], what: str) -> Any:
        """Give ``numbers`` to all processes of this training; return those of all, one row a process."""
        ...

    def processes(self) -> OneProcess:
        """Return the processes of this training, as its backup needs them."""
        ...


class OneDevice:
    """The one device of a model that was made under no strategy."""

    def open_trials(self, model: Model, batches: Data, **options: Any) -> LiveTrials:
        return LiveTrials(model, batches, **options)

    def open_transaction(self, step: CompiledStep, micro_batch: int, **options: Any) -> AnyTransaction:
        assert isinstance(step, AccumulatedStep)
        return Transaction(step, micro_batch, **options)

    def callbacks(self, given: Any, plan: Plan, transaction: AnyTransaction) -> list[keras.callbacks.Callback]:
        backup = backup_of(given)
        return [] if backup is None else [PlanBackup(backup.backup_dir, plan, transaction)]

    def during_fit(self, model: Model, transaction: AnyTransaction) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def gather(self, numbers: list[float], what: str) -> Any:
        return SingleProcess().gather(numbers, what)

    def processes(self) -> OneProcess:
        return OneProcess()


@dataclass(frozen=True, slots=True)
class Replicas:
    """The replicas of the strategy that a model was made under, in this process and in others."""

    strategy: Strategy
    agreement: SingleProcess

    def open_trials(self, model: Model, batches: Data, **options: Any) -> LiveTrials:
        return ReplicatedTrials(model, batches, agreement=self.agreement, **options)

    def open_transaction(self, step: CompiledStep, micro_batch: int, **options: Any) -> AnyTransaction:
        assert isinstance(step, ReplicatedStep)  # that of the trials opened here
        return ReplicatedTransaction(step, micro_batch, agreement=self.agreement, **options)

    def callbacks(self, given: Any, plan: Plan, transaction: AnyTransaction) -> list[keras.callbacks.Callback]:
        """Make the chief keep its plan beside the backup, and all workers begin with what the chief has restored."""
        leads = self.agreement.index == 0
        added = OneDevice().callbacks(given, plan, transaction) if leads else []
        if self.agreement.count == 1:
            return added
        backup = backup_of(given)
        if backup is not None and not leads:
            strategies.never_write(backup)
        return [*added, FromTheChief(self.strategy, self.agreement)]

    def during_fit(self, model: Model, transaction: AnyTransaction) -> contextlib.AbstractContextManager[None]:
        assert isinstance(transaction, ReplicatedTransaction)  # opened here too
        return self._during_fit(model, transaction)

    @contextlib.contextmanager
    def _during_fit(self, model: Model, transaction: ReplicatedTransaction) -> Iterator[None]:
        with (
            self.agreement.throughout("an epoch"),
            strategies.keras_on_one_device(model, transaction.metrics_result),
        ):
            yield

    def gather(self, numbers: list[float], what: str) -> Any:
        return self.agreement.gather(numbers, what)

    def processes(self) -> OneProcess:
        if self.agreement.count == 1:
            return OneProcess(int(self.strategy.num_replicas_in_sync))
        return SeveralProcesses(self.strategy, self.agreement)


def devices_of_model(model: Model, timeout_seconds: float | None = None) -> Devices:
    """Return the devices that ``model`` trains on, and let the workers of a strategy shuffle alike from then on."""
    strategy = strategies.strategy_of(model)
    if strategy is None:
        return OneDevice()
    agreement = agreement_for(strategy, timeout_seconds)
    share_seed(agreement)
    return Replicas(strategy, agreement)


def require_one_device(model: Model) -> OneDevice:
    """Return the one device of the model of a wrapped step.

    Raises:
        ValueError: The model was made under a strategy, or one is in scope.
    """
    if strategies.strategy_of(model) is not None or tf.distribute.has_strategy():
        raise ValueError(
            "wrap_step works on one device. Under a tf.distribute strategy give the loop to a model as its train_step "
            f"and call autobatch.fit. Received: {getattr(model, 'name', model)!r}, made under a strategy"
        )
    return OneDevice()


def open_training(
    devices: Devices, trials: LiveTrials, report: Report, *, user_limit_bytes: int | None, begin_at: int | None = None
) -> AnyTransaction:
    """Open the transaction of a training by the report's plan, with all that the trials have learned.

    ``begin_at`` is the micro-batch to begin with, where an earlier run had to go below the plan's.
    """
    plan = report.plan
    assert plan is not None
    each = trials.samples_in_portion
    bytes_kept = report.environment.headroom_bytes
    return devices.open_transaction(
        trials.step,
        plan.micro_batch // each,
        device=trials.device,
        begin_at=None if begin_at is None else begin_at // each,
        effective_batch=plan.effective_batch // each,
        memory_model=report.memory_model,
        lengths=trials.length_rule(report),
        keeper=trials.keeper,
        user_limit_bytes=user_limit_bytes,
        headroom=report.environment.headroom if bytes_kept is None else bytes_kept,
    )
