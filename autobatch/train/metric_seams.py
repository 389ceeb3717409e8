"""What is replaced in Keras's metrics while a step runs on one micro-batch after another.

Seen with Keras 3.14 and 3.15 on TensorFlow 2.20 and 2.21, as :mod:`autobatch.train.keras_seams`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from autobatch.train.patching import on_this_thread

_PATCHING = threading.RLock()
"""Held while something of Keras's is replaced; always taken after the one of :mod:`autobatch.train.keras_seams`."""


@contextlib.contextmanager
def noting_results(note: Callable[[Any, Any], None]) -> Iterator[None]:
    """While this lasts, ``note(metric, result)`` is told what the ``result`` of every metric returns.

    Every class has a ``result`` of its own: there is no one place that all go through.
    """

    def noted(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def result(self: Any) -> Any:
            returned = original(self)
            note(self, returned)
            return returned

        return on_this_thread(original, result)

    with _PATCHING:
        originals = {kind: vars(kind)["result"] for kind in _kinds(keras.metrics.Metric) if "result" in vars(kind)}
        for kind, original in originals.items():
            kind.result = noted(original)
        try:
            yield
        finally:
            for kind, original in originals.items():
                kind.result = original


def _kinds(kind: Any) -> set[Any]:
    return {kind}.union(*(_kinds(more) for more in kind.__subclasses__()))


@contextlib.contextmanager
def single_numbers_weighed(
    fraction: Any, note: Callable[[str], None], weigh: Callable[[Any], Any] = lambda values: values
) -> Iterator[None]:
    """While this lasts, a mean that is updated with one number and no weight counts it as ``fraction`` of an update.

    Keras counts such a number as one, whatever the batch; so each micro-batch must count as its share of one. ``note``
    is told the name of a metric of which that is not known to be exact: its number is what a function of the user's
    made of a whole batch, or is weighed by what each sample weighs. ``weigh`` makes of a number what adds up, times its
    fraction, to the effective batch's.
    """

    def update_state(self: Any, values: Any, sample_weight: Any = None) -> Any:
        if _is_single(values):
            per_sample = sample_weight is not None and not _is_single(sample_weight)
            function = getattr(self, "_fn", None)
            if per_sample or (function is not None and not isinstance(function, keras.losses.Loss)):
                note(self.name)
            values = weigh(values)
            sample_weight = fraction if sample_weight is None else sample_weight
        return original(self, values, sample_weight=sample_weight)

    with _PATCHING:
        original = keras.metrics.Mean.update_state
        keras.metrics.Mean.update_state = on_this_thread(original, update_state)
        try:
            yield
        finally:
            keras.metrics.Mean.update_state = original


def _is_single(values: Any) -> bool:
    shape = getattr(values, "shape", None)
    return bool((np.ndim(values) if shape is None else tf.TensorShape(shape).rank) == 0)


def called_graph(operation: Any) -> Any:
    """The traced graph of the ``tf.function`` that an operation of a graph calls; None if it calls none."""
    if operation.type not in ("PartitionedCall", "StatefulPartitionedCall"):
        return None
    function = operation.graph._get_function(operation.get_attr("f").name)
    return getattr(function, "graph", None)


def branch_graphs(operation: Any) -> list[Any]:
    """The traced graphs of the branches of an operation that runs one of several; empty where they are not known."""
    names = (
        [operation.get_attr("then_branch").name, operation.get_attr("else_branch").name]
        if operation.type in ("If", "StatelessIf")
        else [branch.name for branch in operation.get_attr("branches")]
    )
    graphs = [_graph_named(operation, name) for name in names]
    return [] if None in graphs else graphs


def body_graph(operation: Any) -> Any:
    """The traced graph of a loop's body; None where it is not known."""
    return _graph_named(operation, operation.get_attr("body").name)


def _graph_named(operation: Any, name: str) -> Any:
    return getattr(operation.graph._get_function(name), "graph", None)
