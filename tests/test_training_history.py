"""What ``fit`` returns: a History that copies and pickles as Keras's own does, and what autobatch adds to it."""

from __future__ import annotations

import copy
import pickle
import typing

import keras
import numpy as np
import pytest
from models import arrays, classifier

import autobatch

OPTIONS = {"target_batch": 16, "micro_batch": 4, "epochs": 2, "verbose": 0}


@pytest.fixture(scope="module")
def history():
    return autobatch.fit(classifier(), *arrays(), **OPTIONS)


def test_it_is_both(history):
    assert isinstance(history, autobatch.TrainingHistory)
    assert isinstance(history, keras.callbacks.History)
    assert history.model.history is history


def test_every_attribute_is_declared_and_is_what_it_is_declared_as(history):
    declared = typing.get_type_hints(autobatch.TrainingHistory)
    assert {"plan", "report", "recoveries"} <= set(declared)
    for name, kind in declared.items():
        assert isinstance(getattr(history, name), typing.get_origin(kind) or kind), name
    assert history.plan == autobatch.Plan(4, 4, 16)
    assert history.report.plan == history.plan
    assert history.recoveries == ()


def test_it_says_what_it_is(history):
    assert repr(history) == "<TrainingHistory micro-batch 4 x 4 for 16, 2 epochs, 0 recovered>"
    assert "TrainingHistory object" in repr(autobatch.TrainingHistory())


def test_it_has_what_kerass_own_has(history):
    plain = classifier().fit(*arrays(), epochs=2, batch_size=16, verbose=0)
    assert set(vars(history)) - set(vars(plain)) == {"plan", "report", "recoveries"}
    assert set(vars(plain)) <= set(vars(history))
    assert history.epoch == plain.epoch == [0, 1]
    assert history.history.keys() == plain.history.keys()
    assert history.params == plain.params | {"steps": history.params["steps"]}


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda this: pickle.loads(pickle.dumps(this))])
def test_it_copies_and_pickles(history, again):
    other = again(history)
    assert type(other) is autobatch.TrainingHistory
    for name in ("history", "epoch", "params", "plan", "report", "recoveries"):
        assert getattr(other, name) == getattr(history, name)
    for left, right in zip(other.model.get_weights(), history.model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


class Own(keras.callbacks.History):
    """A History that counts what it sees."""

    batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1


@pytest.mark.parametrize("kind", [keras.callbacks.History, Own])
def test_a_history_of_the_users_own_keeps_recording(kind):
    own = kind()
    returned = autobatch.fit(classifier(), *arrays(), callbacks=[own], **OPTIONS)
    assert isinstance(returned, autobatch.TrainingHistory)
    assert type(own) is kind
    assert own.history is returned.history
    assert len(own.history["loss"]) == 2
    assert getattr(own, "batches", 6) == 6


@pytest.mark.parametrize("returned", [None, {"loss": [0.5]}])
def test_a_fit_of_the_users_own_may_return_something_else(returned):
    class Own(keras.Sequential):
        def fit(self, *arguments, **options):
            super().fit(*arguments, **options)
            return returned

    model = Own([keras.Input((16,)), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = autobatch.fit(model, *arrays(), **OPTIONS)
    assert history.plan.micro_batch == 4
    assert len(history.history["loss"]) == 2
    assert history.epoch == [0, 1]
    assert model.history is history


@pytest.mark.parametrize("function", [autobatch.fit, autobatch.tune, autobatch.wrap_step, autobatch.render])
def test_annotations_can_be_looked_up_while_it_runs(function):
    hints = typing.get_type_hints(function)
    assert hints.get("model", keras.Model) is keras.Model
    assert isinstance(hints["return"], type)


def test_fit_is_annotated_with_what_it_returns():
    assert typing.get_type_hints(autobatch.fit)["return"] is autobatch.TrainingHistory
