"""Run by the tests in a terminal: trainings whose search or steps run out of memory for real.

``python terminal_fit.py arena|hungry``
"""

import sys

import autobatch

if sys.argv[1] == "arena":
    autobatch.limit_memory("96MiB")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

TOO_MANY = 1 << 44


class Said(layers.Layer):
    """Prints while it is traced, as people do who look for a fault."""

    def call(self, inputs):
        print("printed while traced")
        print("told while traced", file=sys.stderr)
        return inputs


class Hungry(layers.Layer):
    """Wants more than any machine has, for more samples than ``most``."""

    def __init__(self, most):
        super().__init__()
        self._most = most

    def build(self, shape):
        self.most = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.most.assign(self._most)

    def call(self, inputs):
        wanted = tf.where(tf.shape(inputs)[0] > tf.convert_to_tensor(self.most), TOO_MANY, 4)
        return inputs + 1e-30 * tf.random.normal(tf.reshape(wanted, [1]))[0]


class Feeds(keras.callbacks.Callback):
    """Takes memory away for a while."""

    def on_train_batch_begin(self, batch, logs=None):
        layer = self.model.layers[0]
        layer.most.assign(9 if batch == 3 else 20)


def arena():
    keras.utils.set_random_seed(0)
    convolutions = [layers.Conv2D(16, 3, activation="relu") for _ in range(2)]
    model = keras.Sequential(
        [keras.Input((32, 32, 3)), Said(), Hungry(100), *convolutions, layers.GlobalAveragePooling2D(), layers.Dense(3)]
    )
    model.compile("sgd", "mse")
    data = np.zeros((512, 32, 32, 3), "float32"), np.zeros((512, 3), "float32")
    history = autobatch.fit(model, *data, target_batch=512, epochs=2, cache=False)
    failed = [trial.micro_batch for trial in history.report.trials if not trial.fits]
    print("failed:", failed, "plan:", history.plan.micro_batch)


def hungry():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), Hungry(20), layers.Dense(3)])
    model.compile("sgd", "mse")
    data = np.zeros((40 * 40, 4), "float32"), np.zeros((40 * 40, 3), "float32")
    options = {"target_batch": 40, "cache": False}
    history = autobatch.fit(model, *data, epochs=1, callbacks=[Feeds()], micro_batch=20, **options)
    print("recovered:", [(each.micro_batch_before, each.micro_batch_after) for each in history.recoveries])
    print("silent from here")
    autobatch.fit(model, *data, epochs=1, callbacks=[Feeds()], verbose=0, **options)
    print("silent until here")
    keras.backend.clear_session()
    # By size, not by speed, which depends on what else runs.
    autobatch.tune(model, *data, target_batch=40, objective="largest", cache=False)


if __name__ == "__main__":
    {"arena": arena, "hungry": hungry}[sys.argv[1]]()
