"""Layers are named each with its own class, and optimizers by where the user keeps them."""

from __future__ import annotations

import keras
from keras import layers

from autobatch.differences.naming import listed, named, optimizer_name, the_optimizer


def test_each_layer_has_its_own_class():
    both = [layers.RandomRotation(0.1, name="turn"), layers.RandomFlip(name="flip")]
    assert named(both) == "RandomRotation (turn) and RandomFlip (flip)"
    many = [layers.Dropout(0.1, name=f"d{number}") for number in range(5)]
    assert named([*many, *both]) == "Dropout (d0, d1, d2 and 2 more), RandomRotation (turn) and RandomFlip (flip)"
    kinds = [layers.GaussianNoise(0.1, name="noise"), layers.AlphaDropout(0.1, name="alpha")]
    assert named([many[0], *both, *kinds]) == (
        "Dropout (d0), RandomRotation (turn), RandomFlip (flip) and 2 more layers"
    )


def test_names_are_listed():
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_optimizers_are_named_by_the_attribute_of_the_model():
    model = keras.Sequential([layers.Dense(1)])
    model.compile(keras.optimizers.SGD())
    model.d_optimizer = keras.optimizers.Adam()
    model.others = {"slow": keras.optimizers.Adam(), "fast": keras.optimizers.Adam()}
    model.more = [keras.optimizers.Adam()]
    elsewhere = keras.optimizers.SGD(name="elsewhere")
    assert the_optimizer(model, model.optimizer) == "the optimizer"
    assert the_optimizer(model, model.d_optimizer) == "d_optimizer"
    assert optimizer_name(model, model.others["fast"]) == "others['fast']"
    assert optimizer_name(model, model.more[0]) == "more[0]"
    assert optimizer_name(model, elsewhere) == "elsewhere"
