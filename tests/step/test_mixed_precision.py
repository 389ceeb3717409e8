"""Sixteen-bit layers: what differs from `Model.fit` is how sixteen bits round, and ours round no worse."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
from models import SAMPLES, arrays, classifier, recorded_gradients, relative_error

import autobatch

RATE = 0.01
PRECISION = {"mixed_float16": 2.0**-10, "mixed_bfloat16": 2.0**-7}


@contextlib.contextmanager
def policy(name):
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def one_update(fit, name):
    """The first update's gradients, and the steps of Adam in units of the learning rate."""
    with policy(name):
        model = classifier(keras.optimizers.Adam(RATE))
        gradients = recorded_gradients(model, updates=1)
        before = model.get_weights()
        fit(model)
    steps = [(after - weight) / RATE for after, weight in zip(model.get_weights(), before, strict=True)]
    return [gradient.ravel() for gradient in gradients()], [step.ravel() for step in steps]


@pytest.mark.parametrize("name", sorted(PRECISION))
def test_adam_differs_where_gradients_are_rounding_errors(name):
    x, y = arrays()

    def plain(model):
        model.fit(x, y, batch_size=SAMPLES, verbose=0, shuffle=False)

    def ours(model):
        autobatch.fit(model, x, y, target_batch=SAMPLES, micro_batch=11, verbose=0, shuffle=False)

    exact, _ = one_update(plain, "float32")
    theirs, their_steps = one_update(plain, name)
    found, steps = one_update(ours, name)

    def error(gradients):
        return np.linalg.norm(np.concatenate(gradients) - np.concatenate(exact))

    assert error(found) <= 1.1 * error(theirs)
    # Adam's first step is the gradient's sign, whatever its size: it differs where rounding decides on the sign.
    for step, their_step, gradient in zip(steps, their_steps, exact, strict=True):
        differs = np.abs(step - their_step) > 0.05
        assert np.all(np.abs(gradient[differs]) <= 4 * PRECISION[name] * np.max(np.abs(gradient)))


def test_a_loss_scale_that_grows():
    x, y = arrays(samples=120)

    def build():
        with policy("mixed_float16"):
            inner = keras.optimizers.Adam(1e-3, epsilon=1e-3)
            return classifier(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10, dynamic_growth_steps=2))

    plain, ours = build(), build()
    common = {"epochs": 2, "shuffle": False, "verbose": 0}
    expected = plain.fit(x, y, batch_size=40, **common)
    actual = autobatch.fit(ours, x, y, target_batch=40, micro_batch=14, **common)
    for optimizer in (plain.optimizer, ours.optimizer):
        assert int(optimizer.iterations.numpy()) == int(optimizer.inner_optimizer.iterations.numpy()) == 6
        assert float(optimizer.dynamic_scale.numpy()) == 2.0**13  # three times doubled
    assert relative_error(ours.get_weights(), plain.get_weights()) < 2e-3
    np.testing.assert_allclose(actual.history["loss"], expected.history["loss"], rtol=2e-3)
