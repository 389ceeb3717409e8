"""State that all workers take from the chief: its weights, its optimizer, its epoch and its seed."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from autobatch.replicas.agreement import SingleProcess
from autobatch.replicas.all_reduce import all_reduce
from autobatch.seams import strategies
from autobatch.tensors.variables import distinct
from autobatch.types import Strategy, Variable


class FromTheChief(keras.callbacks.Callback):  # type: ignore[misc]
    """Callback that gives every worker the chief's weights, optimizer and epoch when training begins.

    So a worker that was killed while the chief was writing a backup cannot come back an epoch ahead or behind.
    """

    def __init__(self, strategy: Strategy, agreement: SingleProcess) -> None:
        super().__init__()
        self._strategy = strategy
        self._agreement = agreement

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        epoch = self._agreement.gather([float(strategies.initial_epoch(model))], "the epoch to begin with")[0, 0]
        strategies.begin_at_epoch(model, int(epoch))
        optimizer = [] if model.optimizer is None else model.optimizer.variables
        variables = distinct([*model.variables, *optimizer])
        with self._agreement.waiting("the weights to begin with"):
            tf.function(lambda: self._strategy.run(self._adopt, args=(variables,)), autograph=False)()

    def _adopt(self, variables: list[Variable]) -> None:
        device = strategies.devices_of(self._strategy)[strategies.replica_here()]
        leads = self._agreement.index == 0 and strategies.replica_here() == 0
        carried = [variable.dtype if variable.dtype.is_floating else tf.int64 for variable in variables]
        values = [tf.cast(variable, dtype) for variable, dtype in zip(variables, carried, strict=True)]
        sums = all_reduce([value if leads else tf.zeros_like(value) for value in values], device)
        for variable, total in zip(variables, sums, strict=True):
            local = self._strategy.experimental_local_results(variable)[strategies.replica_here()]
            local.assign(tf.cast(total, variable.dtype))


def share_seed(agreement: SingleProcess) -> None:
    """Give all workers the chief's seed if none was given one of its own, so that they shuffle alike."""
    if agreement.count == 1:
        return
    own = strategies.global_seed()
    drawn = int(tf.random.uniform([], maxval=2**31 - 1, dtype=tf.int32)) if own is None else own
    rows = agreement.gather([float(own is not None), float(drawn)], "a seed")
    if not rows[:, 0].any():
        tf.random.set_seed(int(rows[0, 1]))
