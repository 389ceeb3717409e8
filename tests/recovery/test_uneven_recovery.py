"""Running out of memory in streams, which are cut smaller in proportion, and in elements that cannot be cut."""

import keras
import pytest
import tensorflow as tf
from models import AtCall, run_out_if
from uneven import Elements, Stepping, U, X, gallery, labelled, made, mean_teacher, off, unlabelled, zipped

import autobatch


def test_recovery_halves_streams_in_proportion_and_counts_the_first():
    data = lambda: zipped((labelled(size=16), unlabelled(size=24)))  # noqa: E731
    plain, model = made(mean_teacher), made(mean_teacher, AtCall(2))
    start = plain.get_weights()
    plain.fit(data(), verbose=0)
    history = autobatch.fit(model, data(), target_batch=16, micro_batch=8, verbose=0)
    assert off(model, plain, start) < 2e-6
    assert [(each.micro_batch_before, each.micro_batch_after) for each in history.recoveries] == [(8, 6)]


def test_recovery_in_validation_counts_what_the_validation_batch_has():
    """Even batches count their own samples, though sizes of training are multiples of two."""

    class Validated(Stepping):
        def test_step(self, data):
            loss = tf.reduce_mean(self.net(data[0]) ** 2) * (1.0 + run_out_if(self.asked_in_test))
            return {"loss": loss}

    keras.utils.set_random_seed(1)
    model = Validated(mean_teacher)
    model.asked_in_test = AtCall(0)
    model.compile(keras.optimizers.SGD(0.1))
    streams = zipped((labelled(size=16), unlabelled(size=24)))
    history = autobatch.fit(model, streams, target_batch=16, micro_batch=8, validation_data=labelled(), verbose=0)
    assert [(each.micro_batch_before, each.micro_batch_after) for each in history.recoveries] == [(4, 3)]


def test_a_whole_element_that_does_not_fit_ends_training_in_words():
    elements = Elements([(X[i : i + 1], U[i : i + 50]) for i in range(4)])
    model = made(gallery, AtCall(2))
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even one element, which cannot be cut, fits"):
        autobatch.fit(model, elements, target_batch=4, micro_batch=1, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations.numpy()) == 2
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even a micro-batch of 1 fits|Not even one element"):
        autobatch.tune(made(gallery, lambda: True), elements, target_batch=4, cache=False)


def test_an_element_apart_gets_the_memory_of_the_accumulators_before_it_is_given_up():
    """The last element fails once beside them, and the training ends as in plain Keras."""
    data = lambda: zipped((labelled(samples=60, drop=False), unlabelled()))  # noqa: E731
    plain, model = made(mean_teacher), made(mean_teacher, AtCall(21))  # 7 updates of 3 micro-batches before it
    start = plain.get_weights()
    plain.fit(data(), verbose=0)
    history = autobatch.fit(model, data(), target_batch=8, micro_batch=3, verbose=0)
    assert off(model, plain, start) < 2e-6
    assert history.recoveries == ()
