"""Small models whose train_step applies optimizers more than once, each as its users write it; noise is data."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from models import relative_error

import autobatch

SAMPLES = 24
STEPS = 2


def noise(samples=SAMPLES, draws=STEPS + 1, seed=0):
    """Real samples of 16 numbers, and latent vectors of 3 for each of several draws."""
    random = np.random.default_rng(seed)
    real = random.normal(size=(samples, 16)).astype("float32")
    return real, random.normal(size=(samples, draws, 3)).astype("float32")


def dense(inputs, outputs, *between, activation="tanh"):
    return keras.Sequential(
        [keras.Input((inputs,)), layers.Dense(8, activation=activation), *between, layers.Dense(outputs)]
    )


def cross_entropy():
    return keras.losses.BinaryCrossentropy(from_logits=True)


def wasserstein(of_fake, of_real):
    """The critic's loss, with ProGAN's drift, so that its last bias has a gradient too."""
    return tf.reduce_mean(of_fake) - tf.reduce_mean(of_real) + 0.1 * tf.reduce_mean(tf.square(of_real))


class Pair(keras.Model):
    """A generator and a critic with an optimizer each, made by ``compile``."""

    def __init__(self, *in_critic, in_generator=()):
        super().__init__()
        self.generator = dense(3, 16, *in_generator)
        self.critic = dense(16, 1, *in_critic)
        self.critic_loss = keras.metrics.Mean(name="critic_loss")

    def compile(self, optimizers=None, **options):
        super().compile(**options)
        first, second = optimizers or (keras.optimizers.SGD(0.05), keras.optimizers.SGD(0.05))
        self.c_optimizer, self.g_optimizer = first, second

    @property
    def metrics(self):
        return [self.critic_loss]

    def update_critic(self, tape, loss):
        weights = self.critic.trainable_variables
        self.c_optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    def update_generator(self, tape, loss):
        weights = self.generator.trainable_variables
        self.g_optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))


class PenalisedCritic(Pair):
    """As WGAN-GP: the critic is updated twice, with a gradient penalty, then the generator once."""

    def train_step(self, data):
        real, latent = data
        for draw in range(STEPS):
            with tf.GradientTape() as tape:
                fake = self.generator(latent[:, draw], training=True)
                mixed = 0.3 * real + 0.7 * fake
                with tf.GradientTape() as inner:
                    inner.watch(mixed)
                    judged = self.critic(mixed, training=True)
                slopes = tf.sqrt(tf.reduce_sum(tf.square(inner.gradient(judged, mixed)), axis=1) + 1e-9)
                loss = wasserstein(self.critic(fake, training=True), self.critic(real, training=True))
                loss += 10.0 * tf.reduce_mean(tf.square(slopes - 1.0))
            self.update_critic(tape, loss)
            self.critic_loss.update_state(loss)
        with tf.GradientTape() as tape:
            of_generator = -tf.reduce_mean(self.critic(self.generator(latent[:, -1], training=True), training=True))
        self.update_generator(tape, of_generator)
        return {"critic_loss": self.critic_loss.result(), "last": loss, "generator_loss": of_generator}


class ClippedCritic(Pair):
    """As WGAN: the critic's weights are clipped behind each of its updates."""

    def train_step(self, data):
        real, latent = data
        for draw in range(STEPS):
            with tf.GradientTape() as tape:
                fake = self.generator(latent[:, draw], training=True)
                loss = wasserstein(self.critic(fake, training=True), self.critic(real, training=True))
            self.update_critic(tape, loss)
            for weight in self.critic.trainable_variables:
                weight.assign(tf.clip_by_value(weight, -0.3, 0.3))
        with tf.GradientTape() as tape:
            of_generator = -tf.reduce_mean(self.critic(self.generator(latent[:, -1], training=True), training=True))
        self.update_generator(tape, of_generator)
        return {"critic": loss, "generator": of_generator}


class InTurn(Pair):
    """As DCGAN: fake samples are made once, the critic is updated, and then judges other fakes."""

    def train_step(self, data):
        real, latent = data
        fake = self.generator(latent[:, 0], training=True)
        both = tf.concat([fake, real], axis=0)
        labels = tf.concat([tf.ones_like(fake[:, :1]), tf.zeros_like(real[:, :1])], axis=0)
        with tf.GradientTape() as tape:
            loss = cross_entropy()(labels, self.critic(both, training=True))
        self.update_critic(tape, loss)
        with tf.GradientTape() as tape:
            judged = self.critic(self.generator(latent[:, 1], training=True), training=True)
            of_generator = cross_entropy()(tf.zeros_like(judged), judged)
        self.update_generator(tape, of_generator)
        self.critic_loss.update_state(loss)
        return {"critic_loss": self.critic_loss.result(), "generator_loss": of_generator}


class SharedFakes(Pair):
    """The fakes on which the critic was updated are judged again by the updated critic, through the same tape."""

    def train_step(self, data):
        real, latent = data
        with tf.GradientTape(persistent=True) as tape:
            fake = self.generator(latent[:, 0], training=True)
            loss = wasserstein(self.critic(fake, training=True), self.critic(real, training=True))
        self.update_critic(tape, loss)
        with tape:
            of_generator = -tf.reduce_mean(self.critic(fake, training=True))
        self.update_generator(tape, of_generator)
        return {"critic": loss, "generator": of_generator}


class Conditional(Pair):
    """As a conditional GAN: labels are joined to what both networks see."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = dense(3 + 4, 16), dense(16 + 4, 1)

    def train_step(self, data):
        real, (latent, labels) = data
        labels = tf.one_hot(labels, 4, dtype=real.dtype)
        fake = self.generator(tf.concat([latent[:, 0], labels], axis=-1))
        joined = tf.concat([tf.concat([fake, labels], -1), tf.concat([real, labels], -1)], axis=0)
        target = tf.concat([tf.ones_like(fake[:, :1]), tf.zeros_like(real[:, :1])], axis=0)
        with tf.GradientTape() as tape:
            loss = cross_entropy()(target, self.critic(joined))
        self.update_critic(tape, loss)
        with tf.GradientTape() as tape:
            fake = self.generator(tf.concat([latent[:, 1], labels], axis=-1))
            judged = self.critic(tf.concat([fake, labels], -1))
            of_generator = cross_entropy()(tf.zeros_like(judged), judged)
        self.update_generator(tape, of_generator)
        return {"critic": loss, "generator": of_generator}


class Cycle(keras.Model):
    """As CycleGAN: four networks, four gradients, then four updates."""

    def __init__(self):
        super().__init__()
        self.forth, self.back, self.judge_x, self.judge_y = dense(16, 16), dense(16, 16), dense(16, 1), dense(16, 1)

    def compile(self, **options):
        super().compile(**options)
        self.own = [keras.optimizers.SGD(0.05) for _ in range(4)]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            fake_y, fake_x = self.forth(x, training=True), self.back(y, training=True)
            cycle = tf.reduce_mean(tf.abs(self.back(fake_y) - x)) + tf.reduce_mean(tf.abs(self.forth(fake_x) - y))
            of_forth = tf.reduce_mean(tf.square(self.judge_y(fake_y) - 1)) + cycle
            of_back = tf.reduce_mean(tf.square(self.judge_x(fake_x) - 1)) + cycle
            of_x = tf.reduce_mean(tf.square(self.judge_x(x) - 1)) + tf.reduce_mean(tf.square(self.judge_x(fake_x)))
            of_y = tf.reduce_mean(tf.square(self.judge_y(y) - 1)) + tf.reduce_mean(tf.square(self.judge_y(fake_y)))
        networks = [self.forth, self.back, self.judge_x, self.judge_y]
        gradients = [
            tape.gradient(loss, network.trainable_variables)
            for loss, network in zip([of_forth, of_back, of_x, of_y], networks, strict=True)
        ]
        for optimizer, gradient, network in zip(self.own, gradients, networks, strict=True):
            optimizer.apply_gradients(zip(gradient, network.trainable_variables, strict=True))
        return {"forth": of_forth, "back": of_back, "x": of_x, "y": of_y}


class ActorAndCritics(keras.Model):
    """An actor and two critics, whose targets follow them softly behind the updates."""

    def __init__(self):
        super().__init__()
        self.actor, self.one, self.other = dense(8, 2), dense(10, 1), dense(10, 1)
        self.target_one, self.target_other = dense(10, 1), dense(10, 1)
        self.target_one.set_weights(self.one.get_weights())
        self.target_other.set_weights(self.other.get_weights())

    def compile(self, **options):
        super().compile(**options)
        self.of_critics = [keras.optimizers.SGD(0.05), keras.optimizers.SGD(0.05)]
        self.of_actor = keras.optimizers.SGD(0.05)

    def train_step(self, data):
        (state, action), (reward, following) = data
        then = tf.concat([following, self.actor(following)], -1)
        least = tf.minimum(self.target_one(then), self.target_other(then))
        target = reward[:, None] + 0.9 * tf.stop_gradient(least)
        logs = {}
        for name, critic, optimizer in zip(("one", "other"), (self.one, self.other), self.of_critics, strict=True):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(critic(tf.concat([state, action], -1)) - target))
            weights = critic.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            logs[name] = loss
        with tf.GradientTape() as tape:
            acting = tf.concat([state, self.actor(state)], -1)
            loss = -tf.reduce_mean(tf.minimum(self.one(acting), self.other(acting)))
        weights = self.actor.trainable_variables
        self.of_actor.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        for critic, followed in ((self.target_one, self.one), (self.target_other, self.other)):
            for slow, fast in zip(critic.variables, followed.variables, strict=True):
                slow.assign(0.9 * slow + 0.1 * fast)
        return {**logs, "actor": loss}


def transitions(samples=SAMPLES):
    random = np.random.default_rng(0)
    state, following = (random.normal(size=(samples, 8)).astype("float32") for _ in range(2))
    action = random.normal(size=(samples, 2)).astype("float32")
    return (state, action), (random.normal(size=samples).astype("float32"), following)


class Captioner(keras.Model):
    """As image captioning: three captions for an image, of which each makes an update of the one optimizer."""

    def __init__(self, words=20):
        super().__init__()
        self.image = layers.Dense(8)
        self.words = layers.Embedding(words, 8, mask_zero=True)
        self.decoder = layers.Dense(words)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.hits = keras.metrics.Mean(name="hits")

    @property
    def metrics(self):
        return [self.loss_tracker, self.hits]

    def call(self, inputs):
        image, caption = inputs
        return self.decoder(tf.tanh(self.image(image)[:, None] + self.words(caption)))

    def train_step(self, data):
        image, captions = data
        total = 0.0
        for place in range(captions.shape[1]):
            caption = captions[:, place]
            given, wanted = caption[:, :-1], caption[:, 1:]
            mask = tf.cast(wanted != 0, keras.config.floatx())
            with tf.GradientTape() as tape:
                predicted = self((image, given), training=True)
                losses = keras.losses.sparse_categorical_crossentropy(wanted, predicted, from_logits=True)
                loss = tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)
            hits = tf.cast(tf.argmax(predicted, -1) == tf.cast(wanted, tf.int64), mask.dtype)
            hit = tf.reduce_sum(hits * mask) / tf.reduce_sum(mask)
            self.optimizer.apply_gradients(
                zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
            )
            total += loss
            self.hits.update_state(hit)
        self.loss_tracker.update_state(total / captions.shape[1])
        return {metric.name: metric.result() for metric in self.metrics}


def captions(samples=SAMPLES):
    random = np.random.default_rng(0)
    images = random.normal(size=(samples, 16)).astype("float32")
    tokens = random.integers(1, 20, (samples, 3, 7))
    lengths = random.integers(2, 8, (samples, 3, 1))
    return images, np.where(np.arange(7) < lengths, tokens, 0)


def compare(
    make,
    x,
    y,
    *,
    micro_batch=5,
    target_batch=SAMPLES,
    epochs=2,
    tolerance=1e-9,
    options=None,
    fits=1,
    behind=None,
):
    """Train by plain Keras and by ours, ``fits`` times; compare the last one's logs and what the weights moved by.

    Return ours: the model and the history. ``behind`` is called behind each training, Keras's first.

    ``options`` returns what ``compile`` is given, made anew for each model. Weights in float32 are too coarse to tell
    how far small updates differ. Plain Keras runs eagerly: its compiled step, now and then, lets the assignment of
    clipped weights overtake another operation (once in four runs on two cores).
    """
    moved, histories = [], []
    x, y = tf.nest.map_structure(
        lambda part: part.astype(keras.config.floatx()) if part.dtype.kind == "f" else part, (x, y)
    )
    for ours in (False, True):
        keras.utils.set_random_seed(1)
        model = make()
        model.compile(**(options() if options else {}))
        if not ours:
            model.run_eagerly = True
        before = [np.array(weight) for weight in model.get_weights()]
        common = {"epochs": epochs, "shuffle": False, "verbose": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", autobatch.AutobatchWarning)
            for _ in range(fits):
                history = (
                    autobatch.fit(model, x, y, target_batch=target_batch, micro_batch=micro_batch, **common)
                    if ours
                    else model.fit(x, y, batch_size=target_batch, **common)
                )
                if behind is not None:
                    behind()
        after = model.get_weights()
        if len(before) != len(after):
            before = [np.zeros_like(weight) for weight in after]  # the model has made weights in its first step
        moved.append([new - old for new, old in zip(after, before, strict=True)])
        histories.append(history)
    plain, actual = histories
    error = relative_error(moved[1], moved[0])
    assert error < tolerance, error
    assert actual.history.keys() == plain.history.keys()
    for name, values in plain.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    return model, actual
