"""Warnings stand at the user's own line, however deep in autobatch or in Keras they are made."""

from __future__ import annotations

import inspect
import linecache
import warnings

import keras
import pytest
from models import SAMPLES, arrays, classifier

import autobatch
from autobatch.errors import warn


@pytest.fixture
def caught():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def lines_of(caught):
    """The source lines that autobatch's warnings stand at, all of them of this file."""
    own = [each for each in caught if each.category is autobatch.AutobatchWarning]
    assert own
    assert {each.filename for each in own} == {__file__}
    return [linecache.getline(each.filename, each.lineno).strip() for each in own]


def dropping_out(**options):
    return classifier(extra=[keras.layers.Dropout(0.5)], **options)


def test_of_a_fit(caught):
    model = dropping_out()
    autobatch.fit(model, *arrays(), target_batch=SAMPLES, micro_batch=12, verbose=0)
    assert all(line.startswith("autobatch.fit(") for line in lines_of(caught))


def test_of_a_tune_on_fewer_samples_than_the_target(caught):
    model = classifier()
    autobatch.tune(model, *arrays(), target_batch=10 * SAMPLES, cache=False)
    assert all(line.startswith("autobatch.tune(") for line in lines_of(caught))


def test_of_a_loop_of_ones_own(caught):
    model = dropping_out()
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_step(batch):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of(batch[1], model(batch[0], training=True))
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=model.optimizer, target_batch=SAMPLES, micro_batch=12)
    step(arrays())
    assert lines_of(caught) == ["step(arrays())"]


def test_repeated_at_one_line_it_is_shown_once():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("again")
        warn("again")
    assert [str(each.message) for each in found] == ["again", "again"]
    assert found[0].lineno + 1 == found[1].lineno == inspect.currentframe().f_lineno - 2
