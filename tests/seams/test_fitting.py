"""Keras's ``fit`` is where this project looks for it, and is replaced for every reference to it."""

from __future__ import annotations

import inspect

import keras
import numpy as np

from autobatch.seams import fitting

_TAKEN_BEFORE = keras.Model.fit


def test_every_reference_finds_the_replacement_and_then_kerass_again():
    assert inspect.unwrap(keras.Model.fit) is fitting._INSIDE
    assert fitting._cell_of(keras.Model.fit, fitting._INSIDE) is not None
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.zeros((4, 3), "float32")
    calls = []

    def make(original):
        def fit(self, *args, **kwargs):
            calls.append(fitting.given_to_fit(self, *args, **kwargs))
            return original(self, *args, **kwargs)

        return fit

    with fitting.keras_fit_replaced(make):
        model.fit(x, x[:, :1], verbose=0)
        _TAKEN_BEFORE(model, x, x[:, :1], epochs=2, verbose=0)
    model.fit(x, x[:, :1], verbose=0)
    assert [call.get("epochs") for call in calls] == [None, 2]
    assert all(call["self"] is model and call["x"] is x for call in calls)


def test_a_fit_of_the_users_own_is_told_from_kerass():
    class Own(keras.Sequential):
        def fit(self, *args, **kwargs):
            return super().fit(*args, **kwargs)

    assert fitting.overrides_fit(Own())
    assert not fitting.overrides_fit(keras.Sequential())
    model = Own()
    fitting.without_own_fit(model)
    assert not fitting.overrides_fit(model)
