"""Sums over all replicas."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def all_reduce(values: list[Any], device: str) -> list[Any]:
    """Sum each value over all replicas, those of one dtype in one all-reduce; ``device`` is the replica's own."""
    results: list[Any] = [None] * len(values)
    context = tf.distribute.get_replica_context()
    for dtype in dict.fromkeys(value.dtype for value in values):
        places = [place for place, value in enumerate(values) if value.dtype == dtype]
        # tf.distribute asks where each value is, which an argument of a function does not show.
        with tf.device(device):
            placed = [tf.identity(values[place]) for place in places]
        for place, result in zip(places, context.all_reduce(tf.distribute.ReduceOp.SUM, placed), strict=True):
            results[place] = result
    return results
