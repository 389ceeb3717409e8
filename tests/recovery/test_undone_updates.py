"""Out of memory behind the first of a step's updates: that update is undone as well, bit for bit."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import AtCall, CompiledHog, MemoryHog
from put_back import Asked, never, putting_back
from same_bits import assert_same_bits
from updating_models import SAMPLES, InTurn, noise

import autobatch
from autobatch.recovery.keeper import PROVEN_UPDATES, SnapshotPlace
from autobatch.recovery.transaction import Transaction
from autobatch.step.accumulated_step import AccumulatedStep

UPDATES = 3
MICRO = 12
REAL, LATENT = noise(samples=UPDATES * SAMPLES)


def hog(too_many):
    if too_many is never:
        return lambda inputs: inputs
    return MemoryHog(too_many) if callable(too_many) else CompiledHog(too_many)


class Adversaries(InTurn):
    """Draws, moves statistics, and may run out of memory when the generator's part judges fakes."""

    def __init__(self, too_many=never, in_first=never):
        super().__init__(layers.BatchNormalization(), layers.Dropout(0.3, seed=3))
        self.hog, self.first = map(hog, (too_many, in_first))

    def train_step(self, data):
        real, latent = data
        with tf.GradientTape() as tape:
            fake = self.first(self.generator(latent[:, 0]))
            loss = tf.reduce_mean(self.critic(fake, training=True) - self.critic(real, training=True))
        self.update_critic(tape, loss)
        self.critic_loss.update_state(loss)
        with tf.GradientTape() as tape:
            of_generator = -tf.reduce_mean(self.hog(self.critic(self.generator(latent[:, 1]), training=True)))
        self.update_generator(tape, of_generator)
        return {"critic_loss": self.critic_loss.result(), "generator": of_generator}


def adversaries(*hungry, **options):
    keras.utils.set_random_seed(1)
    model = Adversaries(*hungry)
    model.compile((keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)), **options)
    return model


def batches():
    return list(tf.data.Dataset.from_tensor_slices((REAL, LATENT)).batch(SAMPLES))


def step_of(model):
    return AccumulatedStep(model, tf.data.Dataset.from_tensors(batches()[0]).element_spec)


def state(model):
    own = [model, model.c_optimizer, model.g_optimizer, *model.metrics]
    return [(variable.name, variable.numpy()) for owner in own for variable in owner.variables]


def traced(*hungry, **options):
    """A step of a model that may run out of memory, and a function that gives the model its first values back."""
    model = adversaries(*hungry, **options)
    model.c_optimizer.build(model.critic.trainable_variables)
    model.g_optimizer.build(model.generator.trainable_variables)
    return step_of(model), putting_back(model, model.c_optimizer, model.g_optimizer)


@functools.cache
def traced_once():
    """A step that may run out of memory in its second part and in its first, each when it is asked for it."""
    asked = Asked(), Asked()
    return asked, *traced(*asked)


def running_out(in_second, in_first=never):
    """The step of a model as new, that runs out of memory as it is told."""
    asked, step, put_back = traced_once()
    put_back()
    assert step.rest()
    asked[0].now, asked[1].now = in_second, in_first
    return step


@functools.cache
def without_hogs():
    return traced()


def fed(step, put_back, sizes):
    """Train with a given micro-batch for each update, with nothing ever failing."""
    put_back()
    assert step.rest()
    for batch, micro_batch in zip(batches(), sizes, strict=True):
        step.accumulate(batch, micro_batch)
        step.apply()
    return state(step.model)


def reference(sizes):
    return fed(*without_hogs(), sizes)


def trained(step):
    transaction = Transaction(step, MICRO, device="CPU:0")
    for batch in batches():
        transaction.train(batch)
    return transaction


@pytest.mark.parametrize(("update", "micro_step"), [(0, 0), (1, 1)])
def test_in_the_second_part_the_first_parts_update_is_undone(update, micro_step):
    step = running_out(AtCall(2 * update + micro_step))
    transaction = trained(step)
    assert [(each.update, each.micro_batch_after) for each in transaction.recoveries] == [(update, MICRO)]
    assert transaction._keeper.ran_out_beside_copies, "the copies of the weights go first"
    assert_same_bits(state(step.model), reference([MICRO] * UPDATES))


def test_in_the_first_part_nothing_is_updated():
    step = running_out(never, AtCall(3))
    transaction = trained(step)
    (recovery,) = transaction.recoveries
    after = recovery.micro_batch_after
    assert (recovery.update, recovery.micro_batch_before) == (1, MICRO)
    assert after < MICRO
    assert_same_bits(state(step.model), reference([MICRO, after, after]))


def test_a_size_that_is_too_large_for_the_second_part_alone():
    step = running_out(lambda samples: samples > 5)
    transaction = trained(step)
    assert transaction.policy.micro_batch <= 5
    assert_same_bits(state(step.model), reference([transaction.policy.micro_batch] * UPDATES))


def test_under_xla_the_last_update_fails_behind_the_second_pass():
    step, put_back = traced(jit_compile=True)
    optimizer = step.model.g_optimizer
    failing = Asked()
    failing.now = AtCall(9)  # of 8 variables in an update
    own = optimizer.update_step

    def update_step(gradient, variable, learning_rate):
        size = tf.numpy_function(lambda: np.int64(1 << 44 if failing() else 1), [], tf.int64)
        own(gradient + 0.0 * tf.random.normal(tf.reshape(size, [1]))[0], variable, learning_rate)

    optimizer.__dict__["update_step"] = update_step
    transaction = trained(step)
    assert len(transaction.recoveries) == 1
    undone = state(step.model)
    put_back()
    failing.now = never
    assert not trained(step).recoveries
    assert_same_bits(undone, state(step.model))


@pytest.mark.parametrize("hungry", [(MICRO,), (never, MICRO)], ids=["second part", "first part"])
def test_under_xla_a_pass_fails_and_what_its_variables_need_is_held_no_longer_than_it(hungry):
    step, put_back = traced(*hungry, jit_compile=True)
    transaction = trained(step)
    after = transaction.recoveries[-1].micro_batch_after
    assert after < MICRO
    assert {each.update for each in transaction.recoveries} == {0}
    references = step._parted._references
    assert len(references) == 2, "one for each pass"
    pairs = [pair for each in references.values() for pair in each._values._pairs]
    assert pairs
    assert all(copy.read_value().shape == [0] for _, copy in pairs)
    assert_same_bits(state(step.model), fed(step, put_back, [after] * UPDATES))


def test_not_one_sample_fits_the_second_part():
    armed = []
    step = running_out(lambda _: bool(armed))
    transaction = Transaction(step, MICRO, device="CPU:0")
    first, second, _ = batches()
    transaction.train(first)
    before = state(step.model)
    armed.append(True)
    with pytest.raises(autobatch.NoFeasibleBatchError):
        transaction.train(second)
    assert_same_bits(state(step.model), before)


@pytest.mark.parametrize("micro_batch", [MICRO, SAMPLES])
def test_copies_are_kept_however_many_updates_have_gone_well(micro_batch):
    step = running_out(never)
    transaction = Transaction(step, micro_batch, device="CPU:0")
    for batch in batches():
        transaction.train(batch)
    assert step.computes_between_updates(whole=micro_batch == SAMPLES)
    transaction._keeper._room = False
    kept = transaction._keeper.take(whole=micro_batch == SAMPLES, proven=True)
    assert PROVEN_UPDATES >= 1
    assert kept.weights_at is SnapshotPlace.HOST


def test_a_search_runs_all_parts_beside_the_copies_that_training_keeps():
    seen = []

    def too_many(samples):
        seen.append(samples)
        return samples > 7

    model = adversaries(too_many)
    trained = [*model.variables, *model.c_optimizer.variables]
    before = [variable.numpy() for variable in trained]
    report = autobatch.tune(model, REAL, LATENT, target_batch=SAMPLES, cache=False)
    assert report.plan.micro_batch <= 7
    assert max(seen) > 7
    for variable, value in zip(trained, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
