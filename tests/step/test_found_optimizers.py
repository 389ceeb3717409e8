"""Optimizers that nobody told autobatch of: each updates once an effective batch, and is rolled back with the rest."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import SAMPLES, AtCall, arrays, relative_error, run_out_if

import autobatch


class Doubling(keras.optimizers.SGD):
    """Has an apply of its own around Keras's."""

    def apply(self, grads, trainable_variables=None):
        super().apply([2.0 * gradient for gradient in grads], trainable_variables)


class HungryAdam(keras.optimizers.Adam):
    """Runs out of memory in the middle of its update, where ``asked()`` says so."""

    def __init__(self, asked, **options):
        super().__init__(0.01, **options)
        self.asked = asked

    def update_step(self, gradient, variable, learning_rate):
        if "bias" in variable.name:
            gradient = gradient + run_out_if(self.asked)
        super().update_step(gradient, variable, learning_rate)


class Adversaries:
    """A loop as in TensorFlow's pix2pix tutorial: two models, two optimizers; its loss has a mask to be counted."""

    def __init__(self, second):
        keras.utils.set_random_seed(1)
        self.generator = keras.Sequential([keras.Input((16,)), layers.Dense(16)])
        self.critic = keras.Sequential([keras.Input((16,)), layers.Dense(10)])
        self.first, self.second = keras.optimizers.Adam(0.01, name="first"), second

    def step(self, batch):
        x, y = batch
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2)
        with tf.GradientTape() as of_generator, tf.GradientTape() as of_critic:
            fake = self.generator(x, training=True)
            generator_loss = loss_of(y, self.critic(fake, training=True))
            critic_loss = loss_of(y, self.critic(x, training=True)) - 0.1 * generator_loss
        generator, critic = self.generator.trainable_variables, self.critic.trainable_variables
        gradients = of_generator.gradient(generator_loss, generator)
        self.first.apply_gradients(zip(gradients, generator, strict=True))
        self.second.apply(of_critic.gradient(critic_loss, critic), critic)
        return generator_loss

    def wrapped(self, optimizer=None, **options):
        return autobatch.wrap_step(
            self.step, model=self.generator, optimizer=optimizer or self.first, target_batch=40, **options
        )

    def state(self):
        variables = [*self.generator.variables, *self.critic.variables, *self.first.variables, *self.second.variables]
        return [variable.numpy() for variable in variables]


def batches():
    x, y = arrays(samples=100)
    return [(tf.constant(x[start : start + 40]), tf.constant(y[start : start + 40])) for start in (0, 40, 80)]


SECOND = {
    "keras": lambda: keras.optimizers.RMSprop(0.01, name="second"),
    "own apply": lambda: Doubling(0.05, name="second"),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), name="second"),
}


# A search is of the optimizer that has most to be put back behind it.
@pytest.mark.parametrize(
    ("second", "micro_batch"), [*((second, size) for second in SECOND for size in (13, 40)), ("loss scale", "auto")]
)
def test_a_second_optimizer_of_a_loop(second, micro_batch):
    plain, ours = Adversaries(SECOND[second]()), Adversaries(SECOND[second]())
    expected = [float(plain.step(batch)) for batch in batches()]
    step = ours.wrapped(micro_batch=micro_batch)
    np.testing.assert_allclose([float(step(batch)) for batch in batches()], expected, rtol=1e-5)
    assert int(ours.second.iterations.numpy()) == int(plain.second.iterations.numpy()) == 3
    assert relative_error(ours.critic.get_weights(), plain.critic.get_weights()) < 1e-4
    assert relative_error(ours.generator.get_weights(), plain.generator.get_weights()) < 1e-4
    assert step.recoveries == ()


@pytest.mark.parametrize("container", [list, tuple, None], ids=["list", "tuple", "found"])
def test_several_optimizers_are_exact_and_not_named_whether_given_or_found(container):
    """The second gradient is taken after the first update, of what was computed before it."""
    plain, ours = (Adversaries(keras.optimizers.SGD(0.1, name="second")) for _ in range(2))
    for batch in batches():
        plain.step(batch)
    step = ours.wrapped(container([ours.first, ours.second]) if container else None, micro_batch=13)
    for batch in batches():
        step(batch)
    assert "update once each" not in " ".join(step.report.warnings)
    assert relative_error(ours.state(), plain.state()) < 1e-4


@pytest.mark.parametrize("micro_batch", [13, 40], ids=["accumulated", "whole"])
def test_running_out_of_memory_in_an_update_undoes_the_found_optimizers_too(micro_batch):
    def run(*calls):
        loop = Adversaries(HungryAdam(AtCall(*calls)))
        step = loop.wrapped(micro_batch=micro_batch)
        for batch in batches():
            step(batch)
        return loop, step

    undisturbed, _ = run()
    disturbed, step = run(1)
    assert [recovery.update for recovery in step.recoveries] == [1]
    for actual, expected in zip(disturbed.state(), undisturbed.state(), strict=True):
        np.testing.assert_array_equal(actual, expected)


class Compiled(keras.Model):
    """A GAN whose discriminator is compiled with an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((16,)), layers.Dense(16)])
        self.critic = keras.Sequential([keras.Input((16,)), layers.Dense(1)])
        self.critic.compile(keras.optimizers.Adam(0.02))
        self.built = True

    def train_step(self, data):
        real, _ = data
        with tf.GradientTape(persistent=True) as tape:
            fake = self.generator(real)
            critic_loss = tf.reduce_mean(tf.square(self.critic(real) - 1)) + tf.reduce_mean(self.critic(fake) ** 2)
            generator_loss = tf.reduce_mean(tf.square(self.critic(fake) - 1))
        for loss, model, optimizer in (
            (critic_loss, self.critic, self.critic.optimizer),
            (generator_loss, self.generator, self.optimizer),
        ):
            gradients = tape.gradient(loss, model.trainable_weights)
            optimizer.apply_gradients(zip(gradients, model.trainable_weights, strict=True))
        return {"critic": critic_loss, "generator": generator_loss}


@pytest.mark.parametrize(("micro_batch", "eagerly"), [(13, False), (13, True), (SAMPLES, False)])
def test_a_model_in_the_model_with_an_optimizer_of_its_own(micro_batch, eagerly):
    def build():
        keras.utils.set_random_seed(1)
        model = Compiled()
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=eagerly)
        return model

    plain, ours = build(), build()
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    plain.fit(*arrays(), batch_size=SAMPLES, **options)
    autobatch.fit(ours, *arrays(), target_batch=SAMPLES, micro_batch=micro_batch, **options)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    assert int(ours.critic.optimizer.iterations.numpy()) == 2


@pytest.mark.parametrize(
    ("optimizer", "error", "words"),
    [
        ("adam", TypeError, r"Received: 'adam' \(of type str\)"),
        ([keras.optimizers.SGD(), 3], TypeError, r"Received: 3 \(of type int\)"),
        (None, TypeError, "Received: None"),
        ([], ValueError, r"Received: \[\]"),
    ],
)
def test_what_is_no_optimizer_is_refused_by_its_value(optimizer, error, words):
    model = keras.Sequential([keras.Input((16,)), layers.Dense(10)])
    with pytest.raises(error, match=words):
        autobatch.wrap_step(lambda batch: None, model=model, optimizer=optimizer, target_batch=4)


def test_a_loop_that_is_a_tf_function_already():
    def run(wrap):
        loop = Adversaries(keras.optimizers.SGD(0.1))
        loop.step = tf.function(loop.step)
        step = wrap(loop)
        return loop, [float(step(batch)) for batch in batches()]

    plain, expected = run(lambda loop: loop.step)
    ours, losses = run(lambda loop: loop.wrapped(micro_batch=13))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert relative_error(ours.state(), plain.state()) < 1e-4


@pytest.mark.parametrize("kind", [tuple, list])
def test_layers_and_optimizers_may_be_kept_in_any_container(kind):
    """A tuple that is a model's attribute is wrapped by TensorFlow, and cannot be added to a list."""

    class Blocks(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = kind((layers.Dense(4), layers.Dense(10)))
            self.first, self.last = layers.Dense(8, activation="relu"), layers.Dense(10)
            self.others = kind((keras.optimizers.SGD(0.05),))

        def call(self, inputs):
            return self.last(self.first(inputs))

    def trained(fit):
        keras.utils.set_random_seed(2)
        model = Blocks()
        model.build((None, 16))
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        fit(model)
        return [variable.numpy() for variable in model.trainable_variables]

    x, y = arrays()
    plain = trained(lambda model: model.fit(x, y, batch_size=SAMPLES, verbose=0))
    ours = trained(lambda model: autobatch.fit(model, x, y, target_batch=SAMPLES, micro_batch=10, verbose=0))
    assert relative_error(ours, plain) < 1e-5
