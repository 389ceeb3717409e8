"""Nothing is said of assignments, updates, rows and products that are the same for micro-batches."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import SAMPLES, arrays, said_of

import autobatch


def cross_entropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def fit(model, x, y):
    return said_of(lambda: autobatch.fit(model, x, y, target_batch=SAMPLES, micro_batch=18, epochs=3, verbose=0))


def assert_as_plain(build, x, y, *, tolerance=2e-6):
    """Train both ways, in plain Keras eagerly but under XLA; return what was said."""
    ours, plain = build(), build()
    plain.run_eagerly = not plain.jit_compile
    plain.set_weights(ours.get_weights())
    said = fit(ours, x, y)
    plain.fit(x, y, batch_size=SAMPLES, epochs=3, verbose=0)
    for own, expected in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(own, expected, rtol=0, atol=tolerance)
    return said


class Pair(keras.Model):
    """Two networks with an optimizer each; both losses are Keras's."""

    def __init__(self, **options):
        super().__init__()
        keras.utils.set_random_seed(1)
        self.generator = keras.Sequential([keras.Input((16,)), layers.Dense(16, activation="tanh")])
        self.critic = keras.Sequential([keras.Input((16,)), layers.Dense(10)])
        self.build((None, 16))
        self.compile(**options)
        self.d_optimizer, self.g_optimizer = keras.optimizers.SGD(0.5), keras.optimizers.SGD(0.5)

    def call(self, x):
        return self.critic(self.generator(x))


class TakesAllFirst(Pair):
    """As CycleGAN: all gradients are taken before the first update."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            of_critic = cross_entropy()(y, self.critic(x))
            of_generator = cross_entropy()(y, self(x))
        mine, theirs = self.critic.trainable_weights, self.generator.trainable_weights
        critic, generator = tape.gradient(of_critic, mine), tape.gradient(of_generator, theirs)
        self.d_optimizer.apply_gradients(zip(critic, mine, strict=True))
        self.g_optimizer.apply_gradients(zip(generator, theirs, strict=True))
        return {"loss": of_critic}


class TakesInTurn(Pair):
    """As DCGAN: the generator's gradients see the critic that has just been updated."""

    def train_step(self, data):
        x, y = data
        mine, theirs = self.critic.trainable_weights, self.generator.trainable_weights
        with tf.GradientTape() as tape:
            of_critic = cross_entropy()(y, self.critic(x))
        self.d_optimizer.apply_gradients(zip(tape.gradient(of_critic, mine), mine, strict=True))
        with tf.GradientTape() as tape:
            of_generator = cross_entropy()(y, self(x))
        self.g_optimizer.apply_gradients(zip(tape.gradient(of_generator, theirs), theirs, strict=True))
        return {"loss": of_critic}


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "XLA"])
def test_two_optimizers_whose_gradients_are_taken_first_are_exact_and_not_named(options):
    assert assert_as_plain(lambda: TakesAllFirst(**options), *arrays()) == []


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "XLA"])
def test_two_optimizers_of_which_one_sees_the_others_update_are_exact_and_not_named(options):
    assert assert_as_plain(lambda: TakesInTurn(**options), *arrays()) == []


def test_eager_optimizers_of_which_one_sees_the_others_update_are_refused_by_name():
    model, x, y = TakesInTurn(run_eagerly=True), *arrays()
    with pytest.raises(ValueError, match="computes with weights that it has just updated.*Received: TakesInTurn$"):
        autobatch.fit(model, x, y, target_batch=SAMPLES, micro_batch=24, verbose=0)


def test_eager_optimizers_that_see_no_updates_are_exact_and_not_named():
    assert assert_as_plain(lambda: TakesAllFirst(run_eagerly=True), *arrays()) == []


def test_a_search_shows_that_eager_optimizers_see_no_updates():
    model, x, y = TakesAllFirst(run_eagerly=True), *arrays()
    report = autobatch.tune(model, x, y, max_trials=1, cache=False)
    assert report.warnings == ()


class Masked(layers.Layer):
    """A layer with a kernel that it prunes, or changes otherwise, in every call."""

    def __init__(self, change, *, trainable_kernel=True, **options):
        super().__init__(**options)
        self.change = change
        self.trainable_kernel = trainable_kernel

    def build(self, shape):
        seeds = {"initializer": keras.initializers.GlorotUniform(seed=1)}
        self.kernel = self.add_weight(shape=(16, 16), name="kernel", trainable=self.trainable_kernel, **seeds)
        pattern = (np.arange(256).reshape(16, 16) % 3 > 0).astype("float32")
        self.mask = self.add_weight(shape=(16, 16), name="mask", trainable=False, initializer="zeros")
        self.mask.assign(pattern)
        self.last = self.add_weight(shape=(), name="last", trainable=False, initializer="zeros")

    def call(self, inputs):
        self.change(self, inputs)
        return ops.matmul(inputs, self.kernel)


def by_mask(layer, _):
    layer.kernel.assign(layer.kernel * layer.mask)


def by_booleans(layer, _):
    layer.kernel.assign(layer.kernel * ops.cast(layer.mask > 0.5, "float32"))


def by_clamps(layer, _):
    layer.kernel.assign(ops.clip(layer.kernel, -0.2, 0.2))


def by_a_constant(layer, _):
    layer.last.assign(3.0)


def by_another_variable(layer, _):
    layer.last.assign(ops.mean(layer.mask))


def by_halves(layer, _):
    layer.kernel.assign(layer.kernel * (0.5 * layer.mask + 0.5))


def by_the_batch(layer, inputs):
    layer.last.assign(ops.mean(inputs))


def by_a_count(layer, _):
    layer.last.assign(layer.last + 1.0)


def by_two(layer, _):
    layer.kernel.assign(layer.kernel * layer.mask)
    layer.kernel.assign(layer.kernel + 0.01)


def pruned(change, **options):
    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), Masked(change, **options), layers.Dense(10)])
        model.compile(keras.optimizers.SGD(0.3), cross_entropy())
        return model

    return build


@pytest.mark.parametrize(
    "change", [by_mask, by_booleans, by_clamps, by_a_constant, by_another_variable, by_the_batch, by_a_count]
)
def test_what_is_assigned_the_same_again_or_once_an_update_is_exact_and_not_named(change):
    assert assert_as_plain(pruned(change), *arrays()) == []


@pytest.mark.parametrize("change", [by_halves, by_two])
def test_what_each_micro_batch_changes_again_is_named(change):
    (said,) = fit(pruned(change)(), *arrays())
    assert re.search(r"train_step changes \S*kernel itself: once for each micro-batch", said)


class PrunesAfterwards(keras.Sequential):
    """Puts zeros back after its update: the first micro-batch of the next one sees what the update made of them."""

    def train_step(self, data):
        logs = super().train_step(data)
        self.layers[0].kernel.assign(self.layers[0].kernel * self.layers[0].mask)
        return logs


def test_a_mask_that_is_applied_after_the_update_is_named():
    keras.utils.set_random_seed(1)
    model = PrunesAfterwards([keras.Input((16,)), Masked(lambda *_: None), layers.Dense(10)])
    model.compile(keras.optimizers.SGD(0.3), cross_entropy())
    assert "train_step changes" in fit(model, *arrays())[0]


class Positions(layers.Layer):
    """Adds an embedding of each place, as transformers do; ``looks_up`` makes the indices of the places."""

    def __init__(self, looks_up):
        super().__init__()
        self.table = layers.Embedding(12, 4, name="positions")
        self.looks_up = looks_up

    def call(self, inputs):
        return inputs + self.table(self.looks_up(inputs))


def with_positions(looks_up, optimizer, **options):
    def build():
        keras.utils.set_random_seed(1)
        stack = [keras.Input((16,)), layers.Reshape((4, 4)), Positions(looks_up), layers.Flatten(), layers.Dense(10)]
        model = keras.Sequential(stack)
        model.compile(optimizer(), cross_entropy(), **options)
        return model

    return build


def by_range(inputs):
    return ops.arange(ops.shape(inputs)[1])


def by_range_of_a_batch_of_one(inputs):
    return tf.range(tf.shape(inputs)[-2])[None]


def by_constants(inputs):
    return ops.convert_to_tensor([3, 1, 0, 2])


def of_each_sample(inputs):
    return ops.broadcast_to(ops.arange(4)[None], (ops.shape(inputs)[0], 4))


OPTIMIZERS = {"SGD": lambda: keras.optimizers.SGD(0.1), "Adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3)}


# SGD does nothing to a row that it does not do to its parts: there is no more than one alarm to be false.
@pytest.mark.parametrize(
    ("looks_up", "optimizer"),
    [(by_range, "SGD"), (by_range, "Adam"), (by_range_of_a_batch_of_one, "Adam"), (by_constants, "Adam")],
)
def test_rows_that_are_looked_up_once_in_a_batch_are_exact_and_not_named(looks_up, optimizer):
    assert assert_as_plain(with_positions(looks_up, OPTIMIZERS[optimizer]), *arrays(), tolerance=5e-6) == []


def test_rows_that_each_sample_looks_up_are_named():
    (said,) = fit(with_positions(of_each_sample, OPTIMIZERS["Adam"])(), *arrays())
    assert "a row of Embedding (positions) that occurs several times are summed before the optimizer squares" in said


class Tied(keras.Model):
    """Looks rows up and multiplies by the same table, whose gradient is dense in plain Keras too."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(10, 4)

    def call(self, x):
        rows = ops.mean(self.table(ops.cast(ops.abs(x) * 5.0, "int32") % 10), axis=1)
        return ops.matmul(rows, ops.transpose(self.table.embeddings))


def test_the_rows_of_a_tied_table_are_exact_and_not_named():
    def build():
        keras.utils.set_random_seed(1)
        model = Tied()
        model.build((None, 16))
        model.compile(keras.optimizers.Adam(0.01, epsilon=1e-3), cross_entropy())
        return model

    assert assert_as_plain(build, *arrays(), tolerance=5e-6) == []


def by_dot(weights, values):
    return ops.dot(weights, values) / ops.sum(weights)


def by_matrices(weights, values):
    return tf.matmul(weights[None], values[:, None])[0, 0] / tf.reduce_sum(weights)


@pytest.mark.parametrize("mean", [by_dot, by_matrices])
def test_a_masked_mean_compares_no_samples(mean):
    class MaskedMean(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            values = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
            return mean(tf.cast(y % 3 == 0, tf.float32), values)

    model = MaskedMean([keras.Input((16,)), layers.Dense(10)])
    model.compile("sgd", cross_entropy())
    assert "compares samples" not in " ".join(fit(model, *arrays()))


def all_with_all(weights, values):
    return ops.mean(ops.matmul(values[:, None], weights[None]))


def by_outer_product(weights, values):
    return ops.mean(ops.square(tf.tensordot(values, weights, 0)))


@pytest.mark.parametrize("product", [all_with_all, by_outer_product])
def test_products_of_all_samples_with_all_do(product):
    class Products(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return product(y_pred[:, 1], y_pred[:, 0])

    model = Products([keras.Input((16,)), layers.Dense(10)])
    model.compile("sgd", cross_entropy())
    assert "compares samples" in " ".join(fit(model, *arrays()))
