"""Six small convolutional models for :mod:`used_processes`, compiled, each with data of the right shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

SAMPLES = 512
CLASSES = 10

Built = tuple[Any, Any, Any]
"""A compiled model, its inputs and its targets."""


def _images(pixels: int, channels: int = 3) -> Any:
    return np.random.default_rng(0).random((SAMPLES, pixels, pixels, channels), np.float32)


def _classifier(inputs: Any, features: Any, pixels: int) -> Built:
    model = keras.Model(inputs, layers.Dense(CLASSES)(features))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, _images(pixels), np.random.default_rng(1).integers(0, CLASSES, SAMPLES)


def cnn() -> Built:
    inputs = x = keras.Input((32, 32, 3))
    for filters in (16, 32, 64):
        x = layers.MaxPooling2D()(layers.Conv2D(filters, 3, padding="same", activation="relu")(x))
    return _classifier(inputs, layers.Dense(128, activation="relu")(layers.Flatten()(x)), 32)


def residual() -> Built:
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = layers.Conv2D(filters, 3, strides=strides, padding="same")(x)
        y = layers.Conv2D(filters, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(y)))
        short = layers.Conv2D(filters, 1, strides=strides)(x)
        x = layers.ReLU()(layers.Add()([layers.BatchNormalization()(y), short]))
    return _classifier(inputs, layers.GlobalAveragePooling2D()(x), 32)


def depthwise() -> Built:
    inputs = keras.Input((48, 48, 3))
    x = layers.Conv2D(16, 3, strides=2, padding="same")(inputs)
    for filters, strides in ((32, 1), (64, 2), (64, 1)):
        for layer in (layers.DepthwiseConv2D(3, strides=strides, padding="same"), layers.Conv2D(filters, 1)):
            x = layers.ReLU()(layers.BatchNormalization()(layer(x)))
    return _classifier(inputs, layers.GlobalAveragePooling2D()(x), 48)


def unet() -> Built:
    inputs = x = keras.Input((32, 32, 3))
    skips = []
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    for filters, skip in zip((16, 8), reversed(skips), strict=True):
        x = layers.Concatenate()([layers.Conv2DTranspose(filters, 2, strides=2)(x), skip])
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
    model = keras.Model(inputs, layers.Conv2D(3, 1)(x))
    model.compile("adam", "mse")
    return model, _images(32), _images(32)


def autoencoder() -> Built:
    stack = [keras.Input((28, 28, 1))]
    stack += [layers.Conv2D(each, 3, padding="same", strides=2, activation="relu") for each in (32, 64)]
    stack += [layers.Conv2DTranspose(each, 3, padding="same", strides=2, activation="relu") for each in (64, 32)]
    model = keras.Sequential([*stack, layers.Conv2D(1, 3, padding="same", activation="sigmoid")])
    model.compile("adam", "binary_crossentropy")
    return model, _images(28, 1), _images(28, 1)


class _Gan(keras.Model):
    """Discriminator and generator, one update each from gradients that are taken first."""

    def __init__(self) -> None:
        super().__init__()
        strided: dict[str, Any] = {"strides": 2, "padding": "same"}
        self.discriminator = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                *(part for each in (32, 64) for part in (layers.Conv2D(each, 3, **strided), layers.LeakyReLU())),
                layers.GlobalMaxPooling2D(),
                layers.Dense(1),
            ]
        )
        self.generator = keras.Sequential(
            [
                keras.Input((64,)),
                layers.Dense(7 * 7 * 64),
                layers.LeakyReLU(),
                layers.Reshape((7, 7, 64)),
                *(
                    part
                    for each in (64, 32)
                    for part in (layers.Conv2DTranspose(each, 4, **strided), layers.LeakyReLU())
                ),
                layers.Conv2D(1, 7, padding="same", activation="sigmoid"),
            ]
        )
        self.built = True
        self.optimizers = [keras.optimizers.Adam(), keras.optimizers.Adam()]
        self.entropy = keras.losses.BinaryCrossentropy(from_logits=True)

    def train_step(self, real: Any) -> dict[str, Any]:
        real = real[0] if isinstance(real, tuple) else real
        samples = tf.shape(real)[0]
        ones, zeros = tf.ones((samples, 1)), tf.zeros((samples, 1))
        made = self.generator(tf.random.normal((samples, 64)))
        with tf.GradientTape() as tape:
            told = self.discriminator(tf.concat([made, real], 0))
            of_discriminator = self.entropy(tf.concat([ones, zeros], 0), told)
        first = tape.gradient(of_discriminator, self.discriminator.trainable_weights)
        noise = tf.random.normal((samples, 64))
        with tf.GradientTape() as tape:
            of_generator = self.entropy(zeros, self.discriminator(self.generator(noise)))
        second = tape.gradient(of_generator, self.generator.trainable_weights)
        self.optimizers[0].apply(first, self.discriminator.trainable_weights)
        self.optimizers[1].apply(second, self.generator.trainable_weights)
        return {"discriminator": of_discriminator, "generator": of_generator}


def gan() -> Built:
    model = _Gan()
    model.compile()
    return model, _images(28, 1), None


SMALL_MODELS: dict[str, Callable[[], Built]] = {
    build.__name__: build for build in (cnn, residual, depthwise, unet, autoencoder, gan)
}


def built(name: str, samples: int) -> Built:
    """Return a model with data repeated to ``samples``: one of these behind "small ", else one of :mod:`models`."""
    if name.startswith("small "):
        model, x, y = SMALL_MODELS[name.removeprefix("small ")]()
    else:
        from models import MODELS

        model, (x, y) = MODELS[name].build(), MODELS[name].data()
    first = x if not isinstance(x, (tuple, list, dict)) else next(iter(x.values() if isinstance(x, dict) else x))
    times = -(-samples // len(first))
    x, y = ((None if given is None else np.concatenate([given] * times)[:samples]) for given in (x, y))
    return model, x, y
