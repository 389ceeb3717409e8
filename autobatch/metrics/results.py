"""Results of metrics in a step's logs, as distinct from values of one micro-batch.

A metric's result stands for all micro-batches so far, so the last micro-batch's result is the effective batch's. A
value computed from the micro-batch itself, such as a loss, is averaged. Names do not distinguish the two: a
``train_step`` may give a result any name, and a loss the name of a metric.

In a graph the operations decide: a result, or a value computed from one, leads back to no tensor of the micro-batch.
(A result reads the metric's variables, and what was added to them before is no input of that reading.) In eager code
the values decide.
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
    """Results that metrics returned while one step ran, as :func:`autobatch.seams.metrics.noting_results` saw them."""

    def __init__(self) -> None:
        self._noted: list[tuple[Any, int, Any]] = []
        """Triples of a metric, a place among the parts of its result, and the part there."""

    def note(self, metric: Metric, result: Any) -> None:
        """Note what ``metric.result()`` returned: a tensor, a variable, or a nest of them."""
        self._noted += [(metric, place, part) for place, part in enumerate(tf.nest.flatten(result))]

    def with_values(self, logs: Any) -> Any:
        """Return a step's logs with the present value of each variable in them that is no metric's result."""
        return tf.nest.map_structure(
            lambda part: part.read_value() if isinstance(part, tf.Variable) and not self.returned_by(part) else part,
            logs,
        )

    def returned_by(self, part: Any) -> tuple[Any, int] | None:
        """Return the metric that returned ``part`` itself, and the place in its result; None if none did."""
        return next(((metric, place) for metric, place, noted in self._noted if noted is part), None)

    def derived(self, part: Any, variables: Sequence[Variable]) -> Derived | None:
        """Return how ``part`` of a graph is made of results and variables.

        It is None if ``part`` is a result itself, or depends on anything else.
        """
        is_symbolic = tf.is_tensor(part) and hasattr(part, "graph")
        return derived_from(part, self._noted, variables) if is_symbolic and self.returned_by(part) is None else None

    def holds(self, name: str, part: Any, batch: Sequence[Tensor]) -> bool:
        """Return True if ``part``, under ``name`` in the logs, stands for all micro-batches so far.

        ``batch`` holds the tensors of the micro-batch.
        """
        if self.returned_by(part) is not None:
            return True
        if tf.is_tensor(part) and not tf.executing_eagerly():
            results = [noted for _, _, noted in self._noted if tf.is_tensor(noted)]
            from_batch, from_results = origins(part, batch, results)
            return not from_batch and (from_results or self._has(name))
        # A number that the step took out of a result is recognised by its value, and what it computed from that by its
        # name. In the first micro-batch of an epoch a loss may equal its metric's result, but not in all of them.
        return self._has(name) or any(_same(part, noted) for _, _, noted in self._noted)

    def _has(self, name: str) -> bool:
        return any(metric.name == name for metric, _, _ in self._noted)


def _same(part: Any, noted: Any) -> bool:
    return np.array_equal(_value(part), _value(noted))


def _value(part: Any) -> Any:
    return np.asarray(tf.convert_to_tensor(part))
