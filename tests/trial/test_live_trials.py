"""A search leaves no trace, finds what really fits, and passes on what the user's own code raises."""

from __future__ import annotations

import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import AtCall, MemoryHog, arrays, classifier, run_out_if

import autobatch
from autobatch import opening
from autobatch.records import TrialRequest
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.trial import timing

MOST = 21


def stateful(too_many=lambda samples: samples > MOST):
    return classifier(
        keras.optimizers.Adam(0.01),
        extra=[layers.BatchNormalization(), layers.Dropout(0.3), MemoryHog(too_many)],
    )


def bits(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [variable.numpy() for variable in variables]


def assert_same(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("target_batch", [None, 64, 16])
def test_a_search_leaves_every_variable_as_it_was(target_batch):
    model = stateful()
    x, y = arrays(samples=128)
    model.optimizer.build(model.trainable_variables)
    before = bits(model)
    report = autobatch.tune(model, x, y, target_batch=target_batch)
    assert any(not trial.fits for trial in report.trials) or target_batch == 16
    assert_same(bits(model), before)
    assert model.train_function is None


def test_a_training_with_a_search_equals_one_without():
    x, y = arrays(samples=128)
    searched, chosen = stateful(), stateful()
    history = autobatch.fit(searched, x, y, target_batch=64, epochs=2, shuffle=False, verbose=0)
    assert len(history.report.trials) > 1
    micro_batch = history.plan.micro_batch
    again = autobatch.fit(chosen, x, y, target_batch=64, micro_batch=micro_batch, epochs=2, shuffle=False, verbose=0)
    assert_same(bits(searched), bits(chosen))
    assert history.history == again.history


def test_the_largest_that_fits_was_run_and_the_next_failed():
    x, y = arrays(samples=128)
    report = autobatch.tune(stateful(), x, y, exact=True)
    assert report.largest_fit == MOST
    assert report.smallest_failure == MOST + 1
    run = {trial.micro_batch: trial.outcome.value for trial in report.trials}
    assert run[MOST] == "fits"
    assert run[MOST + 1] == "out_of_memory"
    assert report.plan is None


def test_with_a_target_only_useful_sizes_are_run():
    x, y = arrays(samples=128)
    report = autobatch.tune(stateful(), x, y, target_batch=64)
    assert {trial.micro_batch for trial in report.trials} <= {-(-64 // k) for k in range(1, 65)}
    assert report.plan.effective_batch == 64
    assert report.plan.micro_batch <= MOST


def test_a_target_that_fits_takes_one_trial():
    x, y = arrays(samples=128)
    report = autobatch.tune(stateful(), x, y, target_batch=20)
    assert [trial.micro_batch for trial in report.trials] == [20]
    assert report.plan == autobatch.Plan(micro_batch=20, accumulation_steps=1, effective_batch=20)


def test_nothing_fits():
    x, y = arrays(samples=64)
    model = stateful(lambda samples: True)
    before = [weight.copy() for weight in model.get_weights()]
    with pytest.raises(autobatch.NoFeasibleBatchError, match=r"Not even a micro-batch of 1 fits on CPU:0: it needs"):
        autobatch.fit(model, x, y, target_batch=32, verbose=0)
    assert_same(model.get_weights(), before)


def test_the_users_own_exception_comes_through_unchanged():
    x, y = arrays(samples=64)

    class Broken(layers.Layer):
        def call(self, inputs):
            raise ZeroDivisionError("the user's own")

    model = keras.Sequential([Broken(), layers.Dense(10)])
    model.compile("sgd", "mse")
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        autobatch.fit(model, x, y, target_batch=32, verbose=0)


def test_ctrl_c_in_the_middle_of_a_search():
    x, y = arrays(samples=64)
    third = AtCall(2)

    def interrupt(_):
        if third():
            os.kill(os.getpid(), signal.SIGINT)
        return False

    model = stateful(interrupt)
    model.optimizer.build(model.trainable_variables)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        autobatch.fit(model, x, y, target_batch=64, verbose=0)
    assert_same(bits(model), before)
    assert model.train_function is None


def test_an_unbuilt_model_starts_from_the_weights_that_plain_fit_would_give_it():
    x, y = arrays(samples=64)

    def build():
        keras.utils.set_random_seed(4)
        model = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dropout(0.2), layers.Dense(10)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    plain, ours = build(), build()
    plain.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    autobatch.fit(ours, x, y, target_batch=32, shuffle=False, verbose=0)
    assert_same(ours.get_weights(), plain.get_weights())


def test_a_tensorflow_variable_that_keras_does_not_track_is_put_back_too():
    x, y = arrays(samples=64)
    counter = tf.Variable(0)

    class Counting(layers.Layer):
        def call(self, inputs):
            counter.assign_add(1)
            return inputs

    autobatch.tune(classifier(extra=[Counting()]), x, y, target_batch=32)
    assert int(counter.numpy()) == 0


class HungryAdam(keras.optimizers.Adam):
    """Runs out of memory in the updates for which ``asked()`` is true, half-way through."""

    def __init__(self, asked):
        super().__init__(0.01)
        self.asked = asked

    def update_step(self, gradient, variable, learning_rate):
        if self._get_variable_index(variable) == 2:
            gradient = gradient + run_out_if(self.asked)
        super().update_step(gradient, variable, learning_rate)


# A process's first accumulated steps are timed but once.
@pytest.mark.parametrize(("micro_batch", "timed_at_first"), [(16, 1), (32, 3)])
def test_whether_an_update_fits_beside_copies_of_the_weights_is_found_out_before_training_relies_on_it(
    micro_batch, timed_at_first, monkeypatch
):
    monkeypatch.setattr(timing, "ENOUGH_SECONDS", 1e9)  # however slow the machine is
    timed = 3
    asked = AtCall(timed_at_first + 1)  # once for the proof, then the timed ones, then beside the copies
    model = classifier(HungryAdam(asked))
    model.optimizer.build(model.trainable_variables)
    before = bits(model)
    trials = opening.open_trials(model, *arrays(), target_batch=32, memory_limit_bytes=None, headroom=0.0)
    try:
        assert trials.run(TrialRequest(micro_batch, timed_steps=timed)).fits
        assert trials.keeper.ran_out_beside_copies
        assert trials.run(TrialRequest(micro_batch, timed_steps=timed)).fits
        assert asked.count == timed_at_first + 1 + timed + 1  # known now, and not tried again
    finally:
        trials.close()
    assert_same(bits(model), before)


def test_a_trial_times_no_more_than_it_is_asked():
    x, y = arrays(samples=128)
    model = classifier(keras.optimizers.Adam(0.01))
    trials = opening.open_trials(model, x, y, target_batch=None, memory_limit_bytes=None, headroom=0.0)
    first, *later = (trials.run(TrialRequest(4, timed_steps=steps)) for steps in (0, 0, 1, 3))
    trials.close()
    for result in (first, *later):
        assert result.step_seconds > 0
        assert result.apply_seconds > 0
    # Nothing but the steps that show that it fits was run, so their time is the time told.
    assert later[0].step_seconds == later[0].first_step_seconds


@pytest.mark.parametrize(("enough", "runs"), [(1e9, [2, 4]), (0.0, [2, 2])], ids=["fast", "slow"])
def test_slow_steps_are_repeated_once_and_the_shorter_time_is_told(enough, runs, monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH_SECONDS", enough)
    calls = []
    original = AccumulatedStep.accumulate
    monkeypatch.setattr(AccumulatedStep, "accumulate", lambda *args: (calls.append(1), original(*args))[1])
    model = classifier(keras.optimizers.Adam(0.01))
    trials = opening.open_trials(model, *arrays(), target_batch=None, memory_limit_bytes=None, headroom=0.0)
    found = []
    for _ in range(2):
        calls.clear()
        result = trials.run(TrialRequest(4, timed_steps=3))
        found.append(len(calls))
    trials.close()
    assert found == runs  # of the first trial, whose graph is optimised meanwhile, and of the next
    if enough == 0:
        assert result.step_seconds <= result.first_step_seconds
