"""What a backup is told by: data of every kind, and a model's weights and layers, whatever numbers Keras gives them."""

import random

import keras
import numpy as np
import optional
import pandas as pd
import pytest
import scipy.sparse
import tensorflow as tf
from keras import layers

from autobatch.backup import fingerprint

NUMBERS = np.arange(40, dtype="float32").reshape(20, 2)


def changed(array):
    array = array.copy()
    array[-1] += 1
    return array


def ragged(array):
    return tf.RaggedTensor.from_row_lengths(array[:, 0], [1] * 19 + [1])


KINDS = {
    "array": lambda array: array,
    "dict": lambda array: {"a": array, "b": array[:, 0]},
    "list": lambda array: [array, array],
    "tensor": tf.constant,
    "ragged": ragged,
    "sparse tensor": tf.sparse.from_dense,
    "scipy": scipy.sparse.csr_matrix,
    "frame": lambda array: pd.DataFrame(array, columns=["a", "b"]),
    "frame of mixed columns": lambda array: pd.DataFrame({"a": array[:, 0], "b": array[:, 1].astype("int64")}),
    "torch": lambda array: optional.torch().tensor(array),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_samples_are_told(kind):
    make = KINDS[kind]
    found = fingerprint.of_data(make(NUMBERS), NUMBERS, {})
    assert fingerprint.difference(found, fingerprint.of_data(make(NUMBERS.copy()), NUMBERS, {})) == ""
    other = fingerprint.of_data(make(changed(NUMBERS)), NUMBERS, {})
    assert fingerprint.difference(found, other).startswith("x")
    assert "samples" in fingerprint.difference(found, other)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sample_weight": np.ones(20)}, "sample_weight"),
        ({"class_weight": {0: 1.0, 1: 2.0}}, "class_weight"),
        ({"shuffle": "batch"}, "shuffle"),
        ({"steps_per_epoch": 3}, "steps_per_epoch"),
        ({"validation_split": 0.5}, "validation_split"),
    ],
)
def test_options_that_order_the_data_are_told(options, name):
    found = fingerprint.of_data(NUMBERS, NUMBERS, {})
    assert fingerprint.difference(found, fingerprint.of_data(NUMBERS, NUMBERS, options)).startswith(f"{name} was not")


def test_datasets_are_told_by_what_they_are_made_of():
    def of(dataset):
        return fingerprint.of_data(dataset, None, {})["x"]

    numbers = tf.data.Dataset.from_tensor_slices(NUMBERS)
    assert of(numbers.batch(4)) == of(tf.data.Dataset.from_tensor_slices(NUMBERS).batch(4))
    assert len({of(numbers.batch(4)), of(numbers.batch(5)), of(numbers.batch(4).repeat()), of(numbers)}) == 4


class Rate(layers.Layer):
    def __init__(self, rate, **options):
        super().__init__(**options)
        self.rate = rate

    def call(self, inputs):
        return inputs * self.rate

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


def model(*, rate=0.5, width=4, function=None):
    inner = keras.Sequential([keras.Input((2,)), layers.Dense(width), layers.Dense(2)])
    made = keras.Sequential(
        [keras.Input((2,)), inner, Rate(rate), layers.Lambda(function or (lambda x: x)), layers.Dense(1)]
    )
    made.compile(keras.optimizers.Adam(), "mse")
    return made


def test_the_same_model_is_told_as_the_same_with_other_numbers_in_its_names():
    found = fingerprint.of_model(model())
    again = model()
    assert again.layers[-1].name != "dense"
    assert fingerprint.difference(found, fingerprint.of_model(again)) == ""
    assert fingerprint.difference(found, fingerprint.of_model(model(function=lambda x: x + 0))) == "", "code moves"


class Wraps(layers.Layer):
    """A layer with a part of Keras's, and with what a process orders and chooses by chance."""

    def __init__(self, words):
        super().__init__()
        self.part, self.words, self.seed = layers.Activation("relu"), words, random.random()

    def call(self, inputs):
        return self.part(inputs)

    def get_config(self):
        part = {"class_name": "Activation", "config": {"name": self.part.name}}
        return {"part": part, "words": set(self.words), "seeded": {"seed": self.seed}}


def test_what_a_process_chooses_by_chance_does_not_count():
    def made(*words):
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.RandomCrop(4, 4), Wraps(words), layers.RandomFlip()])
        model.compile("sgd", "mse")
        return model

    one, other = made("a", "b"), made("a", "b")
    assert one.layers[0].get_config()["seed"] != other.layers[0].get_config()["seed"]
    assert one.layers[1].part.name != other.layers[1].part.name
    assert fingerprint.difference(fingerprint.of_model(one), fingerprint.of_model(other)) == ""
    assert "words" in fingerprint.difference(fingerprint.of_model(one), fingerprint.of_model(made("a", "c")))


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"rate": 0.25}, "layer rate was Rate"),
        ({"width": 5}, "weight sequential/dense/kernel was float32 of shape (2, 4)"),
    ],
)
def test_another_layer_or_weight_is_named(other, name):
    found, now = fingerprint.of_model(model()), fingerprint.of_model(model(**other))
    assert fingerprint.difference(found, now).startswith(name)
