"""Distillation by a train_step of its own, with a frozen teacher, as in Keras's example."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from models import arrays, relative_error

import autobatch


class Distiller(keras.Model):
    """A student that learns from the labels and from what its teacher, softened, makes of the same samples."""

    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student
        self.teacher.trainable = False
        self.student_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.distillation_loss = keras.losses.KLDivergence()
        self.total = keras.metrics.Mean(name="total")

    def train_step(self, data):
        x, y = data
        taught = self.teacher(x, training=False)
        with tf.GradientTape() as tape:
            logits = self.student(x, training=True)
            student_loss = self.student_loss(y, logits)
            soft = self.distillation_loss(ops.softmax(taught / 3.0), ops.softmax(logits / 3.0)) * 3.0**2
            loss = 0.3 * student_loss + 0.7 * soft
        weights = self.student.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.total.update_state(loss)
        for metric in self.metrics:
            if metric.name == "compile_metrics":
                metric.update_state(y, logits)
        results = {metric.name: metric.result() for metric in self.metrics if metric.name != "loss"}
        return {**results, "loss": self.total.result(), "soft": soft}

    def call(self, x):
        return self.student(x)


def test_a_frozen_teacher():
    x, y = arrays(samples=100)

    def build():
        keras.utils.set_random_seed(1)
        teacher = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(10)])
        student = keras.Sequential([keras.Input((16,)), layers.Dense(8, "relu"), layers.Dense(10)])
        model = Distiller(teacher, student)
        model.compile(keras.optimizers.SGD(0.3, momentum=0.9), metrics=["accuracy"])
        return model

    plain, ours = build(), build()
    taught = [weight.copy() for weight in plain.teacher.get_weights()]
    common = {"epochs": 2, "shuffle": False, "verbose": 0}
    expected = plain.fit(x, y, batch_size=40, **common)
    actual = autobatch.fit(ours, x, y, target_batch=40, micro_batch=14, **common)
    assert relative_error(ours.student.get_weights(), plain.student.get_weights()) < 1e-5
    assert all(np.array_equal(now, was) for now, was in zip(ours.teacher.get_weights(), taught, strict=True))
    assert {"loss", "soft", "total"} <= set(expected.history)
    for name, values in expected.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=1e-5, err_msg=name)
