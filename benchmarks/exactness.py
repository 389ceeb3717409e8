"""How far accumulated training is from one large batch: autobatch, Keras's own accumulation, and the usual loop.

``python benchmarks/exactness.py [--output results/exactness.json]``

Each case trains a small model by SGD for two epochs at an effective batch of 32, on 72 samples, so that the last batch
has 8. The figure is the norm of the difference of all weights' changes from those of ``Model.fit(batch_size=32)``, over
the norm of the latter's. The peers are ``SGD(gradient_accumulation_steps=4)`` with ``batch_size=8``, and a loop as it
is copied from page to page: the mean of the gradients of four micro-batches of 8. Ours is ``autobatch.fit`` with a
micro-batch of 7, which divides nothing. BatchNormalization's row compares its moving variance alone.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import autobatch

TARGET, STEPS, SAMPLES, EPOCHS = 32, 4, 72, 2


def squares(y, p):
    return tf.reduce_sum((y - p) ** 2, -1)


def masked_mean(y, p):
    mask = tf.cast(y[:, 0] > 0, p.dtype)
    return tf.reduce_sum(squares(y, p) * mask) / tf.reduce_sum(mask)


def dice(y, p):
    q, t = tf.sigmoid(p), tf.cast(y > 0, p.dtype)
    return 1 - 2 * tf.reduce_sum(q * t) / (tf.reduce_sum(q) + tf.reduce_sum(t))


class Adding(layers.Layer):
    def call(self, inputs):
        self.add_loss(0.01 * tf.reduce_sum(inputs**2, -1))
        return inputs


class OwnStep(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = squares(y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": tf.reduce_mean(loss)}


def dense(loss, *extra, kind=keras.Model):
    def build(optimizer):
        inputs = keras.Input((6,))
        hidden = layers.Dense(5, activation="tanh", kernel_regularizer="l2")(inputs)
        for layer in extra:
            hidden = layer()(hidden)
        model = kind(inputs, layers.Dense(3)(hidden))
        model.compile(optimizer, loss)
        return model

    return build


def sequences(reduction):
    def build(optimizer):
        steps = [keras.Input((7,), dtype="int32"), layers.Embedding(11, 4, mask_zero=True)]
        model = keras.Sequential([*steps, layers.LSTM(5, return_sequences=True), layers.Dense(3)])
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
        return model

    return build


CASES = {
    "mean": dense("mse"),
    "sum": dense(keras.losses.MeanSquaredError(reduction="sum")),
    "sum of one's own": dense(lambda y, p: tf.reduce_sum(squares(y, p))),
    "vector to the tape": dense(None, kind=OwnStep),
    "masked mean of one's own": dense(masked_mean),
    "Dice over the batch": dense(dice),
    "one number a sample by add_loss": dense("mse", Adding),
    "masked sequences": sequences("sum_over_batch_size"),
    "masked, mean_with_sample_weight": sequences("mean_with_sample_weight"),
    "BatchNormalization, moving variance": dense("mse", lambda: layers.BatchNormalization(name="norm")),
}


def data(name):
    random = np.random.default_rng(0)
    if name.startswith("masked se") or name.startswith("masked, "):
        x = random.integers(1, 11, (SAMPLES, 7))
        x[np.arange(7)[None] >= random.integers(1, 8, SAMPLES)[:, None]] = 0
        return x, random.integers(0, 3, (SAMPLES, 7))
    return random.normal(size=(SAMPLES, 6)).astype("float32"), random.normal(size=(SAMPLES, 3)).astype("float32")


def by_the_usual_loop(model, x, y):
    variables = model.trainable_variables
    for _ in range(EPOCHS):
        for start in range(0, SAMPLES, TARGET):
            sums, steps = [0.0] * len(variables), 0
            for at in range(start, min(start + TARGET, SAMPLES), TARGET // STEPS):
                part = slice(at, at + TARGET // STEPS)
                with tf.GradientTape() as tape:
                    if isinstance(model, OwnStep):
                        loss = squares(y[part], model(x[part], training=True))
                    else:
                        loss = model.compute_loss(x[part], y[part], model(x[part], training=True))
                gradients = map(tf.convert_to_tensor, tape.gradient(loss, variables))
                sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
                steps += 1
            model.optimizer.apply([total / steps for total in sums], variables)


def trained(name, how):
    keras.utils.set_random_seed(1)
    accumulating = {"gradient_accumulation_steps": STEPS} if how == "Keras" else {}
    model = CASES[name](keras.optimizers.SGD(0.01, **accumulating))
    before = model.get_weights()
    x, y = data(name)
    options = {"epochs": EPOCHS, "shuffle": False, "verbose": 0}
    if how == "autobatch":
        autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=7, cache=False, **options)
    elif how == "loop":
        by_the_usual_loop(model, x, y)
    else:
        model.fit(x, y, batch_size=TARGET if how == "plain" else TARGET // STEPS, **options)
    if name.startswith("BatchNorm"):
        return model.get_layer("norm").moving_variance.numpy()
    changes = [(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)]
    return np.concatenate(changes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {}
    print(f"{'relative error of the update':<36} {'autobatch':>10} {'Keras':>10} {'loop':>10}")
    for name in CASES:
        plain = trained(name, "plain")
        errors = {
            how: float(np.linalg.norm(trained(name, how) - plain) / np.linalg.norm(plain))
            for how in ("autobatch", "Keras", "loop")
        }
        found[name] = errors
        print(f"{name:<36} {errors['autobatch']:>10.1e} {errors['Keras']:>10.1e} {errors['loop']:>10.1e}", flush=True)
    if options.output:
        versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"versions": versions, "errors": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
