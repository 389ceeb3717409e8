"""Running averages advance once an update, by the statistics of the effective batch, as in plain Keras."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import AtCall, MemoryHog, run_out_if
from put_back import Asked, putting_back

import autobatch

FEATURES = 6


def data(samples=40, shape=(FEATURES,), offset=3.0, dtype="float32"):
    random = np.random.default_rng(0)
    x = offset + 2.0 * random.normal(size=(samples, *shape))
    return x.astype(dtype), random.integers(0, 2, (samples, 1)).astype(dtype)


def stacked(*stack, shape=(FEATURES,), **options):
    keras.utils.set_random_seed(0)
    flat = [layers.Flatten()] if len(shape) > 1 else []
    model = keras.Sequential([keras.Input(shape), *stack, *flat, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), keras.losses.BinaryCrossentropy(from_logits=True), **options)
    return model


def trained(build, arrays, effective, micro, epochs=1):
    """The non-trainable variables, by name, after ``fit`` and after plain ``fit``, which runs eagerly but under XLA."""
    found = []
    for own in (True, False):
        model = build()
        options = {"epochs": epochs, "verbose": 0, "shuffle": False}
        if own:
            autobatch.fit(model, *arrays, target_batch=effective, micro_batch=micro, **options)
        else:
            model.run_eagerly = not model.jit_compile
            model.fit(*arrays, batch_size=effective, **options)
        found.append(model)
    return own_state(*found)


def own_state(*models):
    """The non-trainable variables of ours and of plain Keras's: names, and both values."""
    ours, plain = (
        {v.path: np.asarray(v.value) for v in model.non_trainable_variables if "seed" not in v.path} for model in models
    )
    assert len(ours) == len(plain) > 0
    # A model's second build has other names for its layers.
    return list(zip(ours, ours.values(), plain.values(), strict=True))


def assert_same(found, tolerance=1e-5):
    for name, ours, plain in found:
        np.testing.assert_allclose(ours, plain, rtol=tolerance, atol=tolerance, err_msg=name)


def said_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return " ".join(str(each.message) for each in caught if each.category is autobatch.AutobatchWarning)


@pytest.mark.parametrize(
    ("effective", "micro", "momentum"), [(20, 10, 0.9), (20, 6, 0.99), (19, 4, 0.9)], ids=["2", "4, uneven", "5, tails"]
)
def test_the_first_layers_statistics_are_those_of_plain_keras(effective, micro, momentum):
    def build():
        return stacked(layers.BatchNormalization(momentum=momentum))

    assert_same(trained(build, data(), effective, micro, epochs=2))


def test_far_from_zero_no_digits_of_the_variance_are_lost():
    arrays = data(offset=1000.0)
    found = trained(lambda: stacked(layers.BatchNormalization(momentum=0.5)), arrays, 20, 4)
    # The float32 inputs' own variance, in float64. A mean of 1000 is known to 6e-5; a difference of squares to 0.06.
    variances = [np.var(arrays[0][start : start + 20].astype("float64"), axis=0) for start in (0, 20)]
    expected = 0.25 + 0.25 * variances[0] + 0.5 * variances[1]
    np.testing.assert_allclose(found[1][1], expected, rtol=1e-4)


def test_in_float64_they_agree_to_the_last_digits():
    def build():
        return stacked(layers.BatchNormalization(dtype="float64"), layers.Dense(3, dtype="float64"))

    previous = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        assert_same(trained(build, data(dtype="float64"), 20, 6), tolerance=1e-12)
    finally:
        keras.config.set_floatx(previous)


KINDS = {
    "run eagerly": (lambda: stacked(layers.BatchNormalization(momentum=0.5), run_eagerly=True), {}),
    "compiled by XLA": (lambda: stacked(layers.BatchNormalization(momentum=0.5), jit_compile=True), {}),
    "another axis": (lambda: stacked(layers.BatchNormalization(axis=1), shape=(4, 3)), {"shape": (4, 3)}),
    "images": (lambda: stacked(layers.BatchNormalization(), shape=(4, 4, 3)), {"shape": (4, 4, 3)}),
    "synchronized": (lambda: stacked(layers.BatchNormalization(synchronized=True)), {}),
    "renormalised": (lambda: stacked(layers.BatchNormalization(renorm=True, momentum=0.5)), {}),
    "renormalised, run eagerly": (
        lambda: stacked(layers.BatchNormalization(renorm=True, momentum=0.5), run_eagerly=True),
        {},
    ),
    "one channel": (lambda: stacked(layers.BatchNormalization(), shape=(4, 1)), {"shape": (4, 1)}),
    "without scale": (lambda: stacked(layers.BatchNormalization(scale=False, center=False)), {}),
    "sixteen bits": (
        lambda: stacked(layers.BatchNormalization(momentum=0.5, dtype="mixed_float16"), layers.Dense(2)),
        {},
    ),
    "bfloat16": (lambda: stacked(layers.BatchNormalization(momentum=0.5, dtype="mixed_bfloat16")), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_normalisation(kind):
    build, options = KINDS[kind]
    assert_same(trained(build, data(**options), 20, 6))


def in_inference_mode(**options):
    inputs = keras.Input((FEATURES,))
    norm = layers.BatchNormalization(name="norm", **options)
    inner = keras.Model(inputs, norm(inputs))
    model = keras.Model(inputs, layers.Dense(1)(inner(inputs, training=False)))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def test_what_is_frozen_stays():
    for _, ours, plain in trained(lambda: in_inference_mode(trainable=False), data(), 20, 6):
        assert (ours == plain).all()
        assert set(ours) <= {0.0, 1.0}, "the first values"


def test_a_model_called_in_inference_mode_moves_as_much_as_in_plain_keras():
    assert_same(trained(in_inference_mode, data(), 20, 6))


def test_a_layer_called_twice_in_a_step_advances_twice_in_order():
    def build(**options):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((FEATURES,))
        norm = layers.BatchNormalization(momentum=0.5)
        first, second = norm(inputs), norm(layers.Rescaling(2.0, 1.0)(inputs))
        model = keras.Model(inputs, layers.Dense(1)(layers.Concatenate()([first, second])))
        model.compile(keras.optimizers.SGD(0.01), "mse", **options)
        return model

    for options in ({}, {"run_eagerly": True}):
        assert_same(trained(lambda options=options: build(**options), data(), 20, 6))


def test_the_second_layer_averages_what_the_first_makes_of_each_micro_batch():
    x, y = data(20)
    model = stacked(layers.BatchNormalization(), layers.Activation("relu"), layers.BatchNormalization(momentum=0.5))
    autobatch.fit(model, x, y, target_batch=20, micro_batch=6, verbose=0, shuffle=False)
    # As many micro-batches of 6 as there are; how they are cut is read off the first layer's own cut.
    second = [np.asarray(v.value) for v in model.layers[2].non_trainable_variables]
    cuts = {"last one smaller": [6, 12, 18], "even": [5, 10, 15]}
    matches = []
    for stops in cuts.values():
        parts = np.split(x.astype("float64"), stops)
        hidden = [np.maximum((part - part.mean(0)) / np.sqrt(part.var(0) + 1e-3), 0) for part in parts]
        whole = np.concatenate(hidden)
        expected = 0.5 * whole.mean(0), 0.5 + 0.5 * whole.var(0)
        matches.append(
            all(np.allclose(one, other, rtol=0, atol=1e-5) for one, other in zip(second, expected, strict=True))
        )
    assert any(matches)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_masked_steps_are_left_out(run_eagerly):
    def build():
        stack = [layers.Masking(0.0), layers.BatchNormalization(momentum=0.5)]
        return stacked(*stack, shape=(5, 3), run_eagerly=run_eagerly)

    x, y = data(shape=(5, 3))
    lengths = np.random.default_rng(1).integers(1, 6, len(x))
    lengths[:6] = 0  # a first micro-batch of nothing
    x[np.arange(5)[None] >= lengths[:, None]] = 0.0
    assert_same(trained(build, (x, y), 20, 6))


class Normalising(layers.Layer):
    """A normalisation of one's own: by the batch in training, with running averages for inference."""

    def build(self, shape):
        self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False, name="mean")
        self.variance = self.add_weight(shape=shape[1:], initializer="ones", trainable=False, name="variance")
        self.deviation = self.add_weight(shape=shape[1:], initializer="ones", trainable=False, name="deviation")

    def call(self, inputs, training=False):
        if not training:
            return (inputs - self.mean) / self.deviation
        mean, variance = ops.mean(inputs, axis=0), ops.var(inputs, axis=0)
        self.mean.assign(0.9 * self.mean + 0.1 * mean)
        self.variance.assign_sub((self.variance - variance) * 0.1)
        self.deviation.assign(0.9 * self.deviation + 0.1 * ops.sqrt(variance + 1e-3))
        return (inputs - mean) / ops.sqrt(variance + 1e-3)


class Observing(layers.Layer):
    """Looks at what goes through it, and changes nothing."""

    def build(self, shape):
        self.updates = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="updates")
        self.samples = self.add_weight(shape=(), initializer="zeros", trainable=False, name="samples")
        self.center = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False, name="center")
        self.largest = self.add_weight(shape=(), initializer="zeros", trainable=False, name="largest")
        self.smallest = self.add_weight(shape=(), initializer="zeros", trainable=False, name="smallest")

    def call(self, inputs):
        self.updates.assign_add(1)
        count = ops.cast(ops.shape(inputs)[0], "float32")
        self.samples.assign_add(count)
        self.center.assign(0.9 * self.center + 0.1 * ops.sum(inputs, axis=0) / count)
        self.largest.assign(0.9 * self.largest + 0.1 * ops.max(inputs))
        self.smallest.assign(0.9 * self.smallest + 0.1 * ops.min(inputs))
        return inputs


class Codebook(layers.Layer):
    """The codebook of a VQ-VAE that follows what is nearest to its entries, read before it is changed."""

    reads_what_it_has_written = False

    def build(self, shape):
        options = {"trainable": False, "initializer": "random_normal"}
        self.entries = self.add_weight(shape=(4, shape[-1]), name="entries", **options)
        self.sums = self.add_weight(shape=(4, shape[-1]), name="sums", **options)
        self.counts = self.add_weight(shape=(4,), name="counts", trainable=False, initializer="ones")

    def call(self, inputs, training=False):
        entries = self.entries + 0.0  # as it is now
        apart = ops.sum(ops.square(inputs), 1, keepdims=True) - 2 * ops.matmul(inputs, ops.transpose(entries))
        nearest = ops.one_hot(ops.argmin(apart + ops.sum(ops.square(entries), 1), axis=1), 4)
        if training:
            self.counts.assign(0.9 * self.counts + 0.1 * ops.sum(nearest, axis=0))
            self.sums.assign(0.9 * self.sums + 0.1 * ops.matmul(ops.transpose(nearest), inputs))
            self.entries.assign(self.sums / (self.counts[:, None] + 1e-5))
        if self.reads_what_it_has_written:
            entries = self.entries + 0.0
        return inputs + ops.stop_gradient(ops.matmul(nearest, entries) - inputs)


class CodebookWrittenFirst(Codebook):
    reads_what_it_has_written = True


OWN = {
    "normalising": Normalising,
    "observing": Observing,
    "codebook": Codebook,
    "codebook written first": CodebookWrittenFirst,
}


@pytest.mark.parametrize(
    ("layer", "options"),
    [*((layer, {}) for layer in OWN), ("observing", {"jit_compile": True})],
    ids=[*OWN, "observing, compiled by XLA"],
)
def test_running_averages_of_layers_of_ones_own(layer, options):
    found = []
    said = said_of(lambda: found.extend(trained(lambda: stacked(OWN[layer](name="own"), **options), data(), 20, 6)))
    assert_same(found)
    assert ("each micro-batch where train_step computes with them" in said) is (
        layer in ("normalising", "codebook written first")
    )
    assert "itself: once for each micro-batch" not in said


class Sequential(keras.Sequential):
    """Averages its loss, a gradient's norm, and its weights, by itself."""

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.after(loss, gradients)
        return {"loss": loss}

    def after(self, loss, gradients):
        pass


class Following(Sequential):
    def build(self, shape):
        super().build(shape)
        self.teacher = self.add_weight(shape=(FEATURES, 1), name="teacher", trainable=False)
        self.losses_mean = self.add_weight(shape=(), name="mean_loss", initializer="zeros", trainable=False)

    def after(self, loss, gradients):
        self.teacher.assign(0.5 * self.teacher + 0.5 * self.layers[-1].kernel)
        self.losses_mean.assign(0.9 * self.losses_mean + 0.1 * loss)


class FollowingGradients(Sequential):
    def build(self, shape):
        super().build(shape)
        self.norm = self.add_weight(shape=(), name="norm", initializer="zeros", trainable=False)

    def after(self, loss, gradients):
        self.norm.assign(0.9 * self.norm + 0.1 * ops.norm(gradients[0]))


def following(kind):
    keras.utils.set_random_seed(0)
    model = kind([keras.Input((FEATURES,)), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def test_what_follows_the_weights_is_assigned_behind_the_update():
    found = []
    said = said_of(lambda: found.extend(trained(lambda: following(Following), data(), 20, 6)))
    assert_same(found)
    assert said == ""


def test_an_average_of_gradients_cannot_be_told_and_is_named():
    said = said_of(lambda: trained(lambda: following(FollowingGradients), data(), 20, 6))
    assert "norm itself: once for each micro-batch" in said


def test_a_loop_of_ones_own():
    x, y = data(20)
    model, plain = stacked(layers.BatchNormalization(momentum=0.5)), stacked(layers.BatchNormalization(momentum=0.5))

    def train_step(batch):
        inputs, labels = batch
        with tf.GradientTape() as tape:
            loss = keras.losses.BinaryCrossentropy(from_logits=True)(labels, model(inputs, training=True))
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=model.optimizer, target_batch=20, micro_batch=6)
    step((x, y))
    plain.fit(x, y, batch_size=20, verbose=0, shuffle=False)
    for one, other in zip(model.non_trainable_variables, plain.non_trainable_variables, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


class InABranch(layers.Layer):
    """Calls its layer in a branch, whose assignments are not looked into."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, shape):
        self.norm.build(shape)

    def call(self, inputs, training=False):
        return tf.cond(tf.shape(inputs)[0] > 0, lambda: self.norm(inputs, training=training), lambda: inputs)


class InAFunction(layers.Layer):
    """Calls its layer in a tf.function of its own, which is traced anew."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization(name="norm")
        self.function = tf.function(self.norm)

    def build(self, shape):
        self.norm.build(shape)

    def call(self, inputs, training=False):
        return self.function(inputs, training=training)


def test_statistics_that_cannot_be_deferred_are_named():
    for layer, is_named in ((InABranch(), True), (InAFunction(), False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = autobatch.fit(stacked(layer), *data(), target_batch=20, micro_batch=6, verbose=0)
        said = [each for each in history.report.warnings if "itself: once for each micro-batch" in each]
        assert len(said) == is_named
        assert all("norm/moving_mean" in each for each in said)


def test_an_evaluation_moves_nothing():
    model = stacked(layers.BatchNormalization())
    arrays = data()
    autobatch.fit(model, *arrays, target_batch=20, micro_batch=6, validation_data=arrays, verbose=0, shuffle=False)
    plain = stacked(layers.BatchNormalization())
    plain.fit(*arrays, batch_size=20, verbose=0, shuffle=False)
    for one, other in zip(model.non_trainable_variables, plain.non_trainable_variables, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


class Interrupted(layers.Layer):
    """Runs out of memory at given calls."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def call(self, inputs):
        return inputs + run_out_if(self.asked)


def test_running_out_of_memory_moves_nothing_twice():
    def build(asked):
        return stacked(Observing(), layers.BatchNormalization(momentum=0.5), Interrupted(asked))

    asked = Asked()
    ours, plain = build(asked), build(Asked())
    options = {"epochs": 1, "verbose": 0, "shuffle": False}
    plain.fit(*data(), batch_size=20, **options)
    put_back = putting_back(ours)
    for call in (0, 2, 6):  # the first, in the middle, and in the second update
        put_back()
        asked.now = AtCall(call)
        history = autobatch.fit(ours, *data(), target_batch=20, micro_batch=6, **options)
        assert [each.update for each in history.recoveries] == [call // 4]
        assert_same(own_state(ours, plain))
        assert asked.now.count > call


def test_after_running_out_the_smaller_micro_batches_make_the_same_statistics():
    calls = []

    def build():
        calls.append(None)
        hog = MemoryHog(lambda samples: samples > 4) if len(calls) == 1 else layers.Activation("linear")
        return stacked(layers.BatchNormalization(momentum=0.5), hog)

    assert_same(trained(build, data(), 20, 10))
