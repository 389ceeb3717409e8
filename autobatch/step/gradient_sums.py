"""Addition of a micro-batch's gradients, times its share of the effective batch, to the sums of those before."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from autobatch.types import Tensor, Variable


class Shares:
    """A micro-batch's share of the effective batch, on the host, in each dtype that gradients are summed in."""

    def __init__(self, fraction: Tensor) -> None:
        self._fraction = fraction
        self._by_dtype: dict[Any, tuple[Any, Any]] = {}

    def of(self, dtype: Any) -> tuple[Any, Any]:
        """Return the share and its negative."""
        if dtype not in self._by_dtype:
            with tf.device("CPU:0"):
                share = tf.cast(self._fraction, dtype)
                self._by_dtype[dtype] = share, -share
        return self._by_dtype[dtype]


def add_to(accumulator: Variable, gradient: Tensor, shares: Shares) -> None:
    """Add a dense gradient, or rows of one, to a variable that sums them."""
    scale, negative = shares.of(accumulator.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        scaled = tf.cast(gradient.values, accumulator.dtype) * scale
        accumulator.scatter_add(tf.IndexedSlices(scaled, gradient.indices))
    else:
        # One operation that adds a multiple, so that the product takes no memory beside the gradient.
        tf.raw_ops.ResourceApplyGradientDescent(
            var=accumulator.handle, alpha=negative, delta=tf.cast(gradient, accumulator.dtype)
        )
