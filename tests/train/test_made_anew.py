"""Callbacks that have Keras's functions made anew, or compile, in the middle of a training."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from keras import layers
from models import AtCall, MemoryHog, arrays, relative_error

import autobatch

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")


class Sizes(layers.Layer):
    """Notes the samples of each forward pass."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.hog = MemoryHog(lambda samples: self.seen.append(samples))

    def call(self, inputs):
        return self.hog(inputs)


def made(optimizer=None, extra=()):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((16,)), layers.Dense(12, activation="relu"), *extra, layers.Dense(10)])
    model.layers[0].trainable = False
    model.compile(
        optimizer or keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class AtEpoch(keras.callbacks.Callback):
    def __init__(self, epoch, do):
        super().__init__()
        self.epoch = epoch
        self.do = do

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.do(self.model)


def remake(model):
    model.make_train_function(force=True)


def unfreeze_before_the_optimizer_is_built(model):
    model.layers[0].trainable = True
    model.optimizer = keras.optimizers.SGD(0.2)
    model.make_train_function(force=True)


def compile_with_another_loss(model):
    model.layers[0].trainable = True
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    model.make_train_function()


def compile_at_another_rate(model):
    model.compile(keras.optimizers.SGD(0.3, momentum=0.9), model.loss)
    model.make_train_function(force=True)
    model.make_test_function(force=True)


CHANGES = [remake, unfreeze_before_the_optimizer_is_built, compile_at_another_rate, compile_with_another_loss]


def prepared(change, extra=()):
    """A model for a change in the middle, its data, and the options of its training."""
    x, y = arrays()
    model = made(extra=extra)
    if change is compile_with_another_loss:
        y = np.eye(10, dtype="float32")[y]
        model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, x, y, {"epochs": 3, "shuffle": False, "verbose": 0, "validation_data": (x[:9], y[:9])}


@functools.cache
def changed_under_keras(change):
    plain, x, y, options = prepared(change)
    return plain, plain.fit(x, y, batch_size=16, callbacks=[AtEpoch(0, change)], **options)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("micro_batch", [5, 16])
def test_it_goes_on_in_micro_batches_with_what_is_trainable_now(change, micro_batch):
    sizes = Sizes()
    ours, x, y, options = prepared(change, extra=[sizes])
    plain, expected = changed_under_keras(change)
    history = autobatch.fit(
        ours, x, y, target_batch=16, micro_batch=micro_batch, callbacks=[AtEpoch(0, change)], **options
    )
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    assert history.history.keys() == expected.history.keys()
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-4)
    assert max(size for size in sizes.seen if size) == micro_batch
    assert ours.train_function.__module__.startswith("keras.")  # as after Keras's own fit
    assert int(ours.optimizer.iterations) == int(plain.optimizer.iterations)


def test_compiling_alone_goes_on_as_well():
    model = made()
    again = AtEpoch(0, lambda model: model.compile(keras.optimizers.SGD(0.2), model.loss))
    history = autobatch.fit(model, *arrays(), target_batch=16, micro_batch=5, epochs=2, callbacks=[again], verbose=0)
    assert int(model.optimizer.iterations) == 3
    assert len(history.history["loss"]) == 2


def test_it_still_recovers_afterwards():
    too_many = AtCall(12, 13)
    x, y = arrays()
    plain, ours = made(), made(extra=[MemoryHog(too_many)])
    options = {"epochs": 3, "shuffle": False, "verbose": 0}
    plain.fit(x, y, batch_size=16, callbacks=[AtEpoch(0, remake)], **options)
    history = autobatch.fit(ours, x, y, target_batch=16, micro_batch=8, callbacks=[AtEpoch(0, remake)], **options)
    assert history.recoveries
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def test_a_callback_that_trains_by_itself_uses_the_function_made_anew():
    class Both(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.train_on_batch(*arrays(seed=4, samples=8))
            self.model.compile(keras.optimizers.SGD(0.05), self.model.loss)
            self.model.make_train_function()
            self.model.train_on_batch(*arrays(seed=5, samples=8))

    plain, ours = made(), made()
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    plain.fit(*arrays(), batch_size=16, callbacks=[Both()], **options)
    autobatch.fit(ours, *arrays(), target_batch=16, micro_batch=5, callbacks=[Both()], **options)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
