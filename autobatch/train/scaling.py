"""One training under a strategy: its transaction, and what Keras's ``fit`` must be kept from doing meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from autobatch.records import Plan
from autobatch.train import resume, strategy_seams
from autobatch.train.agreement import Alone, agreement_for
from autobatch.train.recovery import Transaction
from autobatch.train.replicas import ReplicatedStep
from autobatch.train.replicated_recovery import ReplicatedTransaction
from autobatch.train.step import AccumulatedStep


def agree_for(model: Any, timeout_seconds: float | None = None) -> Alone:
    """How the processes that train this model agree; from now on they shuffle alike."""
    agreement = agreement_for(strategy_seams.strategy_of(model), timeout_seconds)
    share_seed(agreement)
    return agreement


def open_transaction(step: AccumulatedStep, micro_batch: int, *, agreement: Alone, **options: Any) -> Transaction:
    """The transaction for the steps of one device, or for those of several replicas."""
    if isinstance(step, ReplicatedStep):
        return ReplicatedTransaction(step, micro_batch, agreement=agreement, **options)
    return Transaction(step, micro_batch, **options)


def callbacks_for(given: Any, plan: Plan, transaction: Transaction, *, model: Any, agreement: Alone) -> list[Any]:
    """What is to be added to a training's callbacks: see :mod:`autobatch.train.resume`."""
    strategy = strategy_seams.strategy_of(model)
    return resume.callbacks_for(given, plan, transaction, strategy=strategy, agreement=agreement)


def remembered(options: dict[str, Any], agreement: Alone, *, target_batch: int, replicas: int) -> resume.Kept | None:
    """What an earlier run of this training kept beside its backup."""
    return resume.remembered(options.get("callbacks"), agreement, target_batch=target_batch, replicas=replicas)


@contextlib.contextmanager
def in_fit(model: Any, transaction: Transaction) -> Iterator[None]:
    """While this lasts, Keras's ``fit`` hands our data on as they are and reads no metrics of its own."""
    if not isinstance(transaction, ReplicatedTransaction):
        yield
        return
    with strategy_seams.keras_on_one_device(model, transaction.metrics_result):
        yield


def share_seed(agreement: Alone) -> None:
    """Let all workers shuffle alike where none was given a seed: they draw from the chief's."""
    if agreement.count == 1:
        return
    own = strategy_seams.global_seed()
    drawn = int(tf.random.uniform([], maxval=2**31 - 1, dtype=tf.int32)) if own is None else own
    rows = agreement.tell([float(own is not None), float(drawn)], "a seed")
    if not rows[:, 0].any():
        tf.random.set_seed(int(rows[0, 1]))
