"""What a step returns is the effective batch's: results of metrics whatever they are called, and what is no result."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import SAMPLES, AtCall, MemoryHog, arrays, classifier, relative_error

import autobatch


class Autoencoder(keras.Model):
    """Keras's own example of a variational autoencoder, without its noise; and results computed with further."""

    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(8)
        self.decoder = layers.Dense(16)
        self.total = keras.metrics.Mean(name="total_loss")
        self.error = keras.metrics.RootMeanSquaredError(name="error")
        self.score = keras.metrics.R2Score(name="score")

    @property
    def metrics(self):
        return [self.total, self.error, self.score]

    def losses_of(self, x):
        mean, log_variance = tf.split(self.encoder(x), 2, axis=-1)
        reconstruction = self.decoder(mean)
        squares = tf.reduce_mean(tf.reduce_sum(tf.square(x - reconstruction), axis=-1))
        kl = tf.reduce_mean(-0.5 * tf.reduce_sum(1 + log_variance - mean**2 - tf.exp(log_variance), axis=-1))
        self.total.update_state(squares + kl)
        self.error.update_state(x, reconstruction)
        self.score.update_state(x, reconstruction)
        return squares + kl, kl

    def logs(self, loss, kl):
        # "score" is the name of a metric, but not what is under it.
        results = {"loss": self.total.result(), "error": self.error.result(), "r2": self.score.result()}
        return {**results, "kl": kl, "score": loss}

    def train_step(self, x):
        with tf.GradientTape() as tape:
            loss, kl = self.losses_of(x)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return self.logs(loss, kl)

    def test_step(self, x):
        return self.logs(*self.losses_of(x))


class Further(Autoencoder):
    def logs(self, loss, kl):
        return {**super().logs(loss, kl), "root": tf.sqrt(self.total.result()), "nested": [self.total.result(), loss]}


class TraceFindings(Autoencoder):
    @tf.function
    def train_step(self, x):
        return super().train_step(x)


class Eager(Autoencoder):
    """Without a graph nothing tells what a value under a metric's name is, if not its result."""

    def logs(self, loss, kl):
        return {name: value for name, value in super().logs(loss, kl).items() if name != "score"}


class Numbers(Eager):
    def logs(self, loss, kl):
        return {name: float(value) for name, value in super().logs(loss, kl).items()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Further, {}),
        (Further, {"jit_compile": True}),
        (Eager, {"run_eagerly": True}),
        (Numbers, {"run_eagerly": True}),
        (TraceFindings, {}),
    ],
)
def test_results_are_known_by_what_they_are(kind, options):
    x, _ = arrays(samples=90)

    def build():
        keras.utils.set_random_seed(1)
        model = kind()
        model.compile(keras.optimizers.SGD(0.01), **options)
        return model

    common = {"epochs": 2, "shuffle": False, "verbose": 0, "validation_data": (x[:30],), "validation_batch_size": 20}
    plain, ours = build(), build()
    expected = plain.fit(x, batch_size=SAMPLES, **common)
    actual = autobatch.fit(ours, x, target_batch=SAMPLES, micro_batch=11, **common)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    assert actual.history.keys() == expected.history.keys()
    assert {"loss", "kl", "val_loss", "val_error"} <= set(expected.history)
    for name, values in expected.history.items():
        for there, here in zip(values, actual.history[name], strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-5, err_msg=name)


def test_what_compute_metrics_adds_to_and_overwrites():
    class Counting(keras.Sequential):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            logs["correct"] = logs.pop("accuracy")
            logs["share"] = 1 - logs["correct"]
            logs["confidence"] = ops.mean(ops.max(ops.softmax(y_pred), axis=-1))
            logs["loss"] = self.compute_loss(x, y, y_pred, sample_weight)
            return logs

    def build():
        keras.utils.set_random_seed(1)
        model = Counting([keras.Input((16,)), layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, metrics=["accuracy"])
        return model

    x, y = arrays(samples=90)
    expected = build().fit(x, y, batch_size=SAMPLES, shuffle=False, verbose=0)
    actual = autobatch.fit(build(), x, y, target_batch=SAMPLES, micro_batch=11, shuffle=False, verbose=0)
    assert set(expected.history) == {"correct", "share", "confidence", "loss"}
    for name, values in expected.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("decorate", [lambda step: step, tf.function], ids=["function", "tf.function"])
def test_a_loop_that_keeps_metrics(jit_compile, decorate):
    """Its results are the effective batch's, and what a failed attempt added to them is gone."""
    x, y = arrays(samples=60)
    batches = [(x[:SAMPLES], y[:SAMPLES]), (x[SAMPLES:], y[SAMPLES:]), (x[:SAMPLES], y[:SAMPLES])]

    def make(asked):
        model = classifier(extra=[] if jit_compile else [MemoryHog(asked)])  # a numpy_function is not for XLA
        inner = keras.optimizers.SGD(0.1)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=64.0, dynamic_growth_steps=2)
        optimizer.build(model.trainable_variables)
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        mean, accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()

        @decorate
        def step(batch):
            with tf.GradientTape() as tape:
                logits = model(batch[0], training=True)
                loss = loss_of(batch[1], logits)
                scaled = optimizer.scale_loss(loss)
            optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
            mean.update_state(loss)
            accuracy.update_state(batch[1], logits)
            return mean.result(), {"accuracy": accuracy.result(), "loss": loss}

        return model, optimizer, step

    plain, plain_optimizer, plain_step = make(lambda samples: False)
    expected = [tf.nest.flatten(plain_step(batch)) for batch in batches]
    # The third micro-batch of the second attempt at an update fails: two had been counted by then.
    model, optimizer, step = make(AtCall(6))
    wrapped = autobatch.wrap_step(
        step, model=model, optimizer=optimizer, target_batch=SAMPLES, micro_batch=11, jit_compile=jit_compile
    )
    actual = [tf.nest.flatten(wrapped(batch)) for batch in batches]
    assert len(wrapped.recoveries) == (0 if jit_compile else 1)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert relative_error(model.get_weights(), plain.get_weights()) < 1e-5
    assert float(optimizer.dynamic_scale.numpy()) == float(plain_optimizer.dynamic_scale.numpy()) == 128.0


def test_a_loop_under_tf_function_goes_on_after_a_whole_batch_ran_out_of_memory():
    x, y = arrays()

    def make(asked):
        model = classifier(extra=[MemoryHog(asked)])
        optimizer = keras.optimizers.SGD(0.1)
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @tf.function
        def step(batch):
            with tf.GradientTape() as tape:
                loss = loss_of(batch[1], model(batch[0], training=True))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            return loss

        return model, optimizer, step

    plain, _, plain_step = make(lambda samples: False)
    expected = [float(plain_step((x, y))) for _ in range(2)]
    model, optimizer, step = make(AtCall(1))
    wrapped = autobatch.wrap_step(step, model=model, optimizer=optimizer, target_batch=SAMPLES, micro_batch=SAMPLES)
    np.testing.assert_allclose([float(wrapped((x, y))) for _ in range(2)], expected, rtol=1e-5)
    assert [recovery.micro_batch_before for recovery in wrapped.recoveries] == [SAMPLES]
    assert relative_error(model.get_weights(), plain.get_weights()) < 1e-5


def mae_of_the_batch(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_a_metric_that_makes_one_number_of_a_batch(options):
    x, _ = arrays(samples=100)

    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), layers.Dense(1)])
        model.compile("sgd", "mse", metrics=[mae_of_the_batch, keras.losses.MeanSquaredError(name="again")], **options)
        return model

    common = {"epochs": 2, "shuffle": False, "verbose": 0, "validation_data": (x[:30], x[:30, :1])}
    expected = build().fit(x, x[:, :1], batch_size=40, **common)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = autobatch.fit(build(), x, x[:, :1], target_batch=40, micro_batch=14, **common)
    for name, values in expected.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=1e-5, err_msg=name)
    said = [str(warning.message) for warning in caught if warning.category is autobatch.AutobatchWarning]
    assert not said  # the function is given the whole batch, and the loss is averaged by what it is a mean of


def test_metrics_of_samples_are_not_named(recwarn):
    x, y = arrays()
    metrics = ["accuracy", keras.metrics.TopKCategoricalAccuracy(2), keras.losses.CategoricalCrossentropy()]
    model = classifier("sgd", keras.losses.CategoricalCrossentropy(from_logits=True), metrics=metrics)
    autobatch.fit(model, x, np.eye(10)[y], target_batch=SAMPLES, micro_batch=11, verbose=0)
    assert not [warning for warning in recwarn if warning.category is autobatch.AutobatchWarning]
