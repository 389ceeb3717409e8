"""History that ``autobatch.fit`` returns.

This module imports Keras, and is imported when ``autobatch.TrainingHistory`` is used.
"""

from __future__ import annotations

from typing import Any

import keras

from autobatch.records import Plan, Recovery, Report


class TrainingHistory(keras.callbacks.History):  # type: ignore[misc]  # Keras ships no types
    """Keras's ``History`` of a training, with what autobatch knows of it."""

    history: dict[str, list[Any]]
    """Logs by name, one value an epoch, as Keras keeps them."""

    epoch: list[int]
    """Epochs that were trained, counted from 0."""

    plan: Plan
    """Make-up of one optimizer update when training began; :attr:`recoveries` show what became of it."""

    report: Report
    """Sizing report of the search. Where there was none, as with ``micro_batch=64``, it says why."""

    recoveries: tuple[Recovery, ...]
    """Times that training ran out of memory and went on, in turn; empty where it never did."""

    def __repr__(self) -> str:
        """Name the plan, and how the training went."""
        plan = getattr(self, "plan", None)
        if plan is None:
            return super().__repr__()  # type: ignore[no-any-return]
        epochs, recoveries = len(self.epoch), len(self.recoveries)
        return (
            f"<TrainingHistory micro-batch {plan.micro_batches[0]} x {plan.accumulation_steps} for "
            f"{plan.effective_batch}, {epochs} {'epoch' if epochs == 1 else 'epochs'}, {recoveries} recovered>"
        )

    @classmethod
    def of(
        cls, history: keras.callbacks.History, *, plan: Plan, report: Report, recoveries: tuple[Recovery, ...]
    ) -> TrainingHistory:
        """Make one of the history that ``Model.fit`` has returned.

        Both share the logs, and the model's ``history`` is the new one. A ``History`` of the user's own, among the
        callbacks, stays as it is. A ``fit`` of the user's own may return anything.
        """
        made = cls()
        made.__dict__.update(getattr(history, "__dict__", {}))
        made.plan, made.report, made.recoveries = plan, report, recoveries
        if made.model is not None:
            made.model.history = made
        return made
