"""One training under a strategy: its transaction, and what Keras's ``fit`` must be kept from doing meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from autobatch.records import Plan
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.recovery.transaction import Transaction
from autobatch.replicas import resume
from autobatch.replicas.agreement import SingleProcess, agreement_for
from autobatch.replicas.chief_state import share_seed
from autobatch.replicas.step import ReplicatedStep
from autobatch.replicas.transaction import ReplicatedTransaction
from autobatch.replicas.trials import ReplicatedTrials
from autobatch.seams import strategies
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.step.compiled_step import CompiledStep
from autobatch.trial.live_trials import LiveTrials
from autobatch.trial.worst_case import Data


def agree_for(model: Any, timeout_seconds: float | None = None) -> SingleProcess:
    """How the processes that train this model agree; from now on they shuffle alike."""
    agreement = agreement_for(strategies.strategy_of(model), timeout_seconds)
    share_seed(agreement)
    return agreement


def open_transaction(
    step: CompiledStep, micro_batch: int, *, agreement: SingleProcess, **options: Any
) -> AnyTransaction:
    """The transaction for the steps of one device, or for those of several replicas."""
    if isinstance(step, ReplicatedStep):
        return ReplicatedTransaction(step, micro_batch, agreement=agreement, **options)
    assert isinstance(step, AccumulatedStep)
    return Transaction(step, micro_batch, **options)


def callbacks_for(
    given: Any, plan: Plan, transaction: AnyTransaction, *, model: Any, agreement: SingleProcess
) -> list[Any]:
    """What is to be added to a training's callbacks: see :mod:`autobatch.replicas.resume`."""
    strategy = strategies.strategy_of(model)
    return resume.callbacks_for(given, plan, transaction, strategy=strategy, agreement=agreement)


def remembered(
    options: dict[str, Any], agreement: SingleProcess, *, target_batch: int, replicas: int
) -> resume.Kept | None:
    """What an earlier run of this training kept beside its backup."""
    return resume.remembered(options.get("callbacks"), agreement, target_batch=target_batch, replicas=replicas)


@contextlib.contextmanager
def in_fit(model: Any, transaction: AnyTransaction) -> Iterator[None]:
    """While this lasts, Keras's ``fit`` hands our data on as they are and reads no metrics of its own."""
    if not isinstance(transaction, ReplicatedTransaction):
        yield
        return
    with strategies.keras_on_one_device(model, transaction.metrics_result):
        yield


def open_on(model: Any, batches: Data, *, agreement: SingleProcess, **options: Any) -> LiveTrials:
    """Trials on one device, or on all replicas of the strategy that the model was made under."""
    if strategies.strategy_of(model) is None:
        return LiveTrials(model, batches, **options)
    return ReplicatedTrials(model, batches, agreement=agreement, **options)
