"""Loop over the micro-batches of an effective batch, inside TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from autobatch.step.division import Division
from autobatch.tensors.batch_structure import cut
from autobatch.types import Tensor


def loop(
    leaves: list[Tensor],
    samples: Any,
    division: Division,
    carried: Any,
    body: Callable[..., Any],
    *,
    each: int | None = None,
) -> Any:
    """Run ``body(part, fraction, carried) -> carried`` for each micro-batch in turn; return what the last one carries.

    ``part`` holds the leaves of a micro-batch, and ``fraction`` is its share of ``samples``. All micro-batches have
    ``each`` samples, and their parts have a static shape, unless it is None.
    """

    def step(start: Any, carried: Any) -> tuple[Any, Any]:
        with tf.device("CPU:0"):
            is_larger = start < division.larger_samples
            # tf.where would look for shapes to broadcast in every micro-batch.
            taken = tf.raw_ops.Select(condition=is_larger, x=division.larger, y=division.smaller)
            stop = start + taken
            fraction = tf.cast(taken, tf.float64) / tf.cast(samples, tf.float64)
            part = [_of_size(cut(leaf, start, stop), each) for leaf in leaves]
        return stop, body(part, fraction, carried)

    with tf.device("CPU:0"):
        start = tf.constant(0, tf.int64)

    def more(start: Any, _: Any) -> Any:
        with tf.device("CPU:0"):  # a comparison on the device would make every micro-batch wait for it
            return start < samples

    if tf.executing_eagerly():
        while int(start) < int(samples):
            start, carried = step(start, carried)
        return carried
    invariants = tf.nest.map_structure(
        lambda tensor: tf.TensorShape([None if d == 0 else d for d in tensor.shape]), carried
    )
    _, carried = tf.while_loop(
        more,
        step,
        (start, carried),
        shape_invariants=(start.shape, invariants),
        parallel_iterations=1,
    )
    return carried


def _of_size(leaf: Tensor, samples: int | None) -> Any:
    """Return a leaf whose shape says that it has as many samples; None leaves it open."""
    if samples is None or not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
        return leaf
    return tf.ensure_shape(leaf, [samples, *leaf.shape[1:]])
