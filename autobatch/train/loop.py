"""Accumulation and recovery for a training loop of the user's own, without ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from autobatch.records import HostUse, Report
from autobatch.train.recovery import Transaction
from autobatch.train.step import AccumulatedStep
from autobatch.train.structure import Structure


class LoopModel:
    """What :class:`AccumulatedStep` needs to know of a model, with the user's function as its ``train_step``.

    ``train_step(batch)`` runs forward and backward and calls ``optimizer.apply`` or ``apply_gradients`` once; what it
    returns is averaged over the micro-batches where it is a scalar, each weighted by its samples.
    """

    compiled = True
    steps_per_execution = 1
    metrics: tuple[Any, ...] = ()

    def __init__(self, train_step: Callable[[Any], Any], model: Any, optimizer: Any, *, jit_compile: bool) -> None:
        self.train_step = train_step
        self.optimizer = optimizer
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
    def variables(self) -> list[Any]:
        return list(self.model.variables)

    @property
    def trainable_variables(self) -> list[Any]:
        return list(self.model.trainable_variables)

    def get_metrics_result(self) -> dict[str, Any]:
        return {}

    def _flatten_layers(self) -> list[Any]:
        return list(self.model._flatten_layers())

    @property
    def built(self) -> bool:
        return bool(self.model.built)


class OneBatch:
    """A single effective batch, looked at by a search."""

    def __init__(self, data: Any, samples: int) -> None:
        self._data = data
        self.sample_limit = samples
        self.element_spec = element_spec_of(data)
        self.structure = Structure(self.element_spec)

    def host_uses(self) -> tuple[HostUse, ...]:
        """Nothing: the pipeline is the user's own loop."""
        return ()

    def look(self) -> Any:
        """The batch."""
        return self._data


def element_spec_of(data: Any) -> Any:
    """The type specs of a batch of tensors or arrays."""
    return tf.nest.map_structure(
        lambda part: (
            None
            if part is None
            else tf.type_spec_from_value(tf.convert_to_tensor(part))
            if not isinstance(part, (tf.RaggedTensor, tf.SparseTensor))
            else tf.type_spec_from_value(part)
        ),
        data,
    )


class WrappedStep:
    """A ``train_step`` that takes effective batches of any size; made by :func:`autobatch.wrap_step`.

    ``report`` is that of the search, None before the first batch; ``recoveries`` lists what happened since.
    """

    def __init__(self, open_first: Callable[[Any], tuple[AccumulatedStep, Transaction, Report]]) -> None:
        self._open_first = open_first
        self._transaction: Transaction | None = None
        self.report: Report | None = None

    @property
    def recoveries(self) -> tuple[Any, ...]:
        return () if self._transaction is None else tuple(self._transaction.recoveries)

    def __call__(self, batch: Any) -> Any:
        """Make one update with an effective batch; return what ``train_step`` returned, for the whole of it."""
        if self._transaction is None:
            _, self._transaction, self.report = self._open_first(batch)
        return self._transaction.train(batch)
