"""Which parts of a step's logs are results of metrics, and which are values of one micro-batch.

A metric's result stands for all micro-batches so far, so that the last one's is the effective batch's. What was
computed from the micro-batch itself, such as a loss, is averaged. Names do not tell the two apart: a ``train_step`` may
call a result what it likes, and a loss as a metric is called.

In a graph the operations tell: a result, or what is computed further from one, leads back to no tensor of the
micro-batch. (A metric's variables are read there, and what was added to them before is no input of that reading.) Run
eagerly, the values tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from autobatch.graphs.origins import origins
from autobatch.metrics.derived_logs import Derived, derived_from
from autobatch.types import Metric, Tensor, Variable


class MetricResults:
    """What metrics returned while one step ran; told by :func:`autobatch.seams.metrics.noting_results`."""

    def __init__(self) -> None:
        self._noted: list[tuple[Any, int, Any]] = []
        """Metric, place among the parts of its result, part."""

    def note(self, metric: Metric, result: Any) -> None:
        """Take down what ``metric.result()`` returned: a tensor, a variable, or a nest of them."""
        self._noted += [(metric, place, part) for place, part in enumerate(tf.nest.flatten(result))]

    def returned_by(self, part: Any) -> tuple[Any, int] | None:
        """The metric that returned ``part`` itself, and the place in its result."""
        return next(((metric, place) for metric, place, noted in self._noted if noted is part), None)

    def derived(self, part: Any, variables: Sequence[Variable]) -> Derived | None:
        """How ``part`` of a graph is made of results and variables; None if it is one itself, or of anything else."""
        is_symbolic = tf.is_tensor(part) and hasattr(part, "graph")
        return derived_from(part, self._noted, variables) if is_symbolic and self.returned_by(part) is None else None

    def holds(self, name: str, part: Any, batch: Sequence[Tensor]) -> bool:
        """Whether ``part``, under ``name`` in the logs, stands for all micro-batches so far.

        ``batch`` are the tensors of the micro-batch.
        """
        if self.returned_by(part) is not None:
            return True
        if tf.is_tensor(part) and not tf.executing_eagerly():
            results = [noted for _, _, noted in self._noted if tf.is_tensor(noted)]
            from_batch, from_results = origins(part, batch, results)
            return not from_batch and (from_results or self._has(name))
        # A number that the step took out of the tensor is known by its value, and what it made of that by its name. In
        # the first micro-batch of an epoch a loss may be its metric's result, but not in all of them.
        return self._has(name) or any(_same(part, noted) for _, _, noted in self._noted)

    def _has(self, name: str) -> bool:
        return any(metric.name == name for metric, _, _ in self._noted)


def _same(part: Any, noted: Any) -> bool:
    return np.array_equal(_value(part), _value(noted))


def _value(part: Any) -> Any:
    return np.asarray(tf.convert_to_tensor(part))
