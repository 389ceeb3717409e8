"""Training through a model's own ``fit``, which may change its arguments, and may train more than once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from autobatch.data.own_fit import Given, call_own_fit, require_known_passes
from autobatch.records import Recovery
from autobatch.training_history import TrainingHistory
from autobatch.types import Dataset, Model

Train = Callable[[Given, Callable[..., Any]], TrainingHistory]
"""Function that trains on what Keras's ``fit`` was given, by Keras's ``fit``."""


def train_through_own_fit(
    model: Model, dataset: Dataset, y: Any, *, target_batch: int, options: dict[str, Any], train: Train
) -> TrainingHistory:
    """Call the model's own ``fit`` with what its user has passed, and ``train`` wherever that calls Keras's.

    Return the History that it returns, with the plan and the report of the last training and the recoveries of all. If
    it returns none, the History is that of the last training.

    Raises:
        TypeError, ValueError: as for :func:`autobatch.data.own_fit.call_own_fit` and
            :func:`autobatch.data.own_fit.require_known_passes`.
    """
    trained: list[TrainingHistory] = []

    def instead(given: Given, keras_fit: Callable[..., Any]) -> TrainingHistory:
        require_known_passes(given, options, target_batch)
        trained.append(train(given, keras_fit))
        return trained[-1]

    returned = call_own_fit(model, dataset, y, target_batch=target_batch, options=options, instead=instead)
    last = trained[-1]
    recoveries: tuple[Recovery, ...] = tuple(recovery for each in trained for recovery in each.recoveries)
    if not isinstance(returned, keras.callbacks.History):
        returned = last
    if not isinstance(returned, TrainingHistory):
        return TrainingHistory.of(returned, plan=last.plan, report=last.report, recoveries=recoveries)
    returned.plan, returned.report, returned.recoveries = last.plan, last.report, recoveries
    return returned
