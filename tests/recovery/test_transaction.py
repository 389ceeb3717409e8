"""A step is a transaction: genuine out of memory anywhere in it ends as if the smaller size had been used."""

from __future__ import annotations

import functools
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import AtCall, MemoryHog, arrays, classifier, relative_error, run_out_if
from put_back import Asked, never, putting_back
from same_bits import assert_same_bits, everything

import autobatch
from autobatch.records import Limit
from autobatch.recovery.transaction import Transaction
from autobatch.seams import models
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.tensors.snapshots import InGraphSnapshot

UPDATES = 3
TARGET = 32
MICRO = 16
SMALLER = 11  # three quarters of 16 is 12; 11 needs as many accumulation steps for 32


class HungryAdam(keras.optimizers.Adam):
    """Runs out of memory in the middle of its update: after some variables have changed, before others have."""

    def __init__(self, asked, **kwargs):
        super().__init__(0.01, **kwargs)
        self.asked = asked

    def update_step(self, gradient, variable, learning_rate):
        if self._get_variable_index(variable) == 2:
            gradient = gradient + run_out_if(self.asked)
        super().update_step(gradient, variable, learning_rate)


def model_with_state(too_many=never, optimizer=None):
    """BatchNormalization, dropout and metrics: all that a step can touch beside the weights."""
    model = classifier(
        optimizer or keras.optimizers.Adam(0.01),
        extra=[layers.BatchNormalization(), layers.Dropout(0.3, seed=3), MemoryHog(too_many)],
    )
    return model


def batches():
    x, y = arrays(samples=UPDATES * TARGET)
    return list(tf.data.Dataset.from_tensor_slices((x, y)).batch(TARGET))


def step_of(model):
    return AccumulatedStep(model, tf.data.Dataset.from_tensors(batches()[0]).element_spec)


@functools.cache
def traced(where):
    """A model that may run out of memory ``where`` it is asked, its step, and a function that puts it back.

    Its step is traced once for all tests, as for the trainings of one model.
    """
    asked = Asked()
    if where == "update":
        model = model_with_state(optimizer=HungryAdam(asked))
    else:
        model = model_with_state(asked if where == "micro-batch" else never)
    return asked, step_of(model), putting_back(model)


def running_out(where, *calls):
    """A step of a model as new that will run out of memory at the given calls, counted from 0."""
    asked, step, put_back = traced(where)
    put_back()
    assert step.rest()
    asked.now = AtCall(*calls)
    return step


def reference(sizes):
    """Train with a given micro-batch for each update, with nothing ever failing: what that ends in."""
    return _reference(tuple(sizes))


@functools.cache
def _reference(sizes):
    step = running_out("nowhere")
    for batch, micro_batch in zip(batches(), sizes, strict=True):
        if micro_batch >= TARGET:
            step.plain(batch)
        else:
            step.accumulate(batch, micro_batch)
            step.apply()
    return everything(step.model)


def trained(step, micro_batch=MICRO):
    transaction = Transaction(step, micro_batch, device="CPU:0")
    for batch in batches():
        transaction.train(batch)
    return transaction


@pytest.mark.parametrize("update", range(UPDATES))
@pytest.mark.parametrize("micro_step", [0, 1])
def test_at_every_update_and_every_micro_batch(update, micro_step):
    step = running_out("micro-batch", 2 * update + micro_step)
    transaction = trained(step)
    assert [r.micro_batch_after for r in transaction.recoveries] == [SMALLER]
    assert transaction.recoveries[0].update == update
    assert_same_bits(everything(step.model), reference([MICRO] * update + [SMALLER] * (UPDATES - update)))


@pytest.mark.parametrize("micro_step", range(4))
def test_at_the_first_a_middle_and_the_last_of_four_micro_batches(micro_step):
    step = running_out("micro-batch", 4 + micro_step)
    (recovery,) = trained(step, 8).recoveries
    assert (recovery.update, recovery.micro_batch_before) == (1, 8)
    assert recovery.micro_batch_after < 8
    assert_same_bits(everything(step.model), reference([8, recovery.micro_batch_after, recovery.micro_batch_after]))


class DrawsByTheGlobalSeed(layers.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal(keras.ops.shape(inputs), stddev=0.1)


def test_keras_global_seed_is_put_back_as_well():
    def after(too_many, sizes=None):
        keras.utils.clear_session()  # the global seed with it: to set all seeds does so from Keras 3.13 on
        model = classifier(extra=[DrawsByTheGlobalSeed(), MemoryHog(too_many)])
        data = batches()
        step = AccumulatedStep(model, tf.data.Dataset.from_tensors(data[0]).element_spec)
        transaction = Transaction(step, MICRO, device="CPU:0")
        for update, batch in enumerate(data):
            if sizes is None:
                transaction.train(batch)
            else:
                step.accumulate(batch, sizes[update])
                step.apply()
        (seed,) = models.global_seed_variables()
        return [*model.get_weights(), np.asarray(seed)], transaction.recoveries

    actual, (recovery,) = after(AtCall(3))
    expected, _ = after(never, [MICRO, recovery.micro_batch_after, recovery.micro_batch_after])
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


DATA = arrays(samples=UPDATES * TARGET)
TWO_EPOCHS = {"shuffle": False, "verbose": 0, "epochs": 2}


@functools.cache
def plain_weights_and_history():
    """Keras's own, with nothing ever failing."""
    plain = classifier(keras.optimizers.Adam(0.01))
    history = plain.fit(*DATA, batch_size=TARGET, **TWO_EPOCHS)
    return plain.get_weights(), history.history


@pytest.mark.parametrize(
    ("micro_batch", "options"),
    [
        *((size, options) for size in (MICRO, TARGET) for options in ({}, {"run_eagerly": True})),
        (MICRO, {"jit_compile": True}),  # of a whole batch XLA compiles the update too, without the code that fails
    ],
    ids=str,
)
def test_in_the_middle_of_the_optimizers_update_in_fit(micro_batch, options):
    model = classifier(HungryAdam(AtCall(1)), **options)
    history = autobatch.fit(model, *DATA, target_batch=TARGET, micro_batch=micro_batch, **TWO_EPOCHS)
    weights, expected = plain_weights_and_history()
    assert [recovery.update for recovery in history.recoveries] == [1]
    assert int(model.optimizer.iterations.numpy()) == 2 * UPDATES
    assert relative_error(model.get_weights(), weights) < 1e-4  # Adam divides by small gradients
    for name, values in expected.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("update", range(UPDATES))
def test_where_the_whole_effective_batch_is_one_micro_batch(update):
    step = running_out("micro-batch", update)
    transaction = trained(step, TARGET)
    after = transaction.recoveries[0].micro_batch_after
    assert after < TARGET
    assert_same_bits(everything(step.model), reference([TARGET] * update + [after] * (UPDATES - update)))


def test_twice_in_the_same_update():
    step = running_out("micro-batch", 3, 4)
    transaction = trained(step)
    sizes = [r.micro_batch_after for r in transaction.recoveries]
    assert len(sizes) == 2
    assert sizes[0] > sizes[1]
    assert_same_bits(everything(step.model), reference([MICRO, sizes[1], sizes[1]]))


@pytest.mark.parametrize("micro_batch", [MICRO, TARGET])
@pytest.mark.parametrize("update", range(UPDATES))
def test_in_the_middle_of_the_optimizers_update(update, micro_batch):
    step = running_out("update", update)
    transaction = trained(step, micro_batch)
    after = transaction.recoveries[0].micro_batch_after
    assert_same_bits(everything(step.model), reference([micro_batch] * update + [after] * (UPDATES - update)))


def test_an_update_that_failed_beside_copies_of_the_weights_runs_again_at_the_same_size_without_them(caplog):
    step = running_out("update", 1, 2)
    with caplog.at_level(logging.WARNING, logger="autobatch"):
        transaction = trained(step)
    # Kept on the host the second failure is undone as well; then a smaller size is all that is left to try.
    sizes = [(r.micro_batch_before, r.micro_batch_after) for r in transaction.recoveries]
    assert sizes == [(MICRO, MICRO), (MICRO, SMALLER)]
    assert "micro-batch 16 as before, without a copy of the weights on the device" in caplog.records[0].getMessage()
    assert_same_bits(everything(step.model), reference([MICRO, SMALLER, SMALLER]))


@pytest.mark.parametrize("micro_batch", [MICRO, TARGET])
def test_without_room_for_copies_the_host_keeps_them_until_the_update_is_proven(micro_batch):
    data = batches() * 3
    step = running_out("update", 1, 7)
    transaction = Transaction(step, micro_batch, device="CPU:0", effective_batch=TARGET)
    transaction._keeper.ran_out_beside_copies = True
    for batch in data[:6]:
        transaction.train(batch)
    assert len(transaction.recoveries) == 1
    assert transaction.recoveries[0].micro_batch_after < micro_batch
    with pytest.raises(autobatch.UpdateInterruptedError, match="4 updates like it had gone well"):
        transaction.train(data[6])


def test_with_room_for_copies_neither_on_the_device_nor_on_the_host_nothing_is_kept(monkeypatch):
    monkeypatch.setattr("autobatch.memory.limits.all_limits", lambda device: [Limit(1024, "a small host")])
    data = batches()
    step = running_out("update", 1)
    transaction = Transaction(step, MICRO, device="CPU:0", effective_batch=TARGET)
    transaction._keeper.ran_out_beside_copies = True
    transaction.train(data[0])
    with pytest.raises(autobatch.UpdateInterruptedError, match="for want of room"):
        transaction.train(data[1])


def test_no_sample_is_lost_or_seen_twice_and_iterations_count_updates():
    seen = []
    calls = AtCall(1, 4)

    def too_many(samples):
        fails = calls()
        if not fails:
            seen.append(samples)
        return fails

    x, y = arrays(samples=100)
    model = classifier(extra=[MemoryHog(too_many)])
    history = autobatch.fit(model, x, y, target_batch=40, micro_batch=20, epochs=1, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 3
    assert len(history.recoveries) == 2
    assert history.plan == autobatch.Plan(micro_batch=20, accumulation_steps=2, effective_batch=40)


def test_fit_says_in_one_line_what_happened(caplog):
    x, y = arrays(samples=64)
    model = classifier(extra=[MemoryHog(lambda samples: samples > 12)])
    with caplog.at_level(logging.WARNING, logger="autobatch"):
        history = autobatch.fit(model, x, y, target_batch=32, micro_batch=16, verbose=0, shuffle=False)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "micro-batch 16 -> 11 (3 accumulation steps)" in lines[0]
    assert history.recoveries[0].phase == "train"


def test_validation_recovers_with_the_metrics_of_a_plain_evaluation():
    x, y = arrays(samples=64)
    limit = {"train": 1000, "now": 1000}
    model = classifier(extra=[MemoryHog(lambda samples: samples > limit["now"])])
    plain = classifier()

    class Tighter(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            limit["now"] = 10

        def on_test_end(self, logs=None):
            limit["now"] = 1000

    options = {"validation_data": (x[:50], y[:50]), "validation_batch_size": 25, "verbose": 0, "shuffle": False}
    history = autobatch.fit(model, x, y, target_batch=32, micro_batch=32, callbacks=[Tighter()], **options)
    expected = plain.fit(x, y, batch_size=32, **options)
    assert {recovery.phase for recovery in history.recoveries} == {"validation"}
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-5, err_msg=name)


def test_not_even_one_sample_fits():
    x, y = arrays(samples=96)
    ended = []
    armed = {"update": 1}

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == armed["update"]:
                limit["now"] = 0
                kept.append([np.array(w) for w in self.model.get_weights()])

        def on_train_end(self, logs=None):
            ended.append(True)

    limit, kept = {"now": 1000}, []
    model = classifier(extra=[layers.BatchNormalization(), MemoryHog(lambda samples: samples > limit["now"])])
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even one sample fits"):
        autobatch.fit(model, x, y, target_batch=32, micro_batch=8, callbacks=[Watch()], verbose=0, shuffle=False)
    assert ended == [True]
    assert int(model.optimizer.iterations.numpy()) == 2
    for actual, expected in zip(model.get_weights(), kept[0], strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert model.train_function.__module__.startswith("keras.")  # as after Keras's own fit


def test_a_bug_in_the_model_is_never_out_of_memory():
    x, y = arrays()

    def explode(_):
        raise ZeroDivisionError("a bug of the user's")

    model = classifier(extra=[MemoryHog(explode)])
    with pytest.raises(tf.errors.UnknownError, match="a bug of the user's"):
        autobatch.fit(model, x, y, target_batch=32, micro_batch=8, verbose=0)
    model = classifier(extra=[MemoryHog(explode)])
    with pytest.raises(tf.errors.UnknownError, match="a bug of the user's"):
        autobatch.fit(model, x, y, target_batch=32, verbose=0)


def test_once_proven_an_update_of_the_whole_batch_keeps_no_weights_and_says_so_if_it_is_interrupted():
    data = batches() * 3
    step = running_out("update", 7)
    transaction = Transaction(step, TARGET, device="CPU:0", effective_batch=TARGET)
    for batch in data[:7]:
        transaction.train(batch)
    with pytest.raises(autobatch.UpdateInterruptedError, match="ran out of memory half-way"):
        transaction.train(data[7])


def test_once_proven_running_out_before_the_update_is_still_rolled_back():
    data = batches() * 2
    step = running_out("micro-batch", 5)
    model = step.model
    transaction = Transaction(step, TARGET, device="CPU:0", effective_batch=TARGET)
    for batch in data[:5]:
        transaction.train(batch)
    before = model.get_weights()
    kept = everything(model)
    step_failed = transaction.policy.micro_batch
    transaction.train(data[5])
    assert transaction.recoveries[0].micro_batch_before == step_failed == TARGET
    again = running_out("nowhere")
    clean = again.model
    for variable, (_, value) in zip([*clean.variables, *clean.optimizer.variables], kept, strict=False):
        variable.assign(value)
    again.accumulate(data[5], transaction.recoveries[0].micro_batch_after)
    again.apply()
    assert any((left != right).any() for left, right in zip(model.get_weights(), before, strict=True))
    for left, right in zip(model.get_weights(), clean.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("micro_batch", [MICRO, TARGET])
def test_a_weight_that_a_layer_assigns_in_its_forward_pass_is_rolled_back_once_updates_are_proven(micro_batch):
    data = batches() * 3
    asked = AtCall(*range(6 * TARGET // micro_batch, 100))
    normalized = [layers.SpectralNormalization(layers.Dense(16)), layers.BatchNormalization(), MemoryHog(asked)]
    model = classifier(keras.optimizers.Adam(0.01), extra=normalized)
    step = AccumulatedStep(model, tf.data.Dataset.from_tensors(data[0]).element_spec)
    transaction = Transaction(step, micro_batch, device="CPU:0")
    transaction._keeper.ran_out_beside_copies = True  # no weights are kept beside an update
    for batch in data[:6]:
        transaction.train(batch)
    completed = everything(model)
    with pytest.raises(autobatch.NoFeasibleBatchError):
        transaction.train(data[6])
    assert_same_bits(everything(model), completed)


def test_copies_are_put_back_of_the_call_that_failed_and_of_no_other():
    variable = tf.Variable([1.0, 2.0])
    copies = InGraphSnapshot([variable])

    @tf.function(autograph=False, input_signature=[])
    def keep():
        copies.keep()

    def fail_half_way():
        keep()
        variable.assign_add([1.0, 1.0])
        raise MemoryError

    with copies.around_call():
        keep()
    variable.assign([3.0, 4.0])
    with pytest.raises(MemoryError), copies.around_call():
        raise MemoryError  # before the values were kept
    copies.restore()
    np.testing.assert_array_equal(variable, [3.0, 4.0])
    with pytest.raises(MemoryError), copies.around_call():
        fail_half_way()
    assert copies.are_of_failed_call
    copies.forget()  # the next call fails before it is one
    copies.restore()
    np.testing.assert_array_equal(variable, [4.0, 5.0])
    with pytest.raises(MemoryError), copies.around_call():
        fail_half_way()
    copies.restore()
    np.testing.assert_array_equal(variable, [4.0, 5.0])


def test_after_an_error_of_the_data_an_interrupted_update_is_still_noticed():
    data = batches() * 3
    step = running_out("update", 6)
    transaction = Transaction(step, TARGET, device="CPU:0", effective_batch=TARGET)
    x, y = data[0]
    with pytest.raises((TypeError, ValueError)):
        transaction.train((x[:, :3], y))
    for batch in data[:6]:
        transaction.train(batch)
    with pytest.raises(autobatch.UpdateInterruptedError):
        transaction.train(data[6])


class TwoHalves(keras.Model):
    """Two optimizers: the second one's forward pass comes after the first one's update."""

    def __init__(self, too_many=never):
        super().__init__()
        self.one, self.other, self.hog = layers.Dense(8), layers.Dense(8), MemoryHog(too_many)
        self.second = keras.optimizers.SGD(0.1)

    def train_step(self, data):
        x, _ = data
        for layer, optimizer, inputs in ((self.one, self.optimizer, x), (self.other, self.second, self.hog(x))):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(layer(inputs) - 1.0))
            gradients = tape.gradient(loss, layer.trainable_weights)
            optimizer.apply_gradients(zip(gradients, layer.trainable_weights, strict=True))
        return {"loss": loss}


def test_between_two_optimizers_updates_of_the_whole_batch_running_out_is_rolled_back_once_they_are_proven():
    data = batches() * 3

    def built(*arguments):
        keras.utils.set_random_seed(1)
        model = TwoHalves(*arguments)
        model.compile(keras.optimizers.Adam(0.01))
        return model, AccumulatedStep(model, tf.data.Dataset.from_tensors(data[0]).element_spec)

    model, step = built(AtCall(6))
    transaction = Transaction(step, TARGET, device="CPU:0", effective_batch=TARGET)
    for batch in data[:7]:
        transaction.train(batch)
    (recovery,) = transaction.recoveries
    reference, step = built()
    for batch in data[:6]:
        step.plain(batch)
    step.accumulate(data[6], recovery.micro_batch_after)
    step.apply()
    assert_same_bits(everything(model), everything(reference))
