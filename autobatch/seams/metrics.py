"""Replacements in Keras's metrics while a step runs on one micro-batch after another.

Seen with Keras 3.6 to 3.15 on TensorFlow 2.16 to 2.21; see :mod:`autobatch.seams.models`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend as _backend
from keras.src.metrics.reduction_metrics import MeanMetricWrapper as _MeanMetricWrapper
from keras.src.trainers.compile_utils import CompileMetrics as _CompileMetrics
from keras.src.trainers.compile_utils import MetricsList as _MetricsList

from autobatch.seams.patching import replaced, replaced_in_each


def noting_results(note: Callable[[Any, Any], None]) -> contextlib.AbstractContextManager[None]:
    """Call ``note(metric, result)`` with what the ``result`` of every metric returns, while the context is open.

    Every class has a ``result`` of its own: there is no one place that all calls go through.
    """

    def noted(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def result(self: Any) -> Any:
            returned = original(self)
            note(self, returned)
            return returned

        return result

    return replaced_in_each(_kinds_with("result"), "result", noted)


def failing_results_replaced(
    instead: Callable[[Any, Callable[[], Any]], Any],
) -> contextlib.AbstractContextManager[None]:
    """Let ``instead(metric, result)`` stand in for a ``result`` that raises, while the context is open.

    It may return a value or raise in turn.
    """

    def guarded(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def result(self: Any) -> Any:
            try:
                return original(self)
            except Exception:  # noqa: BLE001 - whatever it is: the metric has not been updated yet
                return instead(self, functools.partial(original, self))

        return result

    return replaced_in_each(_kinds_with("result"), "result", guarded)


def _kinds_with(name: str, kind: Any = keras.metrics.Metric) -> set[Any]:
    """Return the classes of metrics that define an attribute with this name themselves."""
    own = {kind} if name in vars(kind) else set()
    return own.union(*(_kinds_with(name, more) for more in kind.__subclasses__()))


def single_numbers_weighed(
    fraction: Any,
    note: Callable[[str], None],
    weigh: Callable[[Any], Any] = lambda values: values,
    note_untold: Callable[[str], None] = lambda name: None,
) -> contextlib.AbstractContextManager[None]:
    """Count a mean's update with one number and no weight as ``fraction`` of an update, while the context is open.

    Keras counts such a number as one, whatever the batch. So each micro-batch must count as its share of one.

    ``note`` gets the name of a metric for which this is not known to be exact. Its number was made of a whole batch by
    a function that the metric was given, or it is weighed by the weight of each sample.

    ``weigh`` turns a number into one that adds up, times its fraction, to the number of the effective batch. It returns
    None where no such number is known; ``note_untold`` then gets the metric's name.
    """

    def weighing(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_state(self: Any, values: Any, sample_weight: Any = None) -> Any:
            if _is_single(values):
                per_sample = sample_weight is not None and not _is_single(sample_weight)
                function = getattr(self, "_fn", None)
                if per_sample or (function is not None and not isinstance(function, keras.losses.Loss)):
                    note(self.name)
                weighed = weigh(values)
                if weighed is None:
                    note_untold(self.name)
                values = values if weighed is None else weighed
                sample_weight = fraction if sample_weight is None else sample_weight
            return original(self, values, sample_weight=sample_weight)

        return update_state

    return replaced(keras.metrics.Mean, "update_state", weighing)


_CONTAINERS = (keras.metrics.Metric, _CompileMetrics, _MetricsList, _MeanMetricWrapper)
"""Classes whose ``update_state`` computes nothing itself: it calls others, or a function that somebody gave."""

_OF_BATCHES = ("dice", "tversky", "circle")
"""Keras's losses that, used as metrics, give no value for each sample."""

UpdateHandler = Callable[[Any, Callable[..., Any], Any, Any], bool]
"""Handler that takes a metric, its bound ``update_state`` and the arguments; True if it takes the update over."""

mask_of = _backend.get_keras_mask
set_mask = _backend.set_keras_mask


class _OneNumberError(Exception):
    """Keras's function gave something other than a value for each sample."""


@contextlib.contextmanager
def updates_offered(offer: UpdateHandler, is_per_sample: Callable[[Any], bool]) -> Iterator[None]:
    """Offer every update of a metric that may be no sum over samples to ``offer`` first, while the context is open.

    Updates of classes and functions that are not Keras's are offered. So are those of Keras's losses of whole batches,
    and of Keras's functions whose values ``is_per_sample`` denies. An update that is not taken over runs as usual.
    Updates that a metric makes during its own update are part of that one.
    """
    running: list[Any] = []

    def offered(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_state(self: Any, *args: Any, **kwargs: Any) -> Any:
            if any(self is metric for metric in running):
                return original(self, *args, **kwargs)
            own = functools.partial(original, self)
            by_keras = _is_of_keras(original) and _makes_values_of_samples(self._fn)
            if not by_keras and offer(self, own, args, kwargs):
                return None
            running.append(self)
            checked.append(self if by_keras else None)
            try:
                return original(self, *args, **kwargs)
            except _OneNumberError:
                if offer(self, own, args, kwargs):
                    return None
                checked[-1] = None
                return original(self, *args, **kwargs)
            finally:
                running.pop()
                checked.pop()

        return update_state

    checked: list[Any] = []

    def checking(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_state(self: Any, values: Any, sample_weight: Any = None) -> Any:
            if (
                checked
                and checked[-1] is self
                and not isinstance(self._fn, keras.losses.Loss)
                and not is_per_sample(values)
            ):
                raise _OneNumberError
            return original(self, values, sample_weight=sample_weight)

        return update_state

    kinds = _kinds_with("update_state")
    own = [kind for kind in kinds if kind is _MeanMetricWrapper or not _is_of_keras(vars(kind)["update_state"])]
    with (
        replaced_in_each(own, "update_state", offered),
        replaced(keras.metrics.Mean, "update_state", checking),
    ):
        yield


def additive_updates_noted(
    note: Callable[[Any, Callable[..., Any], Any, Any], None],
) -> contextlib.AbstractContextManager[None]:
    """Hand updates that are known to be sums over samples to ``note`` and do not run them, while the context is open.

    These are the updates of Keras's own classes of metrics, except those that call other metrics or a given function.
    """

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def update_state(self: Any, *args: Any, **kwargs: Any) -> None:
            note(self, functools.partial(original, self), args, kwargs)

        return update_state

    kinds = _kinds_with("update_state")
    known = [kind for kind in kinds if kind not in _CONTAINERS and _is_of_keras(vars(kind)["update_state"])]
    return replaced_in_each(known, "update_state", noted)


def _is_of_keras(function: Any) -> bool:
    module = getattr(function, "__module__", None) or type(function).__module__
    return bool(module.partition(".")[0] == "keras")


def _makes_values_of_samples(function: Any) -> bool:
    """Return True if the function of a metric is one of Keras's that gives a value for each sample."""
    if isinstance(function, functools.partial):
        return _makes_values_of_samples(function.func)
    name = getattr(function, "__name__", type(function).__name__)
    if name.lower() in _OF_BATCHES:
        return False
    wrapped = getattr(function, "fn", None) if isinstance(function, keras.losses.Loss) else None
    return _is_of_keras(type(function) if isinstance(function, keras.losses.Loss) else function) and (
        wrapped is None or _makes_values_of_samples(wrapped)
    )


def function_of(metric: Any) -> Any:
    """Return the function whose values a metric averages; None if it has none."""
    return getattr(metric, "_fn", None) if isinstance(metric, _MeanMetricWrapper) else None


def _is_single(values: Any) -> bool:
    shape = getattr(values, "shape", None)
    return bool((np.ndim(values) if shape is None else tf.TensorShape(shape).rank) == 0)
