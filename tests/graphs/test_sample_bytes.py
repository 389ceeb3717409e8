"""What a traced step tells about a sample; tests/integration holds it against what trials measure."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers
from models import arrays, classifier

from autobatch import opening


def opened(model, x, y):
    return opening.open_trials(model, x, y, target_batch=None, memory_limit_bytes=None, headroom=0.0)


def compiled(*stack):
    model = keras.Sequential(stack)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy())
    return model


def recurrent(steps):
    return compiled(keras.Input((steps, 8)), layers.LSTM(16), layers.Dense(4, activation="softmax"))


def sequences(length):
    return np.zeros((32, length, 8), "float32"), np.zeros(32, "int32")


def test_a_cnn_by_hand():
    model = compiled(
        keras.Input((32, 32, 3)),
        *(layer for _ in range(4) for layer in (layers.Conv2D(16, 3, padding="same"), layers.ReLU())),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4, activation="softmax"),
    )
    estimate = opened(model, np.zeros((32, 32, 32, 3), "float32"), np.zeros(32, "int32")).estimate_sample()
    assert estimate.largest_tensor_bytes == 32 * 32 * 16 * 4
    # A convolution and a ReLU in each of four blocks; what the backward pass waits for is one or two of the three.
    assert 4 < estimate.sample_bytes / estimate.largest_tensor_bytes < 12


def test_a_loop_over_time_counts_once_a_step():
    short, long = (opened(recurrent(steps), *sequences(steps)).estimate_sample() for steps in (10, 40))
    assert 3 < long.sample_bytes / short.sample_bytes < 5


def test_an_eager_model_tells_nothing():
    assert opened(classifier(run_eagerly=True), *arrays()).estimate_sample() is None
