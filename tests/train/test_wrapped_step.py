"""What a wrapped step says of itself: its function, its effective batch, its micro-batch, whether it has searched."""

from __future__ import annotations

import functools

import keras
import tensorflow as tf
from models import AtCall, MemoryHog, arrays, classifier

import autobatch

TARGET = 16


def wrapped(*, fails=lambda samples: False, partial=False, **options):
    model, optimizer = classifier(extra=[MemoryHog(fails)]), keras.optimizers.SGD()
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_step(batch):
        with tf.GradientTape() as tape:
            loss = loss_of(batch[1], model(batch[0], training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    function = functools.partial(train_step) if partial else train_step
    return autobatch.wrap_step(function, model=model, optimizer=optimizer, target_batch=TARGET, **options)


def test_a_step_that_searches():
    step = wrapped()
    before = "<WrappedStep train_step target_batch=16 micro_batch='auto' (not searched yet: the first batch starts it)>"
    assert repr(step) == before
    step(arrays(samples=TARGET))
    size = step.report.plan.micro_batch
    assert repr(step) == f"<WrappedStep train_step target_batch=16 micro_batch={size} (searched)>"


def test_a_step_whose_size_was_given_and_did_not_last():
    step = wrapped(fails=AtCall(0), micro_batch=4)
    assert repr(step) == "<WrappedStep train_step target_batch=16 micro_batch=4 (given)>"
    step(arrays(samples=TARGET))
    (recovery,) = step.recoveries
    assert recovery.micro_batch_after < 4
    assert repr(step) == (
        f"<WrappedStep train_step target_batch=16 micro_batch={recovery.micro_batch_after} (given, 1 recovered)>"
    )


def test_a_function_without_a_name():
    assert repr(wrapped(partial=True)).startswith("<WrappedStep partial target_batch=16 ")
