"""Steps, losses and data of elements whose parts have different numbers of rows, which several tests train."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from models import run_out_if

import autobatch

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(64, 6)).astype("float32"), RANDOM.integers(0, 3, 64)
U = RANDOM.normal(size=(192, 6)).astype("float32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
zipped = tf.data.Dataset.zip


def labelled(samples=64, size=8, drop=True):
    return tf.data.Dataset.from_tensor_slices((X[:samples], Y[:samples])).batch(size, drop_remainder=drop)


def unlabelled(size=24):
    return tf.data.Dataset.from_tensor_slices(U).batch(size, drop_remainder=True)


class Stepping(keras.Model):
    """A model whose train_step differentiates ``loss(model, data)``; ``asked`` makes a step run out of memory."""

    def __init__(self, loss, asked=None):
        super().__init__()
        self.net = keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(3)])
        self.net.build((None, 6))
        self.teacher = keras.models.clone_model(self.net)
        self.teacher.build((None, 6))
        self.loss_of, self.asked = loss, asked
        self.tracker = keras.metrics.Mean(name="loss")
        self.certainty = keras.metrics.Mean(name="certainty")

    @property
    def metrics(self):
        return [self.tracker, self.certainty]

    def call(self, inputs):
        return self.net(inputs)

    def _logs(self, data, loss):
        self.tracker.update_state(loss)
        rows = [part for part in tf.nest.flatten(data) if part.dtype.is_floating and part.shape[1:] == (6,)]
        if rows:
            self.certainty.update_state(tf.reduce_max(self.teacher(rows[-1]), -1))
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(self, data)
            if self.asked is not None:
                loss *= 1.0 + run_out_if(self.asked)  # the gradients wait for it
        weights = self.net.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return self._logs(data, loss)

    def test_step(self, data):
        return self._logs(data, self.loss_of(self, data))


def mean_teacher(model, data):
    (x, y), u = data
    target = tf.nn.softmax(model.teacher(u * 0.9))
    consistency = tf.reduce_mean(tf.reduce_sum((tf.nn.softmax(model.net(u)) - target) ** 2, -1))
    return CROSS_ENTROPY(y, model.net(x)) + 2.0 * consistency


def fixmatch(model, data):
    """Only unlabelled samples that the teacher is sure of count, and they count as a sum over their own number."""
    (x, y), u = data
    target = tf.nn.softmax(model.teacher(u * 0.9))
    sure = tf.cast(tf.reduce_max(target, -1) > 0.4, tf.float32)
    each = tf.reduce_sum((tf.nn.softmax(model.net(u)) - target) ** 2, -1)
    return CROSS_ENTROPY(y, model.net(x)) + tf.reduce_sum(sure * each) / tf.reduce_sum(sure)


def side_by_side(model, data):
    """Both streams go through the network together, as where it normalises, and are taken apart again."""
    (x, y), u = data
    samples = tf.shape(x)[0]
    logits = model.net(tf.concat([x, u], 0))
    target = tf.nn.softmax(model.teacher(u * 0.9))
    sure = tf.cast(tf.reduce_max(target, -1) > 0.4, tf.float32)
    each = tf.reduce_sum((tf.nn.softmax(logits[samples:]) - target) ** 2, -1)
    return CROSS_ENTROPY(y, logits[:samples]) + tf.reduce_sum(sure * each) / tf.reduce_sum(sure)


def two_views(model, data):
    (x, y), u = data
    one, other = tf.split(model.net(tf.concat([u * 1.1, u * 0.9], 0)), 2)
    return CROSS_ENTROPY(y, model.net(x)) + tf.reduce_sum((one - other) ** 2) / 50.0


def contrastive(model, data):
    u, (x, y) = data
    one, other = (tf.math.l2_normalize(model.net(view), 1) for view in (u, u * 1.1 + 0.1))
    alike = tf.matmul(one, other, transpose_b=True) / 0.1
    return CROSS_ENTROPY(tf.range(tf.shape(u)[0]), alike) + CROSS_ENTROPY(y, model.net(x))


def gallery(model, data):
    query, others = data
    return CROSS_ENTROPY(tf.constant([3]), tf.matmul(model.net(query), model.net(others), transpose_b=True))


def triplet(model, data):
    anchor, positive, negatives = data
    near = tf.reduce_sum((model.net(anchor) - model.net(positive)) ** 2, -1)
    far = tf.reshape(tf.reduce_sum((model.net(negatives) - tf.repeat(model.net(anchor), 3, 0)) ** 2, -1), [-1, 3])
    return tf.reduce_mean(tf.maximum(near - tf.reduce_min(far, -1) + 1.0, 0.0))


def graph(model, data):
    nodes, edges = data["nodes"], data["edges"]
    hidden = model.net(nodes)
    return tf.reduce_mean((tf.gather(hidden, edges[:, 0]) - tf.gather(hidden, edges[:, 1])) ** 2)


def molecules(model, data):
    """Molecules of one size merged into one graph: atoms, bonds and labels have a measure, and the edges none."""
    (x, y, _) = keras.utils.unpack_x_y_sample_weight(data)
    atoms = model.net(x["atoms"])
    messages = keras.ops.take(atoms, x["pairs"][:, 1], axis=0)
    received = keras.ops.segment_sum(messages, x["pairs"][:, 0], num_segments=20)
    pooled = keras.ops.segment_sum(received, x["molecule"], num_segments=4)
    return tf.reduce_mean((tf.reduce_sum(pooled, -1, keepdims=True) - y) ** 2)


def merged_molecules(batches=3):
    random = np.random.default_rng(2)
    offsets = np.repeat(np.arange(4) * 5, 7)[:, None]
    return Elements(
        [
            (
                {
                    "atoms": random.normal(size=(20, 6)).astype("float32"),
                    "molecule": np.repeat(np.arange(4), 5).astype("int32"),
                    "pairs": (random.integers(0, 5, (28, 2)) + offsets).astype("int32"),
                },
                random.normal(size=(4, 1)).astype("float32"),
            )
            for _ in range(batches)
        ]
    )


def stacked(model, data):
    pair = data[0] if isinstance(data, tuple) else data
    anchors, positives = pair[0], pair[1]
    similarities = tf.einsum("ae,pe->ap", model.net(anchors), model.net(positives)) / 0.2
    return CROSS_ENTROPY(tf.range(3), similarities)


def made(loss, asked=None, **options):
    keras.utils.set_random_seed(1)
    model = Stepping(loss, asked)
    model.compile(keras.optimizers.SGD(0.1), **options)
    return model


class Elements(keras.utils.PyDataset):
    def __init__(self, elements):
        super().__init__()
        self.elements = elements

    def __len__(self):
        return len(self.elements)

    def __getitem__(self, index):
        return self.elements[index]


def graphs(*sizes):
    random = np.random.default_rng(1)
    return Elements(
        [
            {"nodes": random.normal(size=(n, 6)).astype("float32"), "edges": random.integers(0, n, (edges, 2))}
            for n, edges in sizes
        ]
    )


def off(model, plain, start):
    """The largest difference from plain Keras's weights, relative to what plain training has changed."""
    changes = zip(model.get_weights(), plain.get_weights(), start, strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b - w).max() + 1e-12)) for a, b, w in changes)


def both(loss, data, *, target, micro, plain_data=None, epochs=2, **options):
    """Train in plain Keras and here; return the difference, both histories, and the model."""
    plain, model = made(loss), made(loss)
    start = plain.get_weights()
    options |= {"epochs": epochs, "verbose": 0, "shuffle": False}
    expected = plain.fit(data() if plain_data is None else plain_data(), **options)
    history = autobatch.fit(model, data(), target_batch=target, micro_batch=micro, **options)
    return off(model, plain, start), expected, history, model
