"""A model of Keras's kind around a train step of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from autobatch.seams import models
from autobatch.types import Metric, Model, Optimizer, Variable


class LoopModel:
    """A stand-in for a Keras model in :class:`AccumulatedStep`, with the user's function as its ``train_step``.

    ``train_step(batch)`` runs forward and backward and calls ``apply`` or ``apply_gradients`` of its optimizers.
    A scalar that it returns is averaged over the micro-batches, each weighted by its samples.
    """

    compiled = True
    steps_per_execution = 1
    metrics: tuple[Metric, ...] = ()

    def __init__(
        self, train_step: Callable[[Any], Any], model: Model, optimizer: Optimizer, *, jit_compile: bool
    ) -> None:
        self.train_step = train_step
        self.optimizers = require_optimizers(optimizer)
        self.optimizer = self.optimizers[0]
        self.jit_compile = jit_compile
        self.run_eagerly = False
        self.model = model

    @property
    def name(self) -> str:
        return str(getattr(self.model, "name", "model"))

    @property
    def dtype_policy(self) -> Any:
        return getattr(self.model, "dtype_policy", keras.config.dtype_policy())

    @property
    def variables(self) -> list[Variable]:
        return list(self.model.variables)

    @property
    def trainable_variables(self) -> list[Variable]:
        return list(self.model.trainable_variables)

    def _flatten_layers(self) -> list[Any]:
        return models.layers_of(self.model)

    @property
    def built(self) -> bool:
        return bool(self.model.built)


def require_optimizers(optimizer: Optimizer) -> tuple[Any, ...]:
    """Return as a tuple the one or several optimizers that ``wrap_step`` was given.

    Raises:
        TypeError: one of them is no Keras optimizer.
        ValueError: there is none.
    """
    found = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    if not found:
        raise ValueError(f"optimizer must be the one that train_step calls, or a list of them. Received: {optimizer!r}")
    for each in found:
        if not isinstance(each, keras.optimizers.Optimizer):
            raise TypeError(
                "optimizer must be the keras.optimizers.Optimizer that train_step calls, or a list of several. "
                f"Received: {each!r} (of type {type(each).__name__})"
            )
    return found
