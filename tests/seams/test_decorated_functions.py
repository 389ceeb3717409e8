"""``tf.function`` within what is trained: its traces are not used, none is left in it, and the updates are exact."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import autobatch

TARGET = 32
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def masked(y, p):
    weight = tf.cast(y > 0, tf.float32)
    values = keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)
    return tf.reduce_sum(values * weight) / tf.reduce_sum(weight)


def kinds():
    """Classes made anew, with functions that were never traced."""

    @tf.function
    def keras_loss(y, p):
        return cross_entropy(y, p)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, 3])])
    def masked_loss(y, p):
        return masked(y, p)

    class Helper(keras.Model):
        loss_of = staticmethod(keras_loss)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = type(self).loss_of(y, self(x, training=True))
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    class MaskedHelper(Helper):
        loss_of = staticmethod(masked_loss)

    class Branching(Helper):
        @staticmethod
        @tf.function
        def loss_of(y, p):
            total = tf.constant(0.0)
            if tf.shape(y)[0] > 0:  # AutoGraph makes a branch of it
                total = cross_entropy(y, p)
            return total

    class Inner(keras.Model):
        def train_step(self, data):
            return {"loss": self.inner(*data)}

        @tf.function
        def inner(self, x, y):
            with tf.GradientTape() as tape:
                loss = cross_entropy(y, self(x, training=True))
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

    class Computed(keras.Model):
        @tf.function
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return cross_entropy(y, y_pred)

    class Compiled(keras.Model):
        compiled_loss = staticmethod(keras_loss)

    return {kind.__name__: kind for kind in (Helper, MaskedHelper, Branching, Inner, Computed, Compiled)}


def weights_after(name, sequence, samples, **options):
    """The first kernel after a sequence of trainings: by a micro-batch, or by plain Keras where that is None."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(samples, 6)).astype("float32"), random.integers(0, 3, samples)
    keras.utils.set_random_seed(0)
    kind, inputs = kinds()[name], keras.Input((6,))
    model = kind(inputs, keras.layers.Dense(3)(inputs))
    loss = getattr(kind, "compiled_loss", None)
    model.compile(keras.optimizers.SGD(0.1), **({} if loss is None else {"loss": loss}), **options)
    epochs = 1 if options.get("run_eagerly") else 2  # eager updates are slow
    for micro_batch in sequence:
        if micro_batch is None:
            model.fit(x, y, batch_size=TARGET, epochs=epochs, verbose=0, shuffle=False)
        else:
            ours = {"target_batch": TARGET, "micro_batch": micro_batch}
            autobatch.fit(model, x, y, **ours, epochs=epochs, verbose=0, shuffle=False)
    return model.get_weights()[0]


@functools.cache
def weights_after_plain(name, trainings):
    """The first kernel after some trainings by plain Keras, which several sequences are held against."""
    return weights_after(name, [None] * trainings, 64)


# A quotient of sums is not weighed where no graph tells it: run eagerly it is named, in test_loss_places.
TRACED_OR_EAGER = [(name, {}) for name in kinds()]
TRACED_OR_EAGER += [(name, {"run_eagerly": True}) for name in kinds() if name != "MaskedHelper"]


@pytest.mark.parametrize(("name", "options"), TRACED_OR_EAGER, ids=str)
def test_it_is_exact_with_a_tail_that_is_smaller_than_a_micro_batch(name, options):
    ours, plain = weights_after(name, [8], 68, **options), weights_after(name, [None], 68, **options)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sequence", [[None, 8], [TARGET, 8], [8, None], [8, TARGET, None, 5]], ids=str)
@pytest.mark.parametrize("name", ["MaskedHelper", "Inner", "Compiled"])
def test_no_training_finds_the_traces_of_another(name, sequence):
    ours, plain = weights_after(name, sequence, 64), weights_after_plain(name, len(sequence))
    np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-6)


def test_a_decorated_loop_behind_a_function_goes_on_to_its_tail():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(68, 6)).astype("float32"), random.integers(0, 3, 68)

    def trained(micro_batch):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        model, optimizer = keras.Model(inputs, keras.layers.Dense(3)(inputs)), keras.optimizers.SGD(0.1)

        @tf.function
        def update(x, y):
            with tf.GradientTape() as tape:
                loss = cross_entropy(y, model(x, training=True))
            optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)
            return loss

        def step(batch):
            return update(*batch)

        if micro_batch is not None:
            step = autobatch.wrap_step(
                step, model=model, optimizer=optimizer, target_batch=TARGET, micro_batch=micro_batch
            )
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(TARGET)
        return [float(step(batch)) for batch in batches], model.get_weights()[0]

    losses, kernel = trained(8)
    expected, plain = trained(None)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(kernel, plain, rtol=0, atol=1e-6)
