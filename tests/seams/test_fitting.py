"""Keras's ``fit`` is where this project looks for it, and is replaced for every reference to it."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_version import KERAS

from autobatch.seams import data_adapters, fitting
from autobatch.seams.versions import adapters_admitted

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


def test_the_steps_of_an_epoch_are_given_by_another():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    adapter = data_adapters.data_adapter_for(x=np.ones((12, 2)), y=np.ones((12, 1)), batch_size=2)
    seen, counted = [], []

    class Steps(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append("epoch")

        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)

    def behind_two(epoch, steps):
        fitting.know_length(epoch, 6)
        for step, (begin, end, iterator) in enumerate(steps):
            if step == 0:
                fitting.count_earlier_steps(epoch, 0)
            if step >= 2:
                yield begin, end, iterator
                counted.append((end, fitting.steps_in_pass(epoch)))

    with adapters_admitted(), fitting.epochs_enumerated(adapter, behind_two):
        model.fit(adapter, epochs=2, callbacks=[Steps()], verbose=0, validation_data=(np.ones((2, 2)), np.ones((2, 1))))
    assert seen == ["epoch", 2, 3, 4, 5] * 2
    assert counted == [(step, (step + 1, 6)) for step in (2, 3, 4, 5)] * 2
    with adapters_admitted():
        model.fit(adapter, callbacks=[Steps()], verbose=0)
    assert seen[-7:] == ["epoch", 0, 1, 2, 3, 4, 5]


def test_an_epoch_without_steps_ends_with_the_logs_that_are_given():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    adapter = data_adapters.data_adapter_for(x=np.ones((4, 2)), y=np.ones((4, 1)), batch_size=2)
    given = [{"mine": 3.0}]
    with (
        adapters_admitted(),
        fitting.epochs_enumerated(adapter, lambda epoch, steps: iter(())),
        fitting.epoch_logs_of(model, lambda: given.pop() if given else None),
    ):
        history = model.fit(adapter, epochs=1, verbose=0)
    assert history.history == {"mine": [3.0]}
    assert "_get_metrics_result_or_logs" not in vars(model)


def test_the_end_of_an_epoch_is_told_behind_a_step_at_which_training_is_stopped():
    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            told.append(batch)
            self.model.stop_training = batch == 1

    model, told = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), []
    model.compile("sgd", "mse")
    with fitting.epoch_logs_of(model, lambda: None, lambda: told.append("end")):
        model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, epochs=2, callbacks=[Stops()], verbose=0)
    assert told == [0, 1, "end"]


@pytest.mark.skipif(KERAS < (3, 7), reason="Keras 3.6 gives its passes no place to count at: see docs/versions.md")
def test_passes_over_validation_data_are_counted_and_made_up_for():
    def fit(epochs, made=(0, 0)):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        x = np.arange(6, dtype="float32")[:, None]
        given = tf.data.Dataset.from_tensor_slices((x, x**2)).shuffle(6, seed=1).shuffle(2, seed=2).batch(2)
        passes = fitting.ValidationPasses(model, made)
        with passes.counted():
            history = model.fit(x, x, epochs=epochs, validation_data=given, validation_steps=1, verbose=0)
        model.evaluate(given, verbose=0)
        return passes.made, history.history["val_loss"]

    made, losses = fit(3)
    assert made == (3, 3)
    assert len(set(losses)) > 1
    assert fit(1, made=(2, 2)) == ((3, 3), losses[2:])
