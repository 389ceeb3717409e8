"""The digest of what is trained: the same for the same training, whatever Keras counts, and never an error."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from autobatch.trial.content_digest import content_digest

SAMPLE = [("TensorSpec", "float32", (16,))]


def digest(model, *, sample=SAMPLE, **surroundings):
    return content_digest(model, sample, surroundings)


def compiled(model, optimizer="adam", loss="mse", **options):
    model.compile(optimizer, loss, **options)
    return model


def branching(units=4, activation="softmax", function=lambda x: x + 1):
    inputs = keras.Input((16,))
    left = layers.Dense(units, activation=activation)(inputs)
    right = layers.Softmax()(layers.Lambda(function)(layers.Dense(units)(inputs)))
    return keras.Model(inputs, layers.Add()([left, right]))


class Custom(layers.Layer):
    def __init__(self, width, **options):
        super().__init__(**options)
        self.width = width

    def call(self, inputs):
        return inputs[:, : self.width]

    def get_config(self):
        raise ValueError("not today")


class AlsoCustom(Custom):
    def call(self, inputs):
        return inputs[:, : self.width] * 2.0


def of_layer(layer):
    return compiled(keras.Sequential([keras.Input((16,)), layer]))


def test_the_same_made_again():
    known = {digest(compiled(branching())) for _ in range(3)}
    assert len(known) == 1
    assert known == {digest(compiled(branching(), keras.optimizers.Adam(0.3)))}
    assert known == {digest(compiled(branching(), metrics=["mae"], steps_per_execution=2))}


def test_what_makes_a_difference():
    with keras.RematScope(mode="full"):
        rematerialised = compiled(branching())
    made = [
        digest(compiled(branching())),
        digest(compiled(branching(5))),
        digest(compiled(branching(activation="relu"))),
        digest(compiled(branching(function=lambda x: x + 2))),
        digest(compiled(branching(), "sgd")),
        digest(compiled(branching(), keras.optimizers.SGD(momentum=0.9))),
        digest(compiled(branching(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))),
        digest(compiled(branching(), loss="mae")),
        digest(compiled(branching(), loss=lambda y, p: keras.ops.mean(y - p))),
        digest(compiled(branching(), run_eagerly=True)),
        digest(rematerialised),
        digest(compiled(branching()), sample=[("TensorSpec", "float32", (17,))]),
        digest(compiled(branching()), user_limit_bytes=5),
        digest(of_layer(Custom(4))),
        digest(of_layer(Custom(5))),
        digest(of_layer(AlsoCustom(4))),
    ]
    assert len(set(made)) == len(made)
    assert digest(of_layer(Custom(4))) == digest(of_layer(Custom(4)))


def test_losses_by_the_names_of_outputs():
    def two_outputs():
        inputs = keras.Input((16,))
        outputs = [layers.Dense(1)(inputs), layers.Dense(2)(inputs)]
        model = keras.Model(inputs, outputs)
        return compiled(model, loss=dict.fromkeys(model.output_names, "mse"))

    assert digest(two_outputs()) == digest(two_outputs())


class Evil:
    def __getattr__(self, name):
        raise ZeroDivisionError(name)

    def __repr__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "attribute",
    [Evil(), [Evil()], {1: Evil(), "a": 2}, 10**5000, float("nan"), np.zeros(3), {1, "a"}, "\udc80", lambda: Evil()],
    ids=lambda value: type(value).__name__,
)
def test_nothing_that_a_layer_keeps_is_an_error(attribute):
    layer = Custom(4)
    layer.extra = attribute
    assert len(digest(of_layer(layer))) == 64


def test_a_list_that_holds_itself():
    layer = Custom(4)
    own = [1]
    own.append(own)
    object.__setattr__(layer, "extra", own)
    assert len(digest(of_layer(layer))) == 64


def test_a_loss_that_cannot_be_looked_at():
    model = compiled(branching())
    model.loss = Evil()
    assert digest(model) == digest(model)
    assert digest(model) != digest(compiled(branching()))
