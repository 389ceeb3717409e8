"""Which updates are called sums over samples: those that are, of what the analysis knows, and never one that is not."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from autobatch.metrics.row_sums import Kinds

RIGHT = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], "float32")
GIVEN = np.random.default_rng(0).uniform(0.1, 1, (5, 3)).astype("float32")

SUMS = {
    "differences": lambda right, given: tf.reduce_sum(tf.abs(right - given)),
    "a vector of sums": lambda right, given: tf.reduce_sum(right * given, axis=0),
    "means of rows": lambda right, given: tf.reduce_sum(tf.reduce_mean(tf.square(right - given), axis=-1)),
    "samples": lambda right, given: tf.cast(tf.shape(right)[0], tf.float32),
    "elements": lambda right, given: tf.cast(tf.size(right), tf.float32),
    "hits": lambda right, given: tf.reduce_sum(
        tf.cast(tf.argmax(right, axis=-1) == tf.argmax(given, axis=-1), tf.float32)
    ),
    "of one column": lambda right, given: tf.reduce_sum(right[:, 1] * given[..., 0]),
    "of a threshold": lambda right, given: tf.reduce_sum(tf.where(given > 0.5, right, tf.zeros_like(right))) / 3.0,
    "flat": lambda right, given: tf.reduce_sum(tf.reshape(right, [-1]) * tf.reshape(given, [-1])),
    "softmax": lambda right, given: tf.reduce_sum(right * tf.nn.log_softmax(given)),
    "products": lambda right, given: tf.matmul(right, given, transpose_a=True),
    "by class": lambda right, given: tf.math.unsorted_segment_sum(given, tf.argmax(right, axis=-1), 3),
    "by table": lambda right, given: tf.reduce_sum(tf.gather(tf.constant([1.0, 2.0, 3.0]), tf.argmax(right, axis=-1))),
    "weighed by a matrix": lambda right, given: tf.reduce_sum(tf.matmul(right, tf.constant([[1.0], [2.0], [3.0]]))),
}

OTHERS = {
    "mean": lambda right, given: tf.reduce_mean(given),
    "one": lambda right, given: tf.constant(1.0),
    "ratio": lambda right, given: tf.reduce_sum(right * given) / tf.reduce_sum(given),
    "square of a sum": lambda right, given: tf.square(tf.reduce_sum(given)),
    "product of sums": lambda right, given: tf.reduce_sum(right) * tf.reduce_sum(given),
    "sum and a constant": lambda right, given: tf.reduce_sum(given) + 1.0,
    "largest": lambda right, given: tf.reduce_max(given),
    "by the largest": lambda right, given: tf.reduce_sum(given / tf.reduce_max(given)),
    "centred": lambda right, given: tf.reduce_sum(tf.square(given - tf.reduce_mean(given, axis=0))),
    "softmax over samples": lambda right, given: tf.reduce_sum(right * tf.nn.softmax(given, axis=0)),
    "all with all": lambda right, given: tf.reduce_sum(tf.matmul(right, given, transpose_b=True)),
    "broadcast": lambda right, given: tf.reduce_sum(tf.abs(given[:, :1] - tf.transpose(given[:, :1]))),
    "rounded": lambda right, given: tf.cast(tf.cast(tf.reduce_sum(given), tf.int32), tf.float32),
    "any": lambda right, given: tf.cast(tf.reduce_any(given > 0.9), tf.float32),
    "cumulated": lambda right, given: tf.reduce_sum(tf.cumsum(given)),
    "shifted": lambda right, given: tf.reduce_sum(given[1:] - given[:-1]),
    "first": lambda right, given: tf.reduce_sum(given[0]),
    "every second": lambda right, given: tf.reduce_sum(given[::2]),
    "rows mixed by shape": lambda right, given: tf.reduce_sum(
        tf.square(tf.reduce_sum(tf.reshape(given, [-1, 5]), axis=-1))
    ),
    "constants of samples": lambda right, given: (
        tf.reduce_sum(given * tf.reshape(tf.range(15.0), [5, 3])[:1] ** 2) / tf.cast(tf.shape(given)[0], tf.float32)
    ),
}


def state_after(update, sizes):
    total = tf.Variable(tf.zeros_like(update(RIGHT, GIVEN)))
    start = 0
    for size in sizes:
        total.assign_add(update(tf.constant(RIGHT[start : start + size]), tf.constant(GIVEN[start : start + size])))
        start += size
    return total.numpy()


def verdict(update, write=lambda total, added: total.assign_add(added)):
    total = tf.Variable(tf.zeros_like(update(RIGHT, GIVEN)))
    rows = []

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, 3])] * 2)
    def updated(right, given):
        rows.extend([right, given])
        write(total, update(right, given))

    graph = updated.get_concrete_function().graph
    return Kinds(graph, rows).adds_sums_alone()


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_over_samples(name):
    update = SUMS[name]
    np.testing.assert_allclose(state_after(update, [2, 3]), state_after(update, [5]), rtol=1e-5)
    assert verdict(update)
    assert verdict(update, lambda total, added: total.assign(total + added))
    assert verdict(update, lambda total, added: total.assign_sub(added))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none(name):
    assert not verdict(OTHERS[name])


@pytest.mark.parametrize(
    "write",
    [
        lambda total, added: total.assign(added),
        lambda total, added: total.assign(0.9 * total + added),
        lambda total, added: total.assign(tf.maximum(total, added)),
        lambda total, added: total.assign(added - total),
        lambda total, added: total.assign_add(added * total),
    ],
)
def test_a_sum_that_is_written_otherwise(write):
    assert not verdict(SUMS["differences"], write)
