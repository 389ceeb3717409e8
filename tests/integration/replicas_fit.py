"""Run by the tests, in a process of its own, with several logical CPU devices: each case against a single device.

``python replicas_fit.py REPLICAS CASE...`` prints one JSON object: by case, what came of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

# isort: split

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from models import relative_error, run_out_if

import autobatch

SAMPLES, TARGET = 51, 20  # 20, 20 and a tail of 11, which neither 2 nor 4 replicas divide
STRATEGY = None


class OutOfMemoryOnReplica(layers.Layer):
    """Runs out of memory on one replica where ``asked()`` says so; passes its inputs on."""

    def __init__(self, replica, asked):
        super().__init__()
        self.replica, self.asked = replica, asked

    def call(self, inputs):
        context = tf.distribute.get_replica_context()
        here = tf.get_static_value(context.replica_id_in_sync_group) if context is not None else None
        return inputs + run_out_if(self.asked) if here == self.replica else inputs


class HungryAdam(keras.optimizers.Adam):
    """Runs out of memory in the middle of its update, on one replica."""

    asked = staticmethod(lambda: False)

    def update_step(self, gradient, variable, learning_rate):
        if "bias" in variable.name and "1" in variable.device[-1:]:
            gradient = gradient + run_out_if(self.asked)
        super().update_step(gradient, variable, learning_rate)


class Calls:
    """True at the given calls, from 0, of the function that it is."""

    def __init__(self, *calls):
        self.calls, self.count = set(calls), -1

    def __call__(self):
        self.count += 1
        return self.count in self.calls


def dense(*extra, optimizer=None, seed=1, **options):
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((16,)), layers.Dense(8, activation="relu", kernel_regularizer="l2"), *extra, layers.Dense(3)]
    model = keras.Sequential(stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(0.01, clipnorm=0.1), loss, metrics=["accuracy"], **options)
    return model


def masked(reduction="sum_over_batch_size"):
    """Per time step, with padding that an Embedding masks."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((7,)), layers.Embedding(11, 6, mask_zero=True), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
    return model


def arrays(samples=SAMPLES):
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, 16)).astype("float32")
    return x, random.integers(0, 3, samples), random.random(samples).astype("float32") + 0.1


def sequences():
    random = np.random.default_rng(0)
    x = random.integers(1, 11, (SAMPLES, 7))
    x[np.arange(7)[None] >= random.integers(1, 8, SAMPLES)[:, None]] = 0
    return x, random.integers(0, 3, (SAMPLES, 7)), random.random((SAMPLES, 7)).astype("float32")


def eager(model):
    """A reference, which need not be traced: plain Keras trains alike without a graph."""
    model.run_eagerly = True
    return model


def compared(build, data, *, ours=None, target=TARGET, micro_batch=3, **options):
    """Train both; return how far weights and History are from each other, and what autobatch says."""
    fit = {"shuffle": False, "verbose": 0, "epochs": 2, **options}
    plain = eager(build())
    x, y, weight = data
    expected = plain.fit(x, y, sample_weight=weight, batch_size=target, **fit)
    with STRATEGY.scope():
        replicated = (ours or build)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autobatch.AutobatchWarning)
        history = autobatch.fit(
            replicated, x, y, sample_weight=weight, target_batch=target, micro_batch=micro_batch, **fit
        )
    return {
        "weights": relative_error(replicated.get_weights(), plain.get_weights()),
        "history": _history_error(history, expected),
        "names": sorted(history.history) == sorted(expected.history),
        "iterations": [int(replicated.optimizer.iterations.numpy()), int(plain.optimizer.iterations.numpy())],
        "alike": all(
            np.array_equal(variable.value.values[0].numpy(), part.numpy())
            for variable in replicated.trainable_variables
            for part in variable.value.values
        ),
        "plan": [history.plan.micro_batch, history.plan.accumulation_steps, history.plan.replicas],
        "recoveries": [[r.update, r.phase, r.micro_batch_before, r.micro_batch_after] for r in history.recoveries],
    }


def _history_error(history, expected):
    return max(
        relative_error([np.asarray(history.history[name])], [np.asarray(values)])
        for name, values in expected.history.items()
    )


def weighted():
    x, y, weight = arrays()
    return compared(dense, (x, y, weight), validation_data=(x[:23], y[:23], weight[:23]))


def fewer_samples_than_replicas():
    x, y, _ = arrays(TARGET + 1)
    return compared(dense, (x, y, None), ours=lambda: hungry(lambda: False))


def masked_losses():
    found = {"sum_over_batch_size": compared(masked, (*sequences()[:2], None))}
    name = "mean_with_sample_weight"
    found[name] = compared(lambda: masked(name), sequences())
    return found


class MeanOverBatches(keras.metrics.Metric):
    def __init__(self):
        super().__init__(name="mean_over_batches")
        self.total = self.add_weight(shape=(), initializer="zeros", name="total")
        self.count = self.add_weight(shape=(), initializer="zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(keras.ops.max(y_pred))
        self.count.assign_add(1.0)

    def result(self):
        return self.total / self.count


def least_output(y_true, y_pred):
    return keras.ops.min(y_pred)


def metrics_of_batches():
    """A replica's share is a batch, as in Keras; nothing is learned, so that one device can go through the shares."""

    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), layers.Dense(3)])
        kinds = [MeanOverBatches(), least_output, keras.metrics.CosineSimilarity(axis=0)]
        model.compile(keras.optimizers.SGD(0.0), "mse", metrics=kinds)
        return model

    x, _, _ = arrays(40)
    fit = {"shuffle": False, "verbose": 0, "validation_data": (x[:20], x[:20, :3])}
    expected = eager(build()).fit(x, x[:, :3], batch_size=10, validation_batch_size=10, **fit).history
    with STRATEGY.scope():
        model = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", autobatch.AutobatchWarning)
        history = autobatch.fit(
            model, x, x[:, :3], target_batch=20, micro_batch=3, validation_batch_size=20, **fit
        ).history
    said = [str(warning.message) for warning in caught if warning.category is autobatch.AutobatchWarning]
    return {"expected": expected, "history": history, "said": said}


def searched():
    return compared(dense, (*arrays()[:2], None), micro_batch="auto", epochs=1)


def reduced_once():
    """How many all-reduces the first replica is traced with, and how many numbers each takes; five micro-batches."""
    sizes = []
    original = tf.distribute.ReplicaContext.all_reduce

    def all_reduce(context, reduce_op, value, options=None):
        if tf.get_static_value(context.replica_id_in_sync_group) == 0:
            sizes.append(sum(part.shape.num_elements() for part in tf.nest.flatten(value)))
        return original(context, reduce_op, value, options)

    with STRATEGY.scope():
        model = dense()
    tf.distribute.ReplicaContext.all_reduce = all_reduce
    try:
        autobatch.fit(model, *arrays()[:2], target_batch=TARGET, micro_batch=2, verbose=0)
    finally:
        tf.distribute.ReplicaContext.all_reduce = original
    return {"sizes": sizes, "weights": sum(variable.shape.num_elements() for variable in model.trainable_variables)}


def a_smaller_device_decides():
    """The last replica has room for 4 samples, the others for all."""
    last = STRATEGY.num_replicas_in_sync - 1

    class Small(OutOfMemoryOnReplica):
        def call(self, inputs):
            context = tf.distribute.get_replica_context()
            if context is None or tf.get_static_value(context.replica_id_in_sync_group) != self.replica:
                return inputs
            size = tf.cast(tf.where(tf.shape(inputs)[0] > 4, 1 << 44, 1), tf.int64)
            return inputs + 0.0 * tf.random.normal(tf.reshape(size, [1]))[0]

    return compared(dense, (*arrays()[:2], None), ours=lambda: dense(Small(last, None)), micro_batch="auto", epochs=1)


def a_slower_device_is_named():
    """The last replica waits in every micro-batch."""
    last = STRATEGY.num_replicas_in_sync - 1

    def wait(inputs):
        time.sleep(0.1)
        return inputs

    class Slow(OutOfMemoryOnReplica):
        def call(self, inputs):
            context = tf.distribute.get_replica_context()
            if context is None or tf.get_static_value(context.replica_id_in_sync_group) != self.replica:
                return inputs
            waited = tf.numpy_function(wait, [inputs], inputs.dtype, stateful=True)
            return inputs + 0.0 * tf.ensure_shape(waited, inputs.shape)

    with STRATEGY.scope():
        model = dense(Slow(last, None))
    report = autobatch.tune(model, *arrays()[:2], target_batch=TARGET)
    return [trial.detail for trial in report.trials if trial.fits]


@functools.cache
def _hungry():
    layer = OutOfMemoryOnReplica(1, lambda: layer.now())
    model = dense(layer)
    return layer, model, model.get_weights()


def hungry(asked):
    """A model whose second replica runs out of memory where ``asked()`` says so: one, which is traced once.

    Its weights and the optimizer's variables are as they were when it was made.
    """
    layer, model, weights = _hungry()
    layer.now = asked
    model.set_weights(weights)
    for variable in model.optimizer.variables:
        if variable is not model.optimizer._learning_rate:
            variable.assign(ops.zeros_like(variable))
    return model


def out_of_memory_on_one_replica():
    """At the first, a middle and the last micro-batch of the second update: of 10 samples a replica, 4 at a time."""
    found = {}
    per_update = -(-TARGET // STRATEGY.num_replicas_in_sync)
    steps = -(-per_update // 2)
    for name, micro_step in (("first", 0), ("middle", steps // 2), ("last", steps - 1)):
        asked = Calls(steps + micro_step)
        found[name] = compared(
            dense,
            (*arrays()[:2], None),
            ours=lambda asked=asked: hungry(asked),
            micro_batch=2,
            epochs=1,
        )
    return found


def out_of_memory_in_the_update():
    class Once(HungryAdam):
        asked = staticmethod(Calls(1))

    return compared(
        lambda: dense(optimizer=keras.optimizers.Adam(0.01)),
        (*arrays()[:2], None),
        ours=lambda: dense(optimizer=Once(0.01)),
        epochs=1,
    )


def rolled_back_bit_for_bit():
    """Out of memory for good in the second update: everything on every device is as after the first."""
    state = {"out": False}
    kept = []

    class Remember(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kept[:] = everything(self.model)
            state["out"] = True

    with STRATEGY.scope():
        extra = [layers.BatchNormalization(), layers.Dropout(0.3), OutOfMemoryOnReplica(1, lambda: state["out"])]
        model = dense(*extra)
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autobatch.AutobatchWarning)
        try:
            autobatch.fit(model, *arrays()[:2], target_batch=TARGET, micro_batch=3, callbacks=[Remember()], verbose=0)
        except autobatch.NoFeasibleBatchError as error:
            message = str(error)
    now = everything(model)
    same = [np.array_equal(before, after) for before, after in zip(kept, now, strict=True)]
    return {
        "same": all(same),
        "values": len(same),
        "message": message,
        "iterations": int(model.optimizer.iterations.numpy()),
    }


class Observing(layers.Layer):
    """Running averages of one's own: a mean, a count of updates and the largest value."""

    def build(self, shape):
        self.updates = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.center = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False)
        self.largest = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.updates.assign_add(1)
        self.center.assign(0.9 * self.center + 0.1 * ops.mean(inputs, axis=0))
        self.largest.assign(0.5 * self.largest + 0.5 * ops.max(inputs))
        return inputs


def running_averages():
    """Those of the first layers, which see what plain Keras sees."""

    def build():
        keras.utils.set_random_seed(1)
        norm = layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((16,)), Observing(), norm, layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    x, y = arrays()[:2]
    with STRATEGY.scope():
        model = build()
    plain = eager(build())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autobatch.AutobatchWarning)
        autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=3, shuffle=False, verbose=0)
    plain.fit(x, y, batch_size=TARGET, shuffle=False, verbose=0)
    ours = [[part.numpy() for part in variable.value.values] for variable in model.non_trainable_variables]
    expected = [variable.numpy() for variable in plain.non_trainable_variables]
    return {
        "names": [variable.name for variable in plain.non_trainable_variables],
        "errors": [float(np.abs(parts[0] - own).max()) for parts, own in zip(ours, expected, strict=True)],
        "alike": all(np.array_equal(parts[0], part) for parts in ours for part in parts),
    }


def everything(model):
    own = [*model.variables, *model.optimizer.variables, *(v for metric in model.metrics for v in metric.variables)]
    return [part.numpy() for variable in own for part in variable.value.values]


def other_data():
    """A tf.data.Dataset of samples, and batches by the two, with several executions to a step."""
    x, y, _ = arrays()
    with STRATEGY.scope():
        model = dense(steps_per_execution=2)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
    history = autobatch.fit(model, dataset, target_batch=TARGET, micro_batch=3, epochs=2, verbose=0)
    plain = eager(dense())
    expected = plain.fit(x, y, batch_size=TARGET, epochs=2, shuffle=False, verbose=0)
    return {
        "weights": relative_error(model.get_weights(), plain.get_weights()),
        "history": _history_error(history, expected),
    }


def a_step_of_its_own():
    """A train_step with a loss and logs of its own, and sixteen-bit layers with a LossScaleOptimizer."""

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(1)
            self.total = keras.metrics.Mean(name="total")
            self.build((None, 16))

        def build(self, shape):
            self.inner.build(shape)
            super().build(shape)

        def call(self, inputs):
            return self.inner(inputs)

        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x) - tf.cast(y, tf.float32)[:, None]))
            self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
            self.total.update_state(loss)
            return {"my_loss": loss, "loss": self.total.result()}

    def build():
        keras.utils.set_random_seed(1)
        model = Own()
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
        return model

    return compared(build, (*arrays()[:2], None))


class Halves(keras.Model):
    """Two layers, each trained by an optimizer of its own; the second optimizer is none of the model's attributes."""

    def __init__(self, second, optimizer, *, is_own):
        super().__init__()
        self.first = layers.Dense(3)
        if is_own:
            self.second = second
        self.hidden = lambda: (second, optimizer)
        self.build((None, 16))

    def build(self, shape):
        for layer in (self.first, self.hidden()[0]):
            layer.build(shape)
        super().build(shape)

    def train_step(self, data):
        x, y = data
        second, optimizer = self.hidden()
        with tf.GradientTape(persistent=True) as tape:
            losses = [self.compute_loss(y=y, y_pred=layer(x)) for layer in (self.first, second)]
        for loss, layer, updating in zip(losses, (self.first, second), (self.optimizer, optimizer), strict=True):
            updating.apply(tape.gradient(loss, layer.trainable_weights), layer.trainable_weights)
        return {"loss": losses[0]}


def halves(*, is_own=True, optimizer=None):
    keras.utils.set_random_seed(1)
    second = layers.Dense(3, name="second")
    unseen = optimizer or keras.optimizers.SGD(0.2, momentum=0.9, name="unseen")
    model = Halves(second, unseen, is_own=is_own)
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def an_optimizer_out_of_sight():
    made = []

    def build():
        made.append(halves())
        return made[-1]

    found = compared(build, (*arrays()[:2], None))
    found["unseen"] = [int(model.hidden()[1].iterations.numpy()) for model in made]
    return found


def refusals():
    x, y, _ = arrays()
    found = {}

    def tried(name, model, **options):
        try:
            autobatch.fit(model, x, y, target_batch=TARGET, verbose=0, **options)
        except ValueError as error:
            found[name] = str(error)

    optimizer = keras.optimizers.SGD(name="made_outside")
    with STRATEGY.scope():
        inside = dense()
        unseen_optimizer, unseen_weights = halves(optimizer=optimizer), halves(is_own=False)
        tried("inside", inside)
        elsewhere = dense(optimizer=optimizer)
        eager = dense(run_eagerly=True)
        synchronized = dense(layers.BatchNormalization(synchronized=True))
    tried("optimizer", elsewhere)
    tried("unseen_optimizer", unseen_optimizer, micro_batch=3)
    tried("unseen_weights", unseen_weights, micro_batch=3)
    tried("eager", eager)
    tried("synchronized", synchronized)
    try:
        autobatch.wrap_step(lambda batch: None, model=inside, optimizer=inside.optimizer, target_batch=4)(x)
    except ValueError as error:
        found["loop"] = str(error)
    return found


def trainable_and_made_anew():
    """Frozen after a first training without compile; then made anew by a callback, with its first layer frozen."""

    class Remade(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.layers[0].trainable = False
                self.model.make_train_function(force=True)

    def trained(model, fit):
        weights = [model.get_weights()]
        for change, options in ((None, {}), (False, {}), (True, {"epochs": 2, "callbacks": [Remade()]})):
            if change is not None:
                model.trainable = change
            fit(model, **options)
            weights.append(model.get_weights())
        return weights

    x, y, _ = arrays()
    plain = trained(
        dense(optimizer=keras.optimizers.SGD(0.1)),
        lambda model, **options: model.fit(x, y, batch_size=TARGET, shuffle=False, verbose=0, **options),
    )
    with STRATEGY.scope():
        model = dense(optimizer=keras.optimizers.SGD(0.1))
    ours = trained(
        model,
        lambda model, **options: autobatch.fit(
            model, x, y, target_batch=TARGET, micro_batch=3, shuffle=False, verbose=0, **options
        ),
    )
    return [
        max(float(np.max(np.abs(a - b))) for a, b in zip(*pair, strict=True)) for pair in zip(ours, plain, strict=True)
    ]


def trained_twice():
    """Trainings one after the other, a search before them: what is traced by the second, and what it holds after."""

    class Traced(layers.Layer):
        calls = 0

        def call(self, inputs):
            Traced.calls += 1
            return inputs

    def trained(model, fit):
        counts = []
        for seed in range(3):
            x, y, _ = arrays()
            history = fit(model, np.roll(x, seed, 0), np.roll(y, seed, 0))
            counts.append(Traced.calls)
        return history, counts

    options = {"epochs": 1, "shuffle": False, "verbose": 0}
    plain = eager(dense(Traced(), optimizer=keras.optimizers.SGD(0.1)))
    expected, _ = trained(plain, lambda model, x, y: model.fit(x, y, batch_size=TARGET, **options))
    found = {}
    for how, micro_batch in (("searched", "auto"), ("given", 3)):
        with STRATEGY.scope():
            model = dense(Traced(), optimizer=keras.optimizers.SGD(0.1))
        history, counts = trained(
            model,
            lambda model, x, y, size=micro_batch: autobatch.fit(
                model, x, y, target_batch=TARGET, micro_batch=size, validation_data=(x[:9], y[:9]), **options
            ),
        )
        found[how] = {
            "weights": relative_error(model.get_weights(), plain.get_weights()),
            "loss": abs(history.history["loss"][-1] - expected.history["loss"][-1]),
            "traces": counts,
            "why": history.report.stopped_because,
        }
    return found


def losses_of_ones_own():
    """Sums, vectors and quotients of the user's own, in a train_step and given to compile: weights and losses apart.

    Those given to compile are the losses of one model's outputs.
    """
    from losses import test_loss_degrees as own

    names = ("vector", "sum", "sum and mean", "masked mean", "dice of the batch")
    keys = {name.replace(" ", "_"): name for name in names}

    def given_to_compile():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        hidden = layers.Dense(5, activation="tanh", kernel_regularizer="l2")(inputs)
        model = keras.Model(inputs, {key: layers.Dense(3, name=key)(hidden) for key in keys})
        model.compile(keras.optimizers.SGD(0.01), {key: own.LOSSES[name] for key, name in keys.items()})
        return model

    def changed(model, fit, *data, **sizes):
        before = model.get_weights()
        history = fit(*data, **sizes, epochs=2, shuffle=False, verbose=0).history
        moved = [(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)]
        return [np.concatenate(moved[place : place + 2]) for place in range(0, len(moved), 2)], history

    def both(build, x, y, *, eagerly):
        """By plain Keras and on replicas: what has changed, by layer, and History."""
        plain = eager(build()) if eagerly else build()
        with STRATEGY.scope():
            ours = build()
        return (
            changed(plain, plain.fit, x, y, batch_size=own.TARGET),
            changed(ours, functools.partial(autobatch.fit, ours), x, y, target_batch=own.TARGET, micro_batch=3),
        )

    def losses_apart(found, expected):
        alike = [np.shape(value) for value in found] == [np.shape(value) for value in expected]
        return max(own.apart(one, other) for one, other in zip(found, expected, strict=True)), alike

    found = {}
    x, y = own.data()
    for name in names:
        build = functools.partial(own.build, "train_step", own.LOSSES[name])
        (reference, plain), (moved, history) = both(build, x, y, eagerly=True)
        weights = own.apart(np.concatenate(moved), np.concatenate(reference))
        found[f"train_step, {name}"] = [weights, *losses_apart(history["loss"], plain["loss"])]
    # Run eagerly, Keras takes the mean of an output's losses by the samples of each batch, and in a graph it does not.
    (reference, plain), (moved, history) = both(given_to_compile, x, dict.fromkeys(keys, y), eagerly=False)
    for place, key in enumerate(("loss", *(f"{key}_loss" for key in keys))):
        losses = losses_apart(history[key], plain[key])
        found[f"compile, {key}"] = [own.apart(moved[place], reference[place]), *losses]
    return found


def main():
    global STRATEGY
    replicas = int(sys.argv[1])
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    STRATEGY = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(replicas)])
    with contextlib.redirect_stdout(sys.stderr):
        found = {name: globals()[name]() for name in sys.argv[2:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
