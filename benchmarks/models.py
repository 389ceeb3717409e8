"""Eleven real Keras models with random weights, each with data, a memory limit and a range of micro-batches.

Images and sequences are small, so that a step takes a few seconds at the most on two CPU cores; the limits are set so
that between about 40 and 250 samples fit. Nothing is downloaded: data are random numbers of the right shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

CLASSES = 10
SAMPLES = 32


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """One model of the benchmark.

    ``build`` returns it compiled, ``data`` returns ``(x, y)`` arrays of ``SAMPLES`` samples; ``limit_mib`` is the arena
    that it is run in and ``largest_considered`` the largest micro-batch that a search may return.
    """

    name: str
    build: Callable[[], Any]
    data: Callable[[], tuple[Any, Any]]
    limit_mib: int
    largest_considered: int


def _images(pixels: int, channels: int = 3) -> Callable[[], tuple[Any, Any]]:
    def data() -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        x = rng.random((SAMPLES, pixels, pixels, channels), np.float32)
        return x, rng.integers(0, CLASSES, SAMPLES)

    return data


def _tokens(length: int, words: int) -> Callable[[], tuple[Any, Any]]:
    def data() -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        return rng.integers(1, words, (SAMPLES, length)), rng.integers(0, CLASSES, SAMPLES)

    return data


def _classifier(model: Any, optimizer: Any = "adam", *, logits: bool = False) -> Any:
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=logits), metrics=["accuracy"])
    return model


# -- keras.applications ---------------------------------------------------------------------------------------------


def _application(name: str, pixels: int, optimizer: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        application = getattr(keras.applications, name)
        model = application(weights=None, input_shape=(pixels, pixels, 3), classes=CLASSES, **options)
        return _classifier(model, optimizer)

    return build


# -- segmentation ---------------------------------------------------------------------------------------------------


def _double_convolution(x: Any, filters: int) -> Any:
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return x


def _build_unet() -> Any:
    inputs = keras.Input((64, 64, 3))
    x, skips = inputs, []
    for filters in (8, 16, 32):
        x = _double_convolution(x, filters)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = _double_convolution(x, 64)
    for filters, skip in zip((32, 16, 8), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
        x = _double_convolution(layers.Concatenate()([x, skip]), filters)
    outputs = layers.Conv2D(3, 1, activation="softmax")(x)
    return _classifier(keras.Model(inputs, outputs, name="unet"))


def _unet_data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.random((SAMPLES, 64, 64, 3), np.float32), rng.integers(0, 3, (SAMPLES, 64, 64))


# -- sequences ------------------------------------------------------------------------------------------------------


def _build_lstm() -> Any:
    inputs = keras.Input((48, 16))
    x = layers.LSTM(96, return_sequences=True)(inputs)
    x = layers.LSTM(96)(x)
    return _classifier(keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x), name="lstm"))


def _lstm_data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.random((SAMPLES, 48, 16), np.float32), rng.integers(0, CLASSES, SAMPLES)


@keras.saving.register_keras_serializable("autobatch_benchmarks")
class _Positions(layers.Layer):
    def __init__(self, length: int, width: int, **options: Any) -> None:
        super().__init__(**options)
        self._positions = layers.Embedding(length, width)
        self._length = length

    def build(self, input_shape: Any) -> None:
        self._positions.build((self._length,))
        self.built = True

    def call(self, x: Any) -> Any:
        return x + self._positions(keras.ops.arange(self._length))


def _transformer_block(x: Any, *, heads: int, width: int, causal: bool) -> Any:
    normed = layers.LayerNormalization()(x)
    attention = layers.MultiHeadAttention(heads, width // heads, dropout=0.1)
    x = x + attention(normed, normed, use_causal_mask=causal)
    normed = layers.LayerNormalization()(x)
    hidden = layers.Dense(4 * width, activation="gelu")(normed)
    return x + layers.Dropout(0.1)(layers.Dense(width)(hidden))


def _build_transformer_encoder() -> Any:
    inputs = keras.Input((64,), dtype="int32")
    x = _Positions(64, 64)(layers.Embedding(2000, 64)(inputs))
    for _ in range(3):
        x = _transformer_block(x, heads=4, width=64, causal=False)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    outputs = layers.Dense(CLASSES, activation="softmax")(x)
    return _classifier(keras.Model(inputs, outputs, name="transformer_encoder"))


def _build_gpt() -> Any:
    inputs = keras.Input((64,), dtype="int32")
    x = _Positions(64, 96)(layers.Embedding(1000, 96)(inputs))
    for _ in range(4):
        x = _transformer_block(x, heads=4, width=96, causal=True)
    outputs = layers.Dense(1000)(layers.LayerNormalization()(x))
    model = keras.Model(inputs, outputs, name="gpt")
    return _classifier(model, keras.optimizers.AdamW(), logits=True)


def _gpt_data() -> tuple[Any, Any]:
    tokens = np.random.default_rng(0).integers(0, 1000, (SAMPLES, 65))
    return tokens[:, :-1], tokens[:, 1:]


def _build_masked_text() -> Any:
    inputs = keras.Input((60,), dtype="int32")
    x = layers.Embedding(5000, 64, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.GRU(48, return_sequences=True))(x)
    x = layers.GlobalAveragePooling1D()(x)
    outputs = layers.Dense(CLASSES, activation="softmax")(layers.Dense(64, activation="relu")(x))
    return _classifier(keras.Model(inputs, outputs, name="masked_text"))


def _masked_text_data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 5000, (SAMPLES, 60))
    lengths = rng.integers(10, 61, SAMPLES)
    x[np.arange(60)[None, :] >= lengths[:, None]] = 0
    return x, rng.integers(0, CLASSES, SAMPLES)


# -- a train_step of its own ----------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("autobatch_benchmarks")
class _VariationalAutoencoder(keras.Model):  # type: ignore[misc]
    """After the Keras example: two networks, a sampled code, and three losses that it tracks itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        inputs = keras.Input((64, 64, 1))
        x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(inputs)
        x = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(x)
        x = layers.Dense(64, activation="relu")(layers.Flatten()(x))
        self.encoder = keras.Model(inputs, [layers.Dense(8)(x), layers.Dense(8)(x)], name="encoder")
        code = keras.Input((8,))
        x = layers.Reshape((16, 16, 32))(layers.Dense(16 * 16 * 32, activation="relu")(code))
        x = layers.Conv2DTranspose(32, 3, strides=2, padding="same", activation="relu")(x)
        x = layers.Conv2DTranspose(16, 3, strides=2, padding="same", activation="relu")(x)
        outputs = layers.Conv2DTranspose(1, 3, padding="same", activation="sigmoid")(x)
        self.decoder = keras.Model(code, outputs, name="decoder")
        self.seed_generator = keras.random.SeedGenerator(0)
        self.total_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self) -> list[Any]:
        return [self.total_tracker]

    def call(self, images: Any) -> Any:
        return self.decoder(self.encoder(images)[0])

    def train_step(self, data: Any) -> Any:
        images = data[0] if isinstance(data, tuple) else data
        with tf.GradientTape() as tape:
            mean, log_variance = self.encoder(images, training=True)
            noise = keras.random.normal(tf.shape(mean), seed=self.seed_generator)
            rebuilt = self.decoder(mean + tf.exp(0.5 * log_variance) * noise, training=True)
            rebuilding = tf.reduce_mean(tf.reduce_sum(keras.losses.binary_crossentropy(images, rebuilt), axis=(1, 2)))
            divergence = -0.5 * (1 + log_variance - tf.square(mean) - tf.exp(log_variance))
            total = rebuilding + tf.reduce_mean(tf.reduce_sum(divergence, axis=1))
        gradients = tape.gradient(total, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.total_tracker.update_state(total)
        return {metric.name: metric.result() for metric in self.metrics}


def _build_vae() -> Any:
    model = _VariationalAutoencoder(name="vae")
    model.compile(keras.optimizers.Adam())
    return model


# -- others ---------------------------------------------------------------------------------------------------------


def _build_plain_cnn() -> Any:
    model = keras.Sequential(name="plain_cnn")
    model.add(keras.Input((64, 64, 3)))
    for filters in (16, 32, 64):
        model.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        model.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dropout(0.3))
    model.add(layers.Dense(128, activation="relu"))
    model.add(layers.Dense(CLASSES, activation="softmax"))
    return _classifier(model)


_ALL = (
    BenchmarkModel("resnet50", _application("ResNet50", 64, "sgd"), _images(64), 640, 128),
    BenchmarkModel(
        "mobilenet_v3_small",
        _application("MobileNetV3Small", 64, "adam", include_preprocessing=False),
        _images(64),
        384,
        256,
    ),
    BenchmarkModel("efficientnet_b0", _application("EfficientNetB0", 48, "adam"), _images(48), 512, 128),
    BenchmarkModel("convnext_tiny", _application("ConvNeXtTiny", 32, "sgd"), _images(32), 640, 64),
    BenchmarkModel("unet", _build_unet, _unet_data, 320, 256),
    BenchmarkModel("lstm", _build_lstm, _lstm_data, 64, 256),
    BenchmarkModel("transformer_encoder", _build_transformer_encoder, _tokens(64, 2000), 320, 256),
    BenchmarkModel("gpt", _build_gpt, _gpt_data, 384, 128),
    BenchmarkModel("masked_text", _build_masked_text, _masked_text_data, 48, 256),
    BenchmarkModel("vae", _build_vae, _images(64, 1), 256, 512),
    BenchmarkModel("plain_cnn", _build_plain_cnn, _images(64), 256, 256),
)

MODELS: dict[str, BenchmarkModel] = {model.name: model for model in _ALL}
