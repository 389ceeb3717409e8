"""Any train_step, unchanged: a variational autoencoder, a GAN with two optimizers, distillation, loops without fit."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import SAMPLES, MemoryHog, arrays, classifier, relative_error

import autobatch


class Autoencoder(keras.Model):
    """A variational autoencoder with its own train_step, as in Keras's guides; its noise is an input."""

    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(4)
        self.decoder = layers.Dense(16)
        self.total = keras.metrics.Mean(name="loss")
        self.divergence = keras.metrics.Mean(name="kl")

    @property
    def metrics(self):
        return [self.total, self.divergence]

    def train_step(self, data):
        x, noise = data
        with tf.GradientTape() as tape:
            mean, log_variance = tf.split(self.encoder(x), 2, axis=-1)
            z = mean + tf.exp(0.5 * log_variance) * noise
            reconstruction = tf.reduce_mean(tf.reduce_sum(tf.square(x - self.decoder(z)), axis=-1))
            kl = tf.reduce_mean(-0.5 * tf.reduce_sum(1 + log_variance - mean**2 - tf.exp(log_variance), axis=-1))
            loss = reconstruction + kl
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        samples = tf.shape(x)[0]
        self.total.update_state(loss, sample_weight=samples)
        self.divergence.update_state(kl, sample_weight=samples)
        return {"loss": self.total.result(), "kl": self.divergence.result(), "raw": loss}


def trained_both_ways(build, x, y, *, micro_batch=11, epochs=2, tolerance=1e-5):
    """Train by plain Keras, eagerly but under XLA, and by ours, which is returned."""
    plain, ours = build(), build()
    plain.run_eagerly = not plain.jit_compile
    expected = plain.fit(x, y, batch_size=SAMPLES, epochs=epochs, shuffle=False, verbose=0)
    actual = autobatch.fit(
        ours, x, y, target_batch=SAMPLES, micro_batch=micro_batch, epochs=epochs, shuffle=False, verbose=0
    )
    assert relative_error(ours.get_weights(), plain.get_weights()) < tolerance
    for name, values in expected.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=1e-4, err_msg=name)
    return ours


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_a_variational_autoencoder(options):
    x, _ = arrays()
    noise = np.random.default_rng(1).normal(size=(SAMPLES, 2)).astype("float32")

    def build():
        keras.utils.set_random_seed(1)
        model = Autoencoder()
        model.compile(keras.optimizers.Adam(0.01), **options)
        return model

    trained_both_ways(build, x, noise, micro_batch=12)


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_eager_and_compiled_with_a_mask_and_metrics(options):
    random = np.random.default_rng(0)
    x = random.integers(1, 30, (SAMPLES, 6))
    x[:, 4:] *= random.integers(0, 2, (SAMPLES, 1))
    y = random.integers(0, 5, (SAMPLES, 6))

    def build():
        keras.utils.set_random_seed(1)
        stack = [keras.Input((6,)), layers.Embedding(30, 6, mask_zero=True), layers.Dense(6, activation="tanh")]
        model = keras.Sequential([*stack, layers.Dense(5)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.3), loss, weighted_metrics=["accuracy"], **options)
        return model

    trained_both_ways(build, x, y, micro_batch=20)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_compute_loss_of_the_users_own(options):
    class Distilled(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            hard = super().compute_loss(x, y, y_pred, sample_weight, training)
            soft = ops.mean(ops.square(y_pred - ops.tanh(x[:, :10])))
            return hard + 0.5 * soft

    def build():
        keras.utils.set_random_seed(1)
        model = Distilled([keras.Input((16,)), layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2)
        model.compile(keras.optimizers.SGD(0.3), loss, **options)
        return model

    trained_both_ways(build, *arrays())


class Adversaries(keras.Model):
    """A GAN whose two optimizers are attributes of its own; both gradients are taken before either is applied."""

    def __init__(self, biased=True):
        super().__init__()
        self.generator = layers.Dense(16)
        self.critic = layers.Dense(1, use_bias=biased)

    def compile(self, first, second, **options):
        super().compile(**options)
        self.first, self.second = first, second

    def train_step(self, data):
        real, latent = data
        with tf.GradientTape(persistent=True) as tape:
            fake = self.generator(latent)
            judged = self.critic(fake)
            critic_loss = tf.reduce_mean(judged) - tf.reduce_mean(self.critic(real))
            generator_loss = -tf.reduce_mean(judged)
        critic, generator = self.critic.trainable_weights, self.generator.trainable_weights
        critic_gradients = tape.gradient(critic_loss, critic)
        generator_gradients = tape.gradient(generator_loss, generator)
        self.first.apply_gradients(zip(critic_gradients, critic, strict=True))
        self.second.apply_gradients(zip(generator_gradients, generator, strict=True))
        return {"critic": critic_loss, "generator": generator_loss}


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_two_optimizers_make_one_update_each(options):
    x, _ = arrays()
    latent = np.random.default_rng(1).normal(size=(SAMPLES, 3)).astype("float32")

    def build():
        keras.utils.set_random_seed(1)
        # The gradient of the critic's bias is zero but for rounding, which differs under XLA; Adam scales it up.
        model = Adversaries(biased=not options)
        model.compile(keras.optimizers.Adam(0.01), keras.optimizers.RMSprop(0.02), **options)
        return model

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = trained_both_ways(build, x, latent)
    assert not [each for each in caught if "update once each" in str(each.message)], "no gradient sees an update"
    assert int(ours.first.iterations.numpy()) == int(ours.second.iterations.numpy()) == 2


def test_the_same_optimizer_twice_in_a_step_makes_two_updates():
    class Twice(keras.Sequential):
        def train_step(self, data):
            super().train_step(data)
            return super().train_step(data)

    def build():
        keras.utils.set_random_seed(1)
        model = Twice([keras.Input((16,)), layers.Dense(10)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    ours = trained_both_ways(build, *arrays())
    assert int(ours.optimizer.iterations.numpy()) == 4


def test_a_loop_without_fit_may_update_twice():
    x, y = arrays()
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def make():
        model, optimizer = classifier(), keras.optimizers.SGD(0.1)

        def train_step(batch):
            losses = []
            for _ in range(2):
                with tf.GradientTape() as tape:
                    loss = loss_of(batch[1], model(batch[0], training=True))
                optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
                losses.append(loss)
            return {"first": losses[0], "second": losses[1]}

        return model, optimizer, train_step

    plain, _, plain_step = make()
    expected = plain_step((x, y))
    model, optimizer, train_step = make()
    step = autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=SAMPLES, micro_batch=11)
    actual = step((x, y))
    assert relative_error(model.get_weights(), plain.get_weights()) < 1e-5
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5)


def test_a_variable_that_a_step_returns_is_its_value():
    class Counting(keras.Sequential):
        def train_step(self, data):
            self.count.assign_add(2.0)
            return {**super().train_step(data), "count": self.count}

    model = Counting([keras.Input((16,)), layers.Dense(10)])
    model.count = tf.Variable(1.0, trainable=False)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = autobatch.fit(model, *arrays(), target_batch=SAMPLES, micro_batch=SAMPLES // 2, verbose=0)
    assert history.history["count"] == [float(model.count.numpy())]


def test_what_differs_is_said_once_by_name():
    extra = [layers.BatchNormalization(name="norm"), layers.Dropout(0.5, name="drop")]
    loss = lambda y_true, y_pred: ops.mean(  # noqa: E731 - a loss without a name, as users write them
        keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
    )
    model = classifier(loss=loss, extra=extra)
    with pytest.warns(autobatch.AutobatchWarning) as caught:
        history = autobatch.fit(model, *arrays(), target_batch=48, micro_batch=12, verbose=0)
    said = [str(warning.message) for warning in caught if warning.category is autobatch.AutobatchWarning]
    assert said == [
        "Training with 4 micro-batches of 12 is not identical to one batch of 48: BatchNormalization (norm) normalises "
        "each micro-batch by its own mean and variance, not the full batch's; and 1 more difference. See "
        "history.report.warnings and docs/exactness-and-limits.md#batch-statistics."
    ]
    assert len(history.report.warnings) == 2
    assert "Dropout (drop) draws new random numbers in each micro-batch." in history.report.warnings


def test_where_nothing_is_accumulated_nothing_differs(recwarn):
    autobatch.fit(
        classifier(extra=[layers.BatchNormalization()]), *arrays(), target_batch=48, micro_batch=48, verbose=0
    )
    assert not [warning for warning in recwarn if warning.category is autobatch.AutobatchWarning]


def test_a_loop_without_fit():
    x, y = arrays(samples=100)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(40)

    def make(too_many):
        model = classifier(extra=[MemoryHog(too_many)])
        optimizer = keras.optimizers.Adam(0.01)

        def train_step(batch):
            inputs, labels = batch
            with tf.GradientTape() as tape:
                loss = loss_of(labels, model(inputs, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss

        return model, optimizer, train_step

    plain, _, plain_step = make(lambda samples: False)
    expected = [float(plain_step(batch)) for batch in dataset]
    model, optimizer, train_step = make(lambda samples: samples > 17)
    step = autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=40)
    actual = [float(step(batch)) for batch in dataset]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert relative_error(model.get_weights(), plain.get_weights()) < 1e-5
    assert step.report.plan.micro_batch <= 17
    assert int(optimizer.iterations.numpy()) == 3
    assert step.recoveries == ()


def test_a_loop_over_batches_padded_to_lengths_of_their_own_is_exact():
    random = np.random.default_rng(0)
    batches = [
        (random.integers(1, 50, (samples, length)).astype("int32"), random.integers(0, 3, samples))
        for samples, length in [(24, 10), (24, 6), (24, 13), (7, 6)]
    ]

    def build():
        keras.utils.set_random_seed(1)
        stack = [keras.Input((None,), dtype="int32"), layers.Embedding(50, 4), layers.GlobalAveragePooling1D()]
        return keras.Sequential([*stack, layers.Dense(3)])

    def loop_over(wrap):
        model, optimizer = build(), keras.optimizers.SGD(0.5, momentum=0.9)
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def train_step(batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            return loss

        step = wrap(train_step, model, optimizer)
        return model, [float(step((tf.constant(x), tf.constant(y)))) for x, y in batches]

    def wrap(train_step, model, optimizer):
        return autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=24, micro_batch=5)

    plain, expected = loop_over(lambda train_step, model, optimizer: train_step)
    ours, losses = loop_over(wrap)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def test_a_loop_refuses_a_batch_unlike_the_first_before_anything_runs():
    model, optimizer = classifier(), keras.optimizers.SGD()
    x, y = (part[:8] for part in arrays())
    mask = np.ones(8, "float32")

    def train_step(batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(batch["x"])))
        optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=8, micro_batch=5)
    step({"x": x, "labels": (y, mask)})
    before = model.get_weights()
    sparse = tf.sparse.from_dense(x)
    for batch, error, message in (
        ({"x": x.astype("float64")}, TypeError, r"batch\['x'\] was a Tensor of dtype float32 and shape \(8, 16\) .*"
         r"tf.cast\(batch\['x'\], 'float32'\).*Received: a Tensor of dtype float64 and shape \(8, 16\)$"),
        ({"labels": (y.astype("int32"), mask)}, TypeError, r"batch\['labels'\]\[0\] was .* int64 .* dtype int32"),
        ({"x": x[..., None]}, ValueError, r"batch\['x'\] was .*once for each kind. Received: .* shape \(8, 16, 1\)$"),
        ({"x": sparse}, TypeError, r"batch\['x'\] was a Tensor .* Received: a SparseTensor of dtype float32"),
        ({"labels": (y, None)}, TypeError, r"batch\['labels'\]\[1\] was a Tensor.*Received: None$"),
        ({"labels": (y,)}, ValueError, r"parts batch\['labels'\]\[0\], batch\['labels'\]\[1\], batch\['x'\]; this one "
         r"has others.* Received: batch\['labels'\]\[0\], batch\['x'\]$"),
        ({"image": x}, ValueError, r"this one has others.* Received: batch\['image'\], "),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            step({"x": x, "labels": (y, mask), **batch})
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    step({"x": tf.constant(x[:3]), "labels": [y[:3], mask[:3]]})  # another size, a list instead of a tuple
    assert int(optimizer.iterations) == 2
