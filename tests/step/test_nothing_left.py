"""Nothing of a model stays in memory once the model is gone: no variable, and no graph that was traced of it."""

from __future__ import annotations

import gc

import keras
import pytest
import tensorflow as tf
from models import arrays, classifier
from tensorflow.python.framework.func_graph import FuncGraph
from updating_models import InTurn, noise

import autobatch


def alive():
    """The graphs and the handles of variables that are alive."""
    gc.collect()
    found = gc.get_objects()
    graphs = sum(isinstance(one, FuncGraph) for one in found)
    return graphs, sum(isinstance(one, tf.__internal__.EagerTensor) and one.dtype == tf.resource for one in found)


def fit(**options):
    def train():
        model = classifier(keras.optimizers.Adam(0.01))
        autobatch.fit(model, *arrays(), target_batch=24, verbose=0, validation_split=0.2, **options)

    return train


def fit_after_search():
    model = classifier(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01, momentum=0.9)))
    autobatch.fit(model, *arrays(), target_batch=24, verbose=0)


def with_custom_gradients(**options):
    def train():
        swish = keras.layers.Dense(8, activation="silu")
        model = classifier(keras.optimizers.Adam(0.01), extra=(swish,), **options)
        x, y = arrays()
        autobatch.fit(model, x, y, target_batch=24, micro_batch=12, verbose=0, validation_data=(x, y))
        autobatch.fit(model, x, y, target_batch=24, micro_batch=24, verbose=0)

    return train


def tune():
    autobatch.tune(classifier(keras.optimizers.Adam(0.01)), *arrays(), target_batch=24)


def compiled():
    model = classifier(keras.optimizers.Adam(0.01), jit_compile=True)
    autobatch.fit(model, *arrays(), target_batch=24, micro_batch=12, verbose=0)


def several_updates():
    model = InTurn()
    model.compile()
    autobatch.fit(model, noise(), target_batch=12, micro_batch=4, verbose=0)


def loop_of_ones_own():
    model, optimizer = classifier(), keras.optimizers.Adam(0.01)

    def train_step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=24, micro_batch=12)
    x, y = arrays()
    step((x[:24], y[:24]))


@pytest.mark.parametrize(
    "train",
    [
        fit(micro_batch=12),
        fit(micro_batch=24),
        fit_after_search,
        with_custom_gradients(),
        with_custom_gradients(jit_compile=True),
        tune,
        compiled,
        several_updates,
        loop_of_ones_own,
    ],
    ids=[
        "accumulated",
        "whole",
        "searched",
        "custom_gradients",
        "custom_gradients_compiled",
        "tuned",
        "compiled",
        "several_updates",
        "loop_of_ones_own",
    ],
)
def test_a_model_that_was_trained(train):
    train()
    before = alive()
    train()
    assert alive() == before
