"""Small models and data that several tests train, and a layer that really runs out of memory."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers

SAMPLES = 48


def arrays(seed=0, samples=SAMPLES, features=16, classes=10):
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, features)).astype("float32")
    return x, random.integers(0, classes, samples)


def classifier(optimizer="sgd", loss=None, *, metrics=("accuracy",), extra=(), seed=1, **compile_options):
    """A dense classifier of 16 features into 10 classes; the same weights for the same seed."""
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((16,)), layers.Dense(32, activation="relu"), *extra, layers.Dense(10)]
    model = keras.Sequential(stack)
    model.compile(
        optimizer,
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=list(metrics),
        **compile_options,
    )
    return model


@keras.saving.register_keras_serializable("autobatch_tests")
class MemoryHog(layers.Layer):
    """Asks for 64 TiB when a batch has more than ``most`` samples, so that a genuine out-of-memory error is raised.

    ``armed`` limits it to some of its calls: it counts calls above no limit itself, and fails while it is positive.
    """

    def __init__(self, most, **kwargs):
        super().__init__(**kwargs)
        self.most = tf.Variable(most, dtype=tf.int32, trainable=False)
        self.calls = tf.Variable(0, dtype=tf.int32, trainable=False)
        self.fail_at_call = tf.Variable(-1, dtype=tf.int32, trainable=False)

    def call(self, inputs):
        call = self.calls.assign_add(1)
        samples = tf.shape(inputs)[0]
        too_big = tf.logical_or(samples > self.most, tf.equal(call, self.fail_at_call))
        size = tf.where(too_big, tf.constant(1 << 44, tf.int64), tf.constant(1, tf.int64))
        return inputs + 0.0 * tf.random.normal([size])[0]


def relative_error(actual, expected):
    """The largest difference of two lists of arrays, relative to the largest magnitude in each."""
    return max(
        float(np.max(np.abs(a - e))) / max(float(np.max(np.abs(e))), 1e-12)
        for a, e in zip(actual, expected, strict=True)
        if np.size(e)
    )
