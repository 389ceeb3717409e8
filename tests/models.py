"""Small models and data that several tests train, and a layer that really runs out of memory."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import autobatch

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


class Subclassed(keras.Model):
    """A model with a ``call`` of its own, not built before it has seen data."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(10)

    def call(self, inputs):
        return self.dense(inputs)


def run_out_if(asked):
    """A scalar zero tensor whose making really runs out of memory (64 TiB) when ``asked()`` is true at that moment.

    ``asked`` is plain Python and keeps its own count, so that rolling back TensorFlow's variables does not arm it anew.
    """
    size = tf.numpy_function(lambda: np.int64(1 << 44 if asked() else 1), [], tf.int64)
    return 0.0 * tf.random.normal(tf.reshape(size, [1]))[0]


class MemoryHog(layers.Layer):
    """Passes its inputs on, and runs out of memory for ``too_many(samples)``."""

    def __init__(self, too_many, **kwargs):
        super().__init__(**kwargs)
        self.too_many = too_many

    def call(self, inputs):
        samples = tf.shape(inputs)[0]
        size = tf.numpy_function(
            lambda samples: np.int64(1 << 44 if self.too_many(int(samples)) else 1), [samples], tf.int64
        )
        return inputs + 0.0 * tf.random.normal(tf.reshape(size, [1]))[0]


class CompiledHog(layers.Layer):
    """Asks for a matrix of 64 TiB, and for its square, for one size of micro-batch: XLA compiles each by itself."""

    def __init__(self, too_many):
        super().__init__()
        self.too_many = too_many

    def call(self, inputs):
        samples = tf.shape(inputs, out_type=tf.int64)[0]
        side = tf.where(samples == self.too_many, tf.constant(1 << 22, tf.int64), 1)
        matrix = tf.random.stateless_normal(tf.stack([side, side]), [1, 2])
        return inputs + 0.0 * tf.stop_gradient(tf.linalg.matmul(matrix, matrix)[0, 0])


class AtCall:
    """True at the given calls alone, counted from 0."""

    def __init__(self, *calls):
        self.calls = set(calls)
        self.count = -1

    def __call__(self, *_):
        self.count += 1
        return self.count in self.calls


def recorded_gradients(model, updates=16):
    """The gradients of each of the first updates that the model's optimizer will make: a function that returns them.

    Weights do not tell: float32 rounds them by more than an update's own error.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    kept = [tf.Variable(tf.zeros([updates, *v.shape], v.dtype), trainable=False) for v in model.trainable_variables]
    # Keras's TensorFlow optimizers are given what is inside of Keras's variables.
    places = {id(variable.value): place for place, variable in enumerate(model.trainable_variables)}
    own = optimizer.update_step

    def update_step(gradient, variable, learning_rate):
        update = tf.convert_to_tensor(optimizer.iterations)
        kept[places[id(variable)]].scatter_nd_update([[update]], tf.convert_to_tensor(gradient)[None])
        own(gradient, variable, learning_rate)

    optimizer.__dict__["update_step"] = update_step
    return lambda: [one[update].numpy() for one in kept for update in range(updates)]


def relative_error(actual, expected):
    """The largest difference of two lists of arrays, relative to the largest magnitude in each."""
    return max(
        float(np.max(np.abs(a - e))) / max(float(np.max(np.abs(e))), 1e-12)
        for a, e in zip(actual, expected, strict=True)
        if np.size(e)
    )


def said_of(run):
    """The texts of the warnings of autobatch's that ``run`` causes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if warning.category is autobatch.AutobatchWarning]
