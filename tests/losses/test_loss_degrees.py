"""Losses that people write themselves, against plain Keras: sums, vectors, quotients of sums, mixtures of them."""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import autobatch
from autobatch.errors import AutobatchWarning

TARGET, SAMPLES = 19, 45  # two updates, and one of a tail of 7
MICRO_BATCHES = (10, 5, 4)  # 2, 4 and 5 of them, each of two sizes


def squares(y, p):
    return tf.reduce_sum((y - p) ** 2, -1)


def weight_of(y):
    return tf.cast(y[:, 0] > 0, y.dtype)


def soft_dice(y, p):
    q, t = tf.sigmoid(p), tf.cast(y > 0, p.dtype)
    return 1 - (2 * tf.reduce_sum(q * t) + 1) / (tf.reduce_sum(q) + tf.reduce_sum(t) + 1)


def entropy_of_the_mean(y, p):
    mean = tf.reduce_mean(tf.nn.softmax(p), 0)
    return tf.reduce_mean(squares(y, p)) + tf.reduce_sum(mean * tf.math.log(mean))


def balance(y, p):
    chosen = tf.reduce_mean(tf.one_hot(tf.argmax(p, -1), 3, dtype=p.dtype), 0)
    return tf.reduce_mean(squares(y, p)) + 3 * tf.reduce_sum(chosen * tf.reduce_mean(tf.nn.softmax(p), 0))


def balanced(y, p):
    """Binary cross entropy weighed by how many entries of the batch are positive."""
    positive = tf.cast(y > 0, p.dtype)
    share = tf.reduce_mean(1 - positive)
    return tf.reduce_mean((positive - tf.sigmoid(p)) ** 2 * (share * positive + (1 - share) * (1 - positive)))


def samples_of(tensor):
    return tf.cast(tf.shape(tensor)[0], tensor.dtype)


LOSSES = {
    "vector": squares,
    "matrix": lambda y, p: (y - p) ** 2,
    "column": lambda y, p: squares(y, p)[:, None],
    "function of keras": keras.losses.mean_squared_error,
    "unreduced": lambda y, p: keras.losses.MeanSquaredError(reduction=None)(y, p),
    "mean": lambda y, p: tf.reduce_mean(squares(y, p)),
    "sum": lambda y, p: tf.reduce_sum(squares(y, p)),
    "sum by keras.ops": lambda y, p: ops.sum(ops.square(y - p)),
    "sum over its shape": lambda y, p: tf.reduce_sum(squares(y, p)) / samples_of(y),
    "sum over a constant": lambda y, p: tf.reduce_sum(squares(y, p)) / 16.0,
    "sum over its elements": lambda y, p: tf.reduce_sum((y - p) ** 2) / tf.cast(tf.size(p), p.dtype),
    "mean times its shape": lambda y, p: tf.reduce_mean(squares(y, p)) * samples_of(y),
    "sum and mean": lambda y, p: tf.reduce_mean(squares(y, p)) + 0.1 * tf.reduce_sum(tf.abs(p)) - 0.3,
    "sum of columns": lambda y, p: sum(tf.reduce_sum((y[:, i] - p[:, i]) ** 2) for i in range(3)),
    "l2_loss": lambda y, p: tf.nn.l2_loss(y - p),
    "average by global size": lambda y, p: tf.nn.compute_average_loss(squares(y, p), global_batch_size=16),
    "average": lambda y, p: tf.nn.compute_average_loss(squares(y, p)),
    "own keras sum": lambda y, p: keras.losses.MeanSquaredError(reduction="sum")(y, p) + tf.reduce_sum(p) * 0.1,
    "keras mean and own sum": lambda y, p: keras.losses.Huber()(y, p) + 0.1 * tf.reduce_sum(p**2),
    "picked by labels": lambda y, p: (
        -tf.reduce_sum(
            tf.gather_nd(
                tf.nn.log_softmax(p), tf.stack([tf.range(tf.shape(p)[0]), tf.argmax(y, -1, output_type=tf.int32)], 1)
            )
        )
    ),
    "masked mean": lambda y, p: tf.reduce_sum(squares(y, p) * weight_of(y)) / tf.reduce_sum(weight_of(y)),
    "masked mean without zero": lambda y, p: tf.math.divide_no_nan(
        tf.reduce_sum(squares(y, p) * weight_of(y)), tf.maximum(tf.reduce_sum(weight_of(y)), 1.0)
    ),
    "masked mean with epsilon": lambda y, p: (
        tf.reduce_mean(squares(y, p) * weight_of(y)) / (tf.reduce_mean(weight_of(y)) + 0.01)
    ),
    "mean of those picked": lambda y, p: tf.reduce_mean(tf.boolean_mask(squares(y, p), y[:, 0] > 0)),
    "sum of those picked": lambda y, p: tf.reduce_sum(tf.boolean_mask(p, y[:, 0] > 0) ** 2),
    "masked mean and sum": lambda y, p: (
        tf.reduce_sum(squares(y, p) * weight_of(y)) / tf.reduce_sum(weight_of(y)) + 0.01 * tf.reduce_sum(p**2)
    ),
    "dice of the batch": soft_dice,
    "entropy of the batch's mean": entropy_of_the_mean,
    "a router's balance": balance,
    "root of the mean": lambda y, p: tf.sqrt(tf.reduce_mean(squares(y, p))),
    "norm of the batch": lambda y, p: tf.norm(y - p),
    "sum of shares": lambda y, p: tf.reduce_sum(squares(y, p) * weight_of(y) / tf.reduce_sum(weight_of(y))),
    "balanced by the batch": balanced,
    "sum over one less": lambda y, p: tf.reduce_sum(squares(y, p)) / tf.cast(tf.shape(p)[0] - 1, p.dtype),
    "mean of a part": lambda y, p: tf.reduce_mean(
        tf.dynamic_partition(squares(y, p), tf.cast(y[:, 0] > 0, tf.int32), 2)[1]
    ),
    "covariance": lambda y, p: tf.reduce_sum(tf.matmul(p, p, transpose_a=True) ** 2) / samples_of(p) ** 2,
}


BESIDE_THE_BATCHS_OWN = {
    "vector and the batch's own": lambda y, p: squares(y, p) + soft_dice(y, p),
    "vector and sum": lambda y, p: squares(y, p) + 0.1 * tf.reduce_sum(p**2),
    "vector over all weights": lambda y, p: squares(y, p) * weight_of(y) / (tf.reduce_sum(weight_of(y)) + 0.01),
}
"""One number a sample, made of numbers of the whole batch."""


class InTheStep(keras.Model):
    loss_of = None

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = type(self).loss_of(y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss, "mean": tf.reduce_mean(loss)}


class ByCall(keras.losses.Loss):
    loss_of = None

    def __call__(self, y, p, sample_weight=None):
        return type(self).loss_of(y, p)


class ByAddLoss(keras.layers.Layer):
    def __init__(self, loss_of):
        super().__init__()
        self.loss_of = loss_of

    def call(self, p, y):
        self.add_loss(self.loss_of(y, p))
        return p


def data(dtype="float32", samples=SAMPLES):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(samples, 6)), random.normal(size=(samples, 3))
    return x.astype(dtype), y.astype(dtype)


def build(place, loss_of, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    # Keras itself cannot add what has a number for each sample to a regularizer's one number.
    regularizer = None if place == "__call__" else "l2"
    hidden = keras.layers.Dense(5, activation="tanh", kernel_regularizer=regularizer)(inputs)
    outputs = keras.layers.Dense(3)(hidden)
    optimizer = keras.optimizers.SGD(0.01)
    if place == "train_step":
        kind = type("Model", (InTheStep,), {"loss_of": staticmethod(loss_of)})
        model = kind(inputs, outputs)
        model.compile(optimizer, **options)
    elif place == "add_loss":
        targets = keras.Input((3,))
        model = keras.Model([inputs, targets], ByAddLoss(loss_of)(outputs, targets))
        model.compile(optimizer, **options)
    else:
        model = keras.Model(inputs, outputs)
        loss = type("Own", (ByCall,), {"loss_of": staticmethod(loss_of)})() if place == "__call__" else loss_of
        model.compile(optimizer, loss, **options)
    return model


def trained(place, loss_of, micro_batch, *, dtype="float32", **options):
    """What training changed, the losses, and what was said."""
    return trained_again(build(place, loss_of, **options), place, micro_batch, dtype)


def trained_again(model, place, micro_batch, dtype):
    """What :func:`trained` returns, of a model that may have been trained: it has its weights of before again then."""
    before = model.get_weights()
    x, y = data(dtype)
    arguments = {"x": [x, y]} if place == "add_loss" else {"x": x, "y": y}
    arguments |= {"epochs": 2, "shuffle": False, "verbose": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if micro_batch is None:
            history = model.fit(batch_size=TARGET, **arguments)
        else:
            history = autobatch.fit(
                model, arguments.pop("x"), target_batch=TARGET, micro_batch=micro_batch, cache=False, **arguments
            )
    moved = np.concatenate([(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)])
    model.set_weights(before)
    return moved, history.history, [str(each.message) for each in caught if each.category is AutobatchWarning]


@contextlib.contextmanager
def precise():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def apart(one, other):
    return float(np.linalg.norm(np.asarray(one) - np.asarray(other)) / np.linalg.norm(np.asarray(other)))


def require_exact(place, loss_of, *, dtype="float32", tolerance=1e-5, micro_batches=MICRO_BATCHES, **options):
    """Compare with plain Keras; of one model, what the first of several trainings has traced serves the others."""
    reference, plain, _ = trained(place, loss_of, None, dtype=dtype, **options)
    model = build(place, loss_of, **options)
    for micro_batch in micro_batches:
        moved, history, said = trained_again(model, place, micro_batch, dtype)
        assert apart(moved, reference) < tolerance, (micro_batch, np.linalg.norm(moved) / np.linalg.norm(reference))
        for name, values in plain.items():
            for value, expected in zip(history[name], values, strict=True):
                assert np.shape(value) == np.shape(expected)
                np.testing.assert_allclose(value, expected, rtol=max(10 * tolerance, 1e-12), err_msg=name)
        assert not said


@pytest.mark.parametrize("name", LOSSES)
def test_in_a_train_step(name):
    require_exact("train_step", LOSSES[name])


@pytest.mark.parametrize("name", [*LOSSES, *BESIDE_THE_BATCHS_OWN])
def test_given_to_compile(name):
    require_exact("compile", {**LOSSES, **BESIDE_THE_BATCHS_OWN}[name], micro_batches=(5,))


@pytest.mark.parametrize("name", BESIDE_THE_BATCHS_OWN)
def test_each_samples_number_with_the_batchs_own_in_it(name):
    loss_of = BESIDE_THE_BATCHS_OWN[name]
    reference, plain, _ = trained("train_step", loss_of, None)
    moved, history, said = trained("train_step", loss_of, 5)
    assert apart(moved, reference) < 1e-5
    np.testing.assert_allclose(history["mean"], plain["mean"], rtol=1e-4)
    assert np.shape(history["loss"][0]) == np.shape(plain["loss"][0])
    assert len(said) == 1
    assert "What train_step returns as 'loss' may not be the full batch's" in said[0]


@pytest.mark.parametrize(
    "name", ["vector", "sum", "mean", "sum and mean", "masked mean", "entropy of the batch's mean"]
)
@pytest.mark.parametrize("place", ["__call__", "add_loss"])
def test_elsewhere(place, name):
    require_exact(place, LOSSES[name], micro_batches=(5,))


@pytest.mark.parametrize("name", ["vector", "sum and mean", "masked mean", "dice of the batch"])
def test_compiled_by_xla(name):
    require_exact("train_step", LOSSES[name], micro_batches=(4,), jit_compile=True)


@pytest.mark.parametrize(
    "name", ["vector", "sum", "sum and mean", "masked mean", "dice of the batch", "sum of columns"]
)
def test_in_double_precision(name):
    with precise():
        require_exact("train_step", LOSSES[name], micro_batches=(3,), dtype="float64", tolerance=1e-12)
