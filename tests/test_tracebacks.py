"""Tracebacks of what goes wrong in the user's own code: from the call of fit straight to the line that fails."""

import sys
import traceback

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import MemoryHog, arrays, classifier

import autobatch
from autobatch import tracebacks

OPTIONS = {"target_batch": 16, "verbose": 0, "cache": False}


class Faulty(keras.Model):
    def __init__(self, fault):
        super().__init__()
        self.dense = keras.layers.Dense(10)  # a number for each label: nothing else may fail
        self.fault = fault

    def call(self, inputs):
        return self.dense(inputs)

    def train_step(self, data):
        self.fault(data[0])
        return super().train_step(data)


class FaultyFit(Faulty):
    def fit(self, x, **options):
        return super().fit(x, **options)


def misspelt(x):
    return undefined_name + x  # noqa: F821


def misshapen(x):
    return tf.reshape(x, (7, 9))


def asserted(x):
    tf.debugging.assert_less(tf.reduce_max(x), -1e9, message="too large")


def compiled(kind, fault):
    model = kind(fault)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def frames(error):
    return [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]


def failure(kind, fault, **options):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any class
        autobatch.fit(compiled(kind, fault), *arrays(), **OPTIONS, **options)
    return caught.value


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}], ids=["searched", "given"])
def test_the_users_line_follows_the_call_of_fit(options):
    error = failure(Faulty, misspelt, **options)
    assert type(error) is NameError
    assert frames(error) == [
        (__file__, "failure"),
        (tracebacks.__file__, "wrapper"),
        (__file__, "train_step"),
        (__file__, "misspelt"),
    ]


def test_what_a_library_does_below_the_users_line_is_shown():
    error = failure(Faulty, misshapen)
    assert frames(error)[:4] == [
        (__file__, "failure"),
        (tracebacks.__file__, "wrapper"),
        (__file__, "train_step"),
        (__file__, "misshapen"),
    ]
    assert "tensorflow" in frames(error)[-1][0]


def test_a_fit_of_the_users_own_is_shown_as_well():
    model = compiled(FaultyFit, misspelt)
    with pytest.raises(NameError) as caught:
        autobatch.fit(model, *arrays(), **OPTIONS)
    own = [name for file, name in frames(caught.value) if file == __file__]
    assert own == ["test_a_fit_of_the_users_own_is_shown_as_well", "fit", "train_step", "misspelt"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_an_operation_that_fails_in_the_graph_is_traced_to_its_line():
    error = failure(Faulty, asserted, micro_batch=4)
    assert isinstance(error, tf.errors.InvalidArgumentError)
    (note,) = error.__notes__
    assert note.startswith(f'The operation is made by your code: File "{__file__}", line ')
    assert note.endswith('in asserted: tf.debugging.assert_less(tf.reduce_max(x), -1e9, message="too large")')
    assert frames(error) == [(__file__, "failure"), (tracebacks.__file__, "wrapper")]


def test_kerass_switch_shows_every_frame():
    keras.config.disable_traceback_filtering()
    try:
        error = failure(Faulty, misspelt)
    finally:
        keras.config.enable_traceback_filtering()
    assert len(frames(error)) > 15


def test_an_error_of_autobatchs_own_stays_as_it_is():
    with pytest.raises(TypeError, match="target_batch") as caught:
        autobatch.fit(classifier(), *arrays(), target_batch="many")
    assert frames(caught.value)[-1][1] == "positive_int"


def test_a_wrapped_step_and_tune_do_the_same():
    model = classifier()

    def train_step(batch):
        return misspelt(batch[0])

    step = autobatch.wrap_step(train_step, model=model, optimizer=keras.optimizers.SGD(), target_batch=16)
    with pytest.raises(NameError) as caught:
        step(arrays(samples=16))
    assert [name for _, name in frames(caught.value)][1:] == ["wrapper", "train_step", "misspelt"]
    with pytest.raises(NameError) as caught:
        autobatch.tune(compiled(Faulty, misspelt), *arrays(), target_batch=16, cache=False)
    assert [name for _, name in frames(caught.value)][1:] == ["wrapper", "train_step", "misspelt"]


def test_what_led_to_an_error_stays_with_it():
    def caused(x):
        try:
            misspelt(x)
        except NameError as error:
            raise KeyError("mine") from error

    error = failure(Faulty, caused)
    assert type(error.__cause__) is NameError
    assert np.array_equal(error.args, ["mine"])


def test_of_an_error_whose_message_says_all_nothing_is_shown_but_the_call():
    def shown():
        hog = classifier(extra=[MemoryHog(lambda samples: True)])
        with pytest.raises(autobatch.NoFeasibleBatchError, match="micro-batch of 1") as caught:
            autobatch.tune(hog, *arrays(), target_batch=16, cache=False)
        return [filename for filename, _ in frames(caught.value)]

    assert shown() == [__file__, tracebacks.__file__]
    keras.config.disable_traceback_filtering()
    try:
        assert len(shown()) > 4
    finally:
        keras.config.enable_traceback_filtering()
