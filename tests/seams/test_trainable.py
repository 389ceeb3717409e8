"""What is private in Keras about which weights are trained is where this project looks for it."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

from autobatch.seams import models
from autobatch.seams.trainable import TrainableState


def made():
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), norm, layers.Dropout(0.1), layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def trained(model):
    model.fit(np.zeros((4, 3), "float32"), np.zeros((4, 1), "float32"), verbose=0)


def test_a_state_is_restored_for_a_while():
    model = made()
    before = TrainableState.of_now(model)
    model.layers[0].trainable = False
    assert len(model.trainable_weights) == 4
    assert not before.agrees(TrainableState.of_now(model))
    with before.restored():
        assert len(model.trainable_weights) == 6
        assert model.layers[0].kernel.trainable
        assert before.agrees(TrainableState.of_now(model))
    assert not model.layers[0].trainable
    assert len(model.trainable_weights) == 4


def test_the_state_that_keras_has_traced_is_read_from_its_optimizer():
    model = made()
    assert TrainableState.traced_by_keras(model) is None
    model.layers[0].trainable = False
    trained(model)
    as_traced = TrainableState.of_now(model)
    model.trainable = False
    model.layers[3].trainable = True
    read = TrainableState.traced_by_keras(model)
    assert read.agrees(as_traced)
    with read.restored():
        assert [layer.trainable for layer in model.layers] == [False, True, False, True]
        assert len(model.trainable_weights) == 4


def test_a_train_function_made_anew_holds_no_trace():
    model = made()
    assert not models.is_traced(model.train_function)
    model.make_train_function()
    assert not models.is_traced(model.train_function)
    trained(model)
    assert models.is_traced(model.train_function)
    model.make_train_function(force=True)
    assert not models.is_traced(model.train_function)


def test_what_is_kept_with_a_compilation_goes_with_it():
    model = made()
    kept = models.kept_with_compilation(model, "_test", dict)
    assert models.kept_with_compilation(model, "_test", dict) is kept
    model.compile("sgd", "mse")
    assert models.kept_with_compilation(model, "_test", dict) is not kept
