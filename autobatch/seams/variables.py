"""Private parts of Keras's variables and of its BatchNormalization.

Seen with Keras 3.6 to 3.15 on TensorFlow 2.16 to 2.21; see :mod:`autobatch.seams.models`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend as _backend

from autobatch.seams.patching import replaced
from autobatch.seams.versions import common_variable_class


def inner_of(variable: Any) -> Any:
    """Return the ``tf.Variable`` behind a Keras variable, even while a trace reads something else in its place."""
    inner = getattr(variable, "_value", None)
    return variable.value if inner is None else inner


@contextlib.contextmanager
def assignments_taken(take: Callable[[Any, Any], bool], instead_of: Callable[[Any], Any]) -> Iterator[None]:
    """Hand assignments to Keras variables to ``take(variable, value)``, while the context is open.

    An assignment for which ``take`` returns False is made as usual. ``instead_of(variable)`` is read in the variable's
    place, unless it is None.
    """

    def taken(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def direct_assign(self: Any, value: Any) -> None:
            if not take(self, value):
                original(self, value)

        return direct_assign

    def read_instead(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def value(self: Any) -> Any:
            found = instead_of(self)
            return original(self) if found is None else self._maybe_autocast(found)

        return value

    with (
        replaced(_backend.Variable, "_direct_assign", taken),
        replaced(common_variable_class(), "value", read_instead),
    ):
        yield


MomentsHandler = Callable[[Any, Any, Callable[[], tuple[Any, Any, Any]]], tuple[Any, Any]]
"""Handler that takes a BatchNormalization, its inputs and a function; it returns mean and variance.

The function computes weight, mean and variance. The weight is the number of elements that were averaged: one for all
channels, or under a mask one for each.
"""


def moments_handled(handler: MomentsHandler) -> contextlib.AbstractContextManager[None]:
    """Let ``handler`` give BatchNormalizations in training mode their mean and variance, while the context is open."""

    def handled(original: Callable[..., Any]) -> Callable[..., Any]:
        def moments(self: Any, inputs: Any, mask: Any) -> Any:
            def compute() -> tuple[Any, Any, Any]:
                mean, variance = original(self, inputs, mask)
                return _weight(inputs, mask, self._reduction_axes, mean), mean, variance

            return handler(self, inputs, compute)

        return moments

    return replaced(keras.layers.BatchNormalization, "_moments", handled)


def _weight(inputs: Any, mask: Any, axes: list[int], mean: Any) -> Any:
    if mask is None:
        return tf.cast(tf.size(inputs, tf.int64), tf.float32) / mean.shape.num_elements()
    counted = tf.broadcast_to(tf.cast(tf.expand_dims(mask, -1), tf.float32), tf.shape(inputs))
    return tf.reduce_sum(counted, axes)


def has_own_call(layer: Any) -> bool:
    """Return True if a subclass of BatchNormalization changes how its statistics are updated."""
    own = keras.layers.BatchNormalization
    names = ("call", "_update_renorm_statistics")
    return any(getattr(type(layer), name, None) is not getattr(own, name, None) for name in names)


def statistics_of(layer: Any) -> list[Any]:
    """Return the variables that a BatchNormalization updates itself in training."""
    names = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    return [variable for name in names if (variable := getattr(layer, name, None)) is not None]


def update_statistics(layer: Any, shape: list[int | None], mean: Any, variance: Any) -> None:
    """Let a BatchNormalization update its statistics with this mean and variance, as its ``call`` does.

    ``shape`` is the shape of inputs that it was called with.
    """
    with moments_handled(lambda *_: (mean, variance)):
        inputs = tf.zeros([1 if size is None else size for size in [1, *shape[1:]]], mean.dtype)
        keras.layers.BatchNormalization.call(layer, inputs, training=True)


def in_order_of_creation(variables: Iterable[Any]) -> list[Any]:
    """Return TensorFlow's variables as they were created one after the other, which every run of a program repeats.

    A traced function lists its variables in an order that depends on their addresses. Private: ``_unique_id``, which
    ends in a number that counts up. Without it the order stays as it is.
    """

    def number(variable: Any) -> int:
        last = str(getattr(variable, "_unique_id", "")).rpartition("_")[2]
        return int(last) if last.isdecimal() else 0

    return sorted(variables, key=number)
