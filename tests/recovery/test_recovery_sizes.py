"""Which sizes a real training goes through when memory runs out, and that it ends as if it had been told them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from itertools import accumulate

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import AtCall, CompiledHog, MemoryHog, arrays, classifier, run_out_if
from put_back import Asked, putting_back
from same_bits import assert_same_bits, everything

import autobatch
from autobatch.records import MemoryModel
from autobatch.recovery import micro_batch_policy
from autobatch.recovery.micro_batch_policy import PATIENCE
from autobatch.recovery.transaction import Transaction
from autobatch.sizing import searched_or_given
from autobatch.step.accumulated_step import AccumulatedStep

TARGET = 32
MICRO = 16
ROOM_FOR_5 = {"memory_limit": 1599, "headroom": 0.0}
LINE = MemoryModel(fixed_bytes=1000, per_sample_bytes=100)
WAITS = 2 * PATIENCE  # what CALM makes of the patience in these tests


@pytest.fixture(autouse=True)
def soon_calm(monkeypatch):
    monkeypatch.setattr(micro_batch_policy, "CALM", 2)


class HungryAdam(keras.optimizers.Adam):
    """Runs out of memory in the middle of its update."""

    def __init__(self, asked):
        super().__init__(0.01)
        self.asked = asked

    def update_step(self, gradient, variable, learning_rate):
        if self._get_variable_index(variable) == 2:
            gradient = gradient + run_out_if(self.asked)
        super().update_step(gradient, variable, learning_rate)


class Noting:
    """``too_many`` for a MemoryHog: notes the size of each micro-batch that passes, and of each that does not."""

    def __init__(self, too_many):
        self.too_many = too_many
        self.passed = []
        self.failed = []

    def __call__(self, samples):
        fails = self.too_many(samples)
        (self.failed if fails else self.passed).append(samples)
        return fails

    def sizes(self):
        """The micro-batch of each update of TARGET samples, none of which was interrupted after its first."""
        ends = [index for index, seen in enumerate(accumulate(self.passed)) if seen % TARGET == 0]
        return [self.passed[start] for start in [0, *(end + 1 for end in ends[:-1])]]


def stateful(hog=None, optimizer=None, **options):
    extra = [layers.BatchNormalization(), layers.Dropout(0.3, seed=3), hog or MemoryHog(lambda _: False)]
    return classifier(optimizer or keras.optimizers.Adam(0.01), extra=extra, **options)


@functools.cache
def made_once(*options):
    """A model that runs out of memory when it is asked to, and a function that gives it its first values back."""
    asked = Asked()
    model = stateful(MemoryHog(asked), **dict(options))
    return asked, model, putting_back(model)


def as_new(too_many, **options):
    """A model as new: its trainings, of data alike, find the traces of those before."""
    asked, model, put_back = made_once(*options.items())
    put_back()
    asked.now = too_many
    return model


@functools.cache
def step_that_never_fails(*options):
    model = stateful(**dict(options))
    return AccumulatedStep(model, open_spec(cut(TARGET))), putting_back(model)


def replayed(data, sizes, **options):
    """Train on each effective batch with a given micro-batch, with nothing ever failing."""
    return fed(*step_that_never_fails(*options.items()), data, sizes)


def fed(step, put_back, data, sizes):
    put_back()
    for batch, micro_batch in zip(data, sizes, strict=True):
        step.accumulate(batch, micro_batch)
        step.apply()
    return everything(step.model)


def open_spec(data):
    return tf.nest.map_structure(lambda part: tf.TensorSpec([None, *part.shape[1:]], part.dtype), data[0])


def cut(samples, batch_sizes=(TARGET,)):
    x, y = (tf.constant(part) for part in arrays(samples=samples))
    sizes, start = [], 0
    while start < samples:
        sizes.append((x[start : start + batch_sizes[0]], y[start : start + batch_sizes[0]]))
        start += batch_sizes[0]
        batch_sizes = batch_sizes[1:] or batch_sizes
    return sizes


def without_metrics(values):
    """Keras sets the metrics back at each epoch, a replay has none."""
    return [(name, value) for name, value in values if name not in ("total", "count")]


def test_the_memory_model_picks_the_next_size():
    data = cut(3 * TARGET)
    model = stateful(MemoryHog(AtCall(2)))
    transaction = Transaction(
        AccumulatedStep(model, open_spec(data)), MICRO, device="CPU:0", memory_model=LINE, user_limit_bytes=1599
    )
    for batch in data:
        transaction.train(batch)
    assert [(each.micro_batch_before, each.micro_batch_after) for each in transaction.recoveries] == [(MICRO, 5)]
    assert_same_bits(everything(model), replayed(data, [MICRO, 5, 5]))


def test_the_memory_model_of_the_search_picks_the_next_size_of_a_fit(monkeypatch):
    plain = searched_or_given.unsearched

    def with_a_line(*given):
        return dataclasses.replace(plain(*given), memory_model=LINE)

    monkeypatch.setattr(searched_or_given, "unsearched", with_a_line)
    data = cut(3 * TARGET)
    model = as_new(AtCall(2))
    options = {"target_batch": TARGET, "micro_batch": MICRO, "shuffle": False, "verbose": 0, **ROOM_FOR_5}
    history = autobatch.fit(model, *arrays(samples=3 * TARGET), **options)
    assert [each.micro_batch_after for each in history.recoveries] == [5]
    assert_same_bits(everything(model), replayed(data, [MICRO, 5, 5]))


def long_fit(too_many, epochs):
    """Two updates an epoch; the sizes noted, and the model."""
    noting = Noting(too_many)
    model = as_new(noting)
    options = {"target_batch": TARGET, "micro_batch": MICRO, "shuffle": False, "verbose": 0, "epochs": epochs}
    history = autobatch.fit(model, *arrays(samples=2 * TARGET), **options)
    return noting, model, history


def test_after_one_failure_it_grows_back_to_the_ceiling():
    noting, model, history = long_fit(AtCall(4), epochs=WAITS // 2 + 10)
    sizes = noting.sizes()
    assert sizes == [MICRO] * 2 + [11] * WAITS + [MICRO] * 18
    assert len(history.recoveries) == 1
    expected = replayed(cut(2 * TARGET) * (len(sizes) // 2), sizes)
    assert_same_bits(without_metrics(everything(model)), without_metrics(expected))


def test_after_a_restart_it_begins_below_the_plan_and_grows_back_to_it(tmp_path):
    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    options = {"target_batch": TARGET, "shuffle": False, "verbose": 0, "epochs": PATIENCE}
    runs = []
    for too_many, callbacks, given in ((AtCall(4), [Die()], {"micro_batch": MICRO}), (lambda _: False, [], {})):
        noting = Noting(too_many)
        callbacks.append(keras.callbacks.BackupAndRestore(str(tmp_path / "backup")))
        with contextlib.suppress(KeyboardInterrupt):
            history = autobatch.fit(
                stateful(MemoryHog(noting)), *arrays(samples=2 * TARGET), callbacks=callbacks, **options, **given
            )
        runs.append(noting.sizes())
    assert runs[0] == [MICRO] * 2 + [11] * 2
    assert runs[1] == [11] * PATIENCE + [MICRO] * (2 * (PATIENCE - 2) - PATIENCE)
    assert history.plan.micro_batch == MICRO
    assert history.report.trials == ()


def test_a_size_that_fails_twice_is_not_tried_again_soon():
    noting, _, history = long_fit(lambda samples: samples > 12, epochs=2 * WAITS)
    assert noting.failed == [MICRO] * 2
    assert set(noting.sizes()) == {11}
    assert [each.update for each in history.recoveries] == [0, WAITS]


def test_an_update_beside_a_larger_micro_batch_is_proven_anew():
    data = cut(TARGET)[0]
    model = stateful(MemoryHog(AtCall(0)), HungryAdam(AtCall(WAITS)))
    transaction = Transaction(AccumulatedStep(model, open_spec([data])), TARGET, device="CPU:0", effective_batch=TARGET)
    for _ in range(WAITS + 1):
        transaction.train(data)
    sizes = [(each.update, each.micro_batch_before) for each in transaction.recoveries]
    assert sizes == [(0, TARGET), (WAITS, TARGET)]


@pytest.mark.parametrize("compiled", [{"run_eagerly": True}, {"steps_per_execution": 3}])
@pytest.mark.parametrize("micro_step", [1, 4, 5])
def test_in_the_middle_of_an_epoch_and_in_its_ragged_tail(compiled, micro_step):
    # 16 + 16 samples, 16 + 16 again, and a tail of 10 + 10.
    samples = 2 * TARGET + 20
    model = as_new(AtCall(micro_step), **compiled)
    options = {"target_batch": TARGET, "micro_batch": MICRO, "shuffle": False, "verbose": 0}
    history = autobatch.fit(model, *arrays(samples=samples), **options)
    update = micro_step // 2
    (recovery,) = history.recoveries
    after = recovery.micro_batch_after
    assert (recovery.update, after < recovery.micro_batch_before) == (update, True)
    sizes = [MICRO] * update + [after] * (3 - update)
    assert_same_bits(everything(model), replayed(cut(samples), sizes, **compiled))


def test_compiled_by_xla():
    # Nothing but the whole step can be made to fail: on the CPU, TensorFlow 2.21 frees the buffer of a variable that a
    # compiled function was to write when it runs out of memory, unless something else holds the buffer as well. What
    # is kept of the variables does, of the accumulators nothing is kept.
    data = cut(8 + 28 + 28, (8, 28))
    model = stateful(CompiledHog(28), jit_compile=True)
    put_back, step = putting_back(model), AccumulatedStep(model, open_spec(data))
    transaction = Transaction(step, 28, device="CPU:0", effective_batch=28)
    for batch in data:
        transaction.train(batch)
    assert [(each.update, each.micro_batch_before) for each in transaction.recoveries] == [(1, 28)]
    after = transaction.recoveries[0].micro_batch_after
    recovered = everything(model)
    put_back()
    step.plain(data[0])
    for batch in data[1:]:
        step.accumulate(batch, after)
        step.apply()
    assert_same_bits(recovered, everything(model))


def test_compiled_by_xla_the_next_size_cuts_the_batch_into_equal_parts(caplog):
    data = cut(3 * 40, (40,))
    model = stateful(CompiledHog(20), jit_compile=True)
    put_back, step = putting_back(model), AccumulatedStep(model, open_spec(data))
    transaction = Transaction(step, 20, device="CPU:0", effective_batch=40)
    with caplog.at_level(logging.INFO, logger="autobatch.step.compilations"):
        for batch in data:
            transaction.train(batch)
    # Three quarters of 20 are 15: 14, 13 and 13 would be two sizes to compile.
    assert [(each.micro_batch_before, each.micro_batch_after) for each in transaction.recoveries] == [(20, 10)]
    said = [record.getMessage() for record in caplog.records if "compiling" in record.getMessage()]
    assert said == ["compiling for 20 samples (micro-batch)", "compiling for 10 samples (micro-batch)"]
    assert_same_bits(everything(model), fed(step, put_back, data, [10, 10, 10]))


def loop_of_ones_own(hog=None, optimizer=None, micro_batch=MICRO):
    model = stateful(hog)
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    metric = keras.metrics.SparseCategoricalAccuracy()
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = loss_of(y, logits)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        metric.update_state(y, logits)
        return loss

    step = autobatch.wrap_step(
        train_step, model=model, optimizer=optimizer, target_batch=TARGET, micro_batch=micro_batch
    )

    def state():
        variables = [*model.variables, *optimizer.variables, *metric.variables]
        return [(variable.name, variable.numpy()) for variable in variables]

    return step, state


@pytest.mark.parametrize(("micro_step", "updating", "update"), [(0, None, 0), (1, None, 0), (3, None, 1), (None, 1, 1)])
def test_a_loop_of_ones_own(micro_step, updating, update):
    data = cut(3 * TARGET)
    step, state = loop_of_ones_own(MemoryHog(AtCall(micro_step)), HungryAdam(AtCall(updating)))
    losses = [float(step(batch)) for batch in data]
    assert [each.update for each in step.recoveries] == [update]
    after = step.recoveries[0].micro_batch_after
    again, expected = loop_of_ones_own(micro_batch=MICRO if update else after)
    for number, batch in enumerate(data):
        if number == update and number:
            again._transaction.policy.micro_batch = after
        assert float(again(batch)) == losses[number]
    assert_same_bits(state(), expected())


def test_a_loop_of_ones_own_in_which_nothing_fits_any_more():
    limit = {"now": 1000}
    data = cut(2 * TARGET)
    step, state = loop_of_ones_own(MemoryHog(lambda samples: samples > limit["now"]))
    step(data[0])
    committed = state()
    limit["now"] = 0
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even one sample fits"):
        step(data[1])
    assert_same_bits(state(), committed)


def test_validation_in_which_nothing_fits():
    limit, ended, committed = {"now": 1000}, [], []
    model = stateful(MemoryHog(lambda samples: samples > limit["now"]))

    class Watch(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            limit["now"] = 0
            committed.extend([np.array(value) for value in [*model.get_weights(), *model.optimizer.variables]])

        def on_train_end(self, logs=None):
            ended.append(True)

    x, y = arrays(samples=2 * TARGET)
    options = {"target_batch": TARGET, "micro_batch": MICRO, "shuffle": False, "verbose": 0, "callbacks": [Watch()]}
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even one sample fits"):
        autobatch.fit(model, x, y, validation_data=(x[:8], y[:8]), **options)
    assert ended == [True]
    assert int(model.optimizer.iterations.numpy()) == 2
    for actual, expected in zip([*model.get_weights(), *model.optimizer.variables], committed, strict=True):
        np.testing.assert_array_equal(np.array(actual), expected)
