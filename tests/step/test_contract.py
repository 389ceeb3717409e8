"""What a :class:`autobatch.step.compiled_step.CompiledStep` promises, on one device and on replicas.

Each test runs on both kinds. The replicas are those of a ``MirroredStrategy`` on two CPU devices, in a process of their
own, for TensorFlow's devices are settled once. Every test is one function that prints nothing and raises if it fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

sys.path.insert(0, str(Path(__file__).parents[1]))

from put_back import putting_back

SAMPLES, MICRO = 24, 5
SPEC = (tf.TensorSpec((None, 6), tf.float32), tf.TensorSpec((None,), tf.int64))


@dataclasses.dataclass
class Noted:
    accumulators_before: list
    traced: list = dataclasses.field(default_factory=list)
    optimizers: list = dataclasses.field(default_factory=list)


class Kind:
    """How a kind of step is made."""

    def __init__(self, *, replicas):
        self.strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) if replicas else None
        self._traced = {}

    def model(self, **options):
        keras.utils.set_random_seed(3)
        with contextlib.nullcontext() if self.strategy is None else self.strategy.scope():
            inputs = keras.Input((6,))
            hidden = layers.BatchNormalization(name="norm")(layers.Dense(8, activation="relu")(inputs))
            model = keras.Model(inputs, layers.Dense(3)(hidden))
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, metrics=["accuracy"], **options)
        return model

    def step(self, model):
        from autobatch.replicas.step import ReplicatedStep
        from autobatch.seams import models
        from autobatch.step.accumulated_step import AccumulatedStep

        step = AccumulatedStep(model, SPEC) if self.strategy is None else ReplicatedStep(model, SPEC)
        models.build_on(model, step.structure.pack(step.structure.specs))
        return step

    def traced(self, *, frozen=False):
        """A step, and what gives its model back the values of the beginning: one for all that need no new trace.

        What it told while it was traced, and what it had before, is noted beside it.
        """
        if frozen not in self._traced:
            model = self.model()
            model.get_layer("norm").trainable = not frozen
            step = self.step(model)
            with contextlib.nullcontext() if self.strategy is None else self.strategy.scope():
                self._traced[frozen] = step, putting_back(model)
            step.noted = Noted(list(step.accumulators))
            step.on_traced = lambda: step.noted.traced.append(step.traced)
            step.on_optimizer_found = lambda: step.noted.optimizers.append(step.optimizers)
            step.prepare()
        step, put_back = self._traced[frozen]
        put_back()
        return step, put_back


def batch(samples=SAMPLES, seed=0):
    random = np.random.default_rng(seed)
    return tf.constant(random.normal(size=(samples, 6)), tf.float32), tf.constant(random.integers(0, 3, samples))


def weights(model):
    return [variable.numpy() for variable in model.trainable_variables]


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def prepare_tells_what_was_missing_and_runs_nothing(kind):
    model = kind.model()
    step, before = kind.step(model), weights(model)
    assert step.prepare() is True
    assert step.prepare() is False
    assert step.prepare_evaluation() is True
    assert step.prepare_evaluation() is False
    assert step.prepare() is False
    close(weights(model), before)


def accumulating_changes_no_weight_and_applying_does(kind):
    step, _ = kind.traced()
    model, before = step.model, weights(step.model)
    step.accumulate(batch(), MICRO)
    assert all((one == other).all() for one, other in zip(weights(model), before, strict=True))
    assert not step.update_has_begun()
    step.apply()
    assert step.update_has_begun()
    assert any((one != other).any() for one, other in zip(weights(model), before, strict=True))


def the_update_does_not_depend_on_the_micro_batch(kind):
    found = []
    step, put_back = kind.traced(frozen=True)
    for micro_batch in (MICRO, 7, SAMPLES):
        put_back()
        for seed in range(2):
            step.accumulate(batch(seed=seed), micro_batch)
            logs = step.apply()
        found.append([*weights(step.model), float(logs["loss"]), float(logs["accuracy"])])
    close(found[1], found[0])
    close(found[2], found[0])


def each_update_begins_at_zero(kind):
    step, put_back = kind.traced()
    step.accumulate(batch(), MICRO)
    step.apply()
    once = weights(step.model)
    put_back()
    step.accumulate(batch(seed=9), MICRO)  # and thrown away
    put_back()
    step.accumulate(batch(), MICRO)
    step.apply()
    close(weights(step.model), once)


def logs_are_those_of_the_whole_update(kind):
    step, _ = kind.traced(frozen=True)
    model = step.model
    x, y = batch()
    predicted = model(x, training=True)
    step.accumulate((x, y), MICRO)
    logs = step.apply()
    np.testing.assert_allclose(float(logs["loss"]), float(model.loss(y, predicted)), rtol=1e-5)
    assert float(logs["accuracy"]) == pytest.approx(np.mean(np.argmax(predicted, -1) == y.numpy()), abs=1e-6)


def an_evaluation_changes_no_weight_and_has_the_logs_of_the_whole_batch(kind):
    model = kind.model()
    x, y = batch()
    step, before = kind.step(model), weights(model)
    step.evaluate((x, y), MICRO)
    logs = step.evaluation_logs()
    predicted = model(x, training=False)
    np.testing.assert_allclose(float(logs["loss"]), float(model.loss(y, predicted)), rtol=1e-5)
    close(weights(model), before)
    assert not step.accumulators


def one_step_trains_and_evaluates_in_turn(kind):
    step, _ = kind.traced()
    model = step.model
    losses = []
    for _ in range(3):
        step.accumulate(batch(), MICRO)
        losses.append(float(step.apply()["loss"]))
        step.evaluate(batch(seed=1), MICRO)
        losses.append(float(step.evaluation_logs()["loss"]))
        model.reset_metrics()
    assert losses[4] < losses[0]
    assert all(np.isfinite(losses))


def accumulators_are_no_state_of_the_models(kind):
    step, _ = kind.traced()
    model = step.model
    assert step.least_accumulator_bytes == sum(w.nbytes for w in weights(model))
    assert not step.noted.accumulators_before
    step.prepare()
    own = {id(variable) for variable in step.accumulators}
    assert len(own) == len(model.trainable_variables) * (1 if kind.strategy is None else 2)
    for variables in (step.variables, step.updated_variables, step.changed_before_update):
        assert not own & {id(variable) for variable in variables}
    assert not own & {id(variable) for variable in step.variables_written_by_micro_steps}


def what_changes_before_the_update_and_in_it_is_all_that_changes(kind):
    step, _ = kind.traced()
    step.prepare()
    values = {id(variable): variable.numpy() for variable in step.variables}
    step.accumulate(batch(), MICRO)
    step.apply()
    changed = {id(v) for v in step.variables if (v.numpy() != values[id(v)]).any()}
    allowed = {id(v) for v in (*step.changed_before_update, *step.updated_variables)}
    assert changed
    assert changed <= allowed
    assert {id(v) for v in step.updated_variables} & changed


def released_it_holds_nothing_and_goes_on(kind):
    step, put_back = kind.traced()
    step.accumulate(batch(), MICRO)
    step.apply()
    step.accumulate(batch(seed=1), MICRO)
    step.apply()
    reference = weights(step.model)
    put_back()
    step.accumulate(batch(), MICRO)
    step.apply()
    sums = step.accumulators
    step.release_accumulators()
    assert not step.accumulators
    assert all(int(tf.size(accumulator)) == 0 for accumulator in sums)
    step.accumulate(batch(seed=1), MICRO)
    step.apply()
    close(weights(step.model), reference)


def a_step_for_other_data_is_of_the_same_kind_and_model(kind):
    step, _ = kind.traced()
    model = step.model
    other = step.for_data((tf.TensorSpec((None, 6), tf.float32), tf.TensorSpec((None, 1), tf.int64)))
    assert type(other) is type(step)
    assert other.model is model
    x, y = batch()
    other.evaluate((x, y[:, None]), MICRO)
    step.evaluate((x, y), MICRO)
    assert np.isfinite(float(other.evaluation_logs()["loss"]))


def an_optimizer_that_was_not_known_is_told(kind):
    step, _ = kind.traced()
    step.prepare()
    assert not step.noted.optimizers  # model.optimizer is known
    assert step.updating_optimizers == (step.model.optimizer,)


def findings_are_told_and_outlive_the_accumulators(kind):
    step, _ = kind.traced()
    step.prepare()
    assert step.noted.traced
    assert step.traced is step.noted.traced[-1]
    found = step.traced
    step.release_accumulators()
    assert step.traced is found


PROMISES = [
    prepare_tells_what_was_missing_and_runs_nothing,
    accumulating_changes_no_weight_and_applying_does,
    the_update_does_not_depend_on_the_micro_batch,
    each_update_begins_at_zero,
    logs_are_those_of_the_whole_update,
    an_evaluation_changes_no_weight_and_has_the_logs_of_the_whole_batch,
    one_step_trains_and_evaluates_in_turn,
    accumulators_are_no_state_of_the_models,
    what_changes_before_the_update_and_in_it_is_all_that_changes,
    released_it_holds_nothing_and_goes_on,
    a_step_for_other_data_is_of_the_same_kind_and_model,
    an_optimizer_that_was_not_known_is_told,
    findings_are_told_and_outlive_the_accumulators,
]


@pytest.fixture(scope="module")
def one_device():
    return Kind(replicas=False)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_on_one_device(promise, one_device):
    promise(one_device)


@pytest.fixture(scope="module")
def on_replicas():
    """What came of each promise on two replicas: nothing, or the traceback."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    lines = [line.partition(": ") for line in done.stdout.splitlines() if line.startswith("promise ")]
    assert done.returncode == 0, done.stderr[-4000:]
    return {name.removeprefix("promise "): told for name, _, told in lines}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_on_replicas(promise, on_replicas):
    assert on_replicas[promise.__name__] == "kept"


def main():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    kind = Kind(replicas=True)
    for promise in PROMISES:
        try:
            promise(kind)
        except Exception as error:  # noqa: BLE001 - the test that asks for it shows it
            print(f"promise {promise.__name__}: {error!r}".replace("\n", " "), flush=True)
        else:
            print(f"promise {promise.__name__}: kept", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
