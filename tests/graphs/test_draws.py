"""Random draws are told by what the step does, whoever makes them; what draws nothing is not named."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import SAMPLES, arrays, said_of

import autobatch

GENERATOR = tf.random.Generator.from_seed(1)


def compiled(*extra, cls=keras.Sequential, **options):
    keras.utils.set_random_seed(1)
    model = cls([keras.Input((16,)), *extra, layers.Dense(10, name="last")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, **options)
    return model


def said_in_fit(model):
    return said_of(lambda: autobatch.fit(model, *arrays(), target_batch=SAMPLES, micro_batch=24, verbose=0))


class Does(layers.Layer):
    """Does to its inputs what a function says."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change

    def call(self, inputs, training=None):
        return self.change(inputs)


def layer(change, **options):
    return lambda: compiled(Does(change, name="own"), **options)


def in_a_branch(x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: x + tf.random.normal(tf.shape(x)), lambda: x)


def in_a_loop(x):
    return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * tf.random.uniform([])), (0, x))[1]


@tf.function
def in_a_function(x):
    return x + tf.random.normal(tf.shape(x))


def of_a_seed_generator(x):
    return keras.random.dropout(x, 0.5)


def of_fixed_seed(x):
    return x + keras.random.normal(ops.shape(x), seed=3)


def for_each_sample(seeds):
    return tf.map_fn(
        lambda seed: tf.random.stateless_normal([16], seed), seeds, fn_output_signature=tf.TensorSpec([16], tf.float32)
    )


def of_the_samples(x):
    """Numbers that depend on each sample alone: the same, however the batch is cut."""
    return x + for_each_sample(tf.cast(tf.round(x[:, :2] * 1000), tf.int32))


def of_seeds_from_a_generator(x):
    return x + for_each_sample(tf.transpose(GENERATOR.make_seeds(SAMPLES))[: tf.shape(x)[0]])


def of_the_whole_batch(x):
    return x + tf.random.stateless_normal(tf.shape(x), tf.cast(x[0, :2] * 1000, tf.int32))


def of_a_seed_in_a_branch(x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: of_fixed_seed(x), lambda: x)


class Wasteful(layers.Layer):
    def call(self, inputs):
        self.unused = tf.random.normal(tf.shape(inputs))
        return inputs


class NoisyStep(keras.Sequential):
    def train_step(self, data):
        x, y = data
        return super().train_step((x + tf.random.normal(tf.shape(x)), y))


class NoisyLoss(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred * keras.random.uniform(ops.shape(y_pred)), sample_weight, training)


def own_loss(y, predicted):
    noisy = predicted + tf.random.normal(tf.shape(predicted))
    return keras.losses.sparse_categorical_crossentropy(y, noisy, from_logits=True)


class WithAnIdleGenerator(layers.Layer):
    """As KerasHub's DropPath: it holds a generator, and draws only where its rate is not zero."""

    def __init__(self, rate, **options):
        super().__init__(**options)
        self.probability = rate
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, inputs, training=None):
        if not training or self.probability == 0.0:
            return inputs
        return inputs * keras.random.uniform((ops.shape(inputs)[0], 1), seed=self.seed_generator)


OWN = r"of \d+: Does \(own\) draws new random numbers in each micro-batch\. See docs/\S+#random-draws\.$"
DRAWN = {
    "tf.random in a layer": (layer(lambda x: x + tf.random.normal(tf.shape(x))), OWN),
    "keras.random in a layer": (layer(of_a_seed_generator), OWN),
    "one number for all": (layer(lambda x: x * tf.random.uniform([])), OWN),
    "shuffled": (layer(lambda x: x + tf.random.shuffle(x)), OWN),
    "categorical": (layer(lambda x: x + tf.cast(tf.random.categorical(x, 1), tf.float32)), OWN),
    "gamma": (layer(lambda x: x + keras.random.gamma(ops.shape(x), 2.0)), OWN),
    "a generator of TensorFlow's": (layer(lambda x: x + GENERATOR.normal(tf.shape(x))), OWN),
    "in a branch": (layer(in_a_branch), OWN),
    "in a loop": (layer(in_a_loop), OWN),
    "in a function": (layer(in_a_function), OWN),
    "compiled by XLA": (layer(of_a_seed_generator, jit_compile=True), OWN),
    "seed of its own": (lambda: compiled(WithAnIdleGenerator(0.5, name="own")), OWN.replace("Does", "With.*Generator")),
    "Lambda": (
        lambda: compiled(layers.Lambda(lambda x: x + keras.random.normal((16,)), output_shape=(16,), name="own")),
        OWN.replace("Does", "Lambda"),
    ),
    "GaussianNoise": (lambda: compiled(layers.GaussianNoise(0.1, name="own")), OWN.replace("Does", "GaussianNoise")),
    "two classes": (
        lambda: compiled(layers.Dropout(0.5, name="a"), layers.GaussianNoise(0.1, name="b"), layers.Dropout(0.0)),
        r"Dropout \(a\) and GaussianNoise \(b\) draw new random numbers",
    ),
    "train_step": (lambda: compiled(cls=NoisyStep), r"of \d+: NoisyStep.train_step draws new random numbers"),
    "compute_loss": (lambda: compiled(cls=NoisyLoss), r"of \d+: NoisyLoss.compute_loss draws new random numbers"),
    "fixed seed": (layer(of_fixed_seed), r"The seed of Does \(own\) does not change: each micro-batch gets the same"),
    "fixed seed in a branch": (layer(of_a_seed_in_a_branch), r"The seed of Does \(own\) does not change"),
    "seeds from a generator": (layer(of_seeds_from_a_generator), OWN),
    "seed of the data": (layer(of_the_whole_batch), r"may not be identical.*Does \(own\) may draw new random numbers"),
}


@pytest.mark.parametrize("case", DRAWN)
def test_what_draws_is_named(case):
    build, words = DRAWN[case]
    (said,) = said_in_fit(build())
    assert re.search(words, said)


def test_a_loss_that_draws_is_named():
    model = compiled()
    model.compile("sgd", own_loss)
    (said,) = said_in_fit(model)
    assert "of 48: The loss draws new random numbers in each micro-batch." in said


NOT_DRAWN = {
    "rates of zero": lambda: compiled(layers.Dropout(0.0), layers.GaussianNoise(0.0)),
    "an idle generator": lambda: compiled(WithAnIdleGenerator(0.0)),
    "seeds of the samples": layer(of_the_samples),
    "unused": lambda: compiled(Wasteful()),
    "a constant of a fixed seed": layer(lambda x: x + keras.random.normal((16,), seed=3)),
    "a branch that is never taken": layer(
        lambda x: tf.cond(tf.constant(False), lambda: x + tf.random.normal(tf.shape(x)), lambda: x)
    ),
}


@pytest.mark.parametrize("case", NOT_DRAWN)
def test_what_draws_nothing_is_not_named_and_is_exact(case):
    model, plain = NOT_DRAWN[case](), NOT_DRAWN[case]()
    plain.set_weights(model.get_weights())
    assert said_in_fit(model) == []
    plain.fit(*arrays(), batch_size=SAMPLES, verbose=0)
    for own, expected in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-6)


def test_what_a_loop_draws_is_named():
    model, optimizer = compiled(), keras.optimizers.SGD(0.1)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x + tf.random.normal(tf.shape(x)), training=True))
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=SAMPLES, micro_batch=24)
    (said,) = said_of(lambda: step(arrays()))
    assert "of 48: The train_step of this loop draws new random numbers in each micro-batch." in said


def test_of_an_eager_model_layers_that_hold_a_generator_may_draw_and_the_first_micro_batch_shows_more():
    extra = [layers.Dropout(0.5, name="drop"), WithAnIdleGenerator(0.5, name="idle")]
    extra += [Does(lambda x: x + tf.random.normal(tf.shape(x)), name="own")]
    before, after = said_in_fit(compiled(*extra, run_eagerly=True))
    assert "of 48: Dropout (drop) draws new random numbers in each micro-batch; and 1 more difference." in before
    assert re.search(r"shows what else differs from the full batch: .*Does \(own\) draws new random numbers", after)
    assert "idle" not in after


def test_marks_and_patches_end_with_the_trace():
    create = tf.Graph._create_op_internal
    for options in ({}, {"run_eagerly": True}):
        said_in_fit(compiled(layers.Dropout(0.5), **options))
    assert tf.Graph._create_op_internal is create
    from tensorflow.python.eager import context, execute

    assert not context.context().op_callbacks
    assert execute.execute is execute.quick_execute
