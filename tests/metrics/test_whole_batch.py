"""Metrics that are no sums over samples: `autobatch.fit` against `Model.fit`, batch by batch and epoch by epoch."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import AtCall, MemoryHog, arrays

import autobatch

SAMPLES, TARGET = 100, 40  # updates of 40, 40 and 20 samples


def numbers(metric, *names):
    for name in names:
        setattr(metric, name, metric.add_weight(shape=(), initializer="zeros", name=name))


def dice_of(y_true, y_pred):
    return 2 * ops.sum(y_true * y_pred) / (ops.sum(y_true) + ops.sum(y_pred))


class MeanOverBatches(keras.metrics.Metric):
    """With weights, if there are any."""

    def __init__(self, name="dice"):
        super().__init__(name=name)
        numbers(self, "total", "count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        if sample_weight is not None:
            y_true = y_true * ops.reshape(sample_weight, (-1, 1))
        self.total.assign_add(dice_of(y_true, y_pred))
        self.count.assign_add(1.0)

    def result(self):
        return self.total / self.count


class LastValue(keras.metrics.Metric):
    def __init__(self, name="last"):
        super().__init__(name=name)
        numbers(self, "value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.max(y_pred) - ops.mean(y_pred))

    def result(self):
        return self.value + 0


class Calls(keras.metrics.Metric):
    def __init__(self, name="calls"):
        super().__init__(name=name)
        numbers(self, "count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(1.0)

    def result(self):
        return self.count + 0


class Extremes(keras.metrics.Metric):
    """Returns two results."""

    def __init__(self, name="extremes"):
        super().__init__(name=name)
        numbers(self, "least", "most")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.least.assign(ops.minimum(self.least, ops.mean(y_pred - y_true)))
        self.most.assign(ops.maximum(self.most, ops.mean(y_pred)))

    def result(self):
        return {"least": self.least + 0, "most": self.most + 0}


class Random(keras.metrics.Metric):
    """Draws once for each batch."""

    def __init__(self, name="random"):
        super().__init__(name=name)
        numbers(self, "total")
        self.draws = keras.random.SeedGenerator(3)

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(keras.random.uniform((), seed=self.draws) * ops.mean(y_pred))

    def result(self):
        return self.total


class MadeAtFirstUpdate(keras.metrics.Metric):
    def __init__(self, name="made"):
        super().__init__(name=name)
        self.is_made = False

    def update_state(self, y_true, y_pred, sample_weight=None):
        if not self.is_made:
            numbers(self, "value")
            self.is_made = True
        self.value.assign_add(ops.max(y_pred))

    def result(self):
        return self.value + 0


class OfAnother(keras.metrics.Metric):
    """Keeps its number in another metric."""

    def __init__(self, name="of_another"):
        super().__init__(name=name)
        self.mean = keras.metrics.Mean()

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.mean.update_state(dice_of(y_true, y_pred))

    def result(self):
        return self.mean.result()


class Subclassed(keras.metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(dice_of(y_true, y_pred))


def each_output(y_true, y_pred):
    return ops.max(ops.abs(y_true - y_pred), axis=0)


def against_the_largest(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred), axis=-1) / ops.max(y_pred)


def kinds():
    return [
        *(MeanOverBatches(), LastValue(), Calls(), Extremes(), MadeAtFirstUpdate(), OfAnother()),
        *(Subclassed(name="subclassed"), dice_of, each_output, against_the_largest),
        *(keras.metrics.CosineSimilarity(axis=0), keras.losses.Dice(name="of_a_loss"), "mae"),
    ]


def binary(samples=SAMPLES):
    x, labels = arrays(samples=samples)
    return x, np.stack([labels % 2, labels % 3 == 0], axis=-1).astype("float32")


def build(metrics=kinds, weighted=lambda: None, **options):
    keras.backend.clear_session()  # names are given anew
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((16,)), layers.Dense(2, "sigmoid")])
    model.compile(
        keras.optimizers.SGD(0.1), "binary_crossentropy", metrics=metrics(), weighted_metrics=weighted(), **options
    )
    return model


class Batches(keras.callbacks.Callback):
    """Keeps what the progress bar is given."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append({name: float(value) for name, value in logs.items()})


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, err_msg=name, **{"rtol": 1e-6, "atol": 1e-6} | tolerance)


def said_of(caught):
    return " ".join(str(warning.message) for warning in caught if warning.category is autobatch.AutobatchWarning)


def fit_both(build, x, y, micro_batch, **arguments):
    """Histories and what each batch showed, and what was said."""
    common = {"epochs": 2, "shuffle": False, "verbose": 0} | arguments
    plain, ours = Batches(), Batches()
    expected = build().fit(x, y, batch_size=TARGET, callbacks=[plain], **common)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = autobatch.fit(build(), x, y, target_batch=TARGET, micro_batch=micro_batch, callbacks=[ours], **common)
    assert_same(actual.history, expected.history)
    for here, there in zip(ours.logs, plain.logs, strict=True):
        assert_same(here, there)
    return actual.history, said_of(caught)


@pytest.mark.parametrize(
    ("micro_batch", "options"),
    [(20, {}), (10, {"jit_compile": True}), (13, {}), (8, {"run_eagerly": True})],
    ids=str,
)
def test_every_kind_in_training_and_validation(micro_batch, options):
    x, y = binary()
    # XLA draws other random numbers than TensorFlow does elsewhere, for the same seed.
    drawing = () if options.get("jit_compile") else (Random,)
    weight = np.random.default_rng(3).uniform(0.5, 2, SAMPLES).astype("float32")
    history, said = fit_both(
        lambda: build(
            lambda: [*kinds(), *(kind() for kind in drawing)],
            lambda: [MeanOverBatches("weighed"), Calls("weighed_calls")],
            **options,
        ),
        *(x, y, micro_batch),
        sample_weight=weight,
        validation_data=(x[:50], y[:50], weight[:50]),
        validation_batch_size=30,
    )
    assert history["calls"] == [3.0, 3.0]
    assert history["val_calls"] == [2.0, 2.0]
    assert "metric" not in said


def test_several_outputs_with_metrics_and_weights_of_their_own():
    x, y = binary()
    weights = {"a": np.linspace(0.5, 2, SAMPLES).astype("float32"), "b": np.ones(SAMPLES, "float32")}

    def two():
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        inputs = keras.Input((16,))
        outputs = {"a": layers.Dense(2, "sigmoid", name="a")(inputs), "b": layers.Dense(2, name="b")(inputs)}
        model = keras.Model(inputs, outputs)
        kinds = {"a": [MeanOverBatches(), "accuracy"], "b": [LastValue(), each_output]}
        weighed = {"a": [MeanOverBatches("weighed")], "b": [Calls()]}
        losses = {"a": "binary_crossentropy", "b": "mse"}
        model.compile(keras.optimizers.SGD(0.1), losses, metrics=kinds, weighted_metrics=weighed)
        return model

    history, said = fit_both(two, x, {"a": y, "b": y}, 8, sample_weight=weights)
    assert "a_weighed" in history
    assert "metric" not in said


def test_class_weights():
    x, y = binary()
    y = y[:, :1]

    def one():
        model = build(lambda: None, lambda: [MeanOverBatches(), "mae"])
        model = keras.Sequential([keras.Input((16,)), layers.Dense(1, "sigmoid", kernel_initializer="ones")])
        model.compile("sgd", "binary_crossentropy", weighted_metrics=[MeanOverBatches(), "mae"])
        return model

    fit_both(one, x, y, 10, class_weight={0: 1.0, 1: 3.0})


class VariableItself(Calls):
    def result(self):
        return self.count


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_a_result_that_is_the_variable_itself(options):
    history, _ = fit_both(lambda: build(lambda: [VariableItself()], **options), *binary(), 10)
    assert history["calls"] == [3.0, 3.0]


class Masked(keras.metrics.Metric):
    """Reads the mask that the layers left on the outputs."""

    def __init__(self, name="masked"):
        super().__init__(name=name)
        numbers(self, "total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        mask = ops.cast(y_pred._keras_mask, "float32")
        self.total.assign_add(ops.sum(mask * ops.abs(y_true - y_pred)[..., 0]) / ops.sum(mask))

    def result(self):
        return self.total


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_masks_are_held_back_too(options):
    tokens = np.random.default_rng(0).integers(0, 5, (SAMPLES, 6))

    def masked():
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        stack = [keras.Input((None,)), layers.Embedding(5, 4, mask_zero=True), layers.LSTM(4, return_sequences=True)]
        model = keras.Sequential([*stack, layers.TimeDistributed(layers.Dense(1))])
        model.compile("sgd", "mse", metrics=[Masked()], **options)
        return model

    fit_both(masked, tokens, tokens.astype("float32")[..., None], 13, epochs=1)


class OwnStep(keras.Model):
    """Updates metrics itself, calls one, and reports what it makes of the results further."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, "sigmoid")
        self.dice, self.calls = MeanOverBatches(), Calls()
        self.loss_of = keras.losses.BinaryCrossentropy()

    def call(self, inputs):
        return self.dense(inputs)

    def logs(self, y, outputs, loss):
        self.dice.update_state(y, outputs)
        calls = self.calls(y, outputs)
        return {"dice": self.dice.result(), "calls": calls, "loss": loss}

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.loss_of(y, outputs)
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return self.logs(y, outputs, loss)

    def test_step(self, data):
        x, y = data
        outputs = self(x)
        return self.logs(y, outputs, self.loss_of(y, outputs))


class FurtherStep(OwnStep):
    def logs(self, y, outputs, loss):
        results = super().logs(y, outputs, loss)
        return {
            **results,
            "by_rate": self.optimizer.learning_rate * results["dice"],
            "calls_squared": results["calls"] ** 2,
        }


class WithinFunction(OwnStep):
    """As it is traced once more for the step, this one is no obstacle."""

    @tf.function
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OwnStep, {}),
        (OwnStep, {"run_eagerly": True}),
        (FurtherStep, {}),
        (FurtherStep, {"jit_compile": True}),
        (WithinFunction, {}),
    ],
)
def test_a_train_step_that_updates_metrics_itself(kind, options):
    x, y = binary()

    def own():
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = kind()
        model.compile(keras.optimizers.SGD(0.1), **options)
        return model

    fit_both(own, x, y, 13, validation_data=(x[:50], y[:50]), validation_batch_size=30)


def test_out_of_memory_in_the_middle_leaves_nothing_of_a_batch():
    x, y = binary()

    def make(asked):
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), MemoryHog(asked), layers.Dense(2, "sigmoid")])
        model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy", metrics=kinds())
        return model

    common = {"epochs": 2, "shuffle": False, "verbose": 0}
    expected = make(lambda samples: False).fit(x, y, batch_size=TARGET, **common)
    actual = autobatch.fit(make(AtCall(6)), x, y, target_batch=TARGET, micro_batch=13, **common)
    assert len(actual.recoveries) == 1
    assert_same(actual.history, expected.history)


class Confusion(keras.metrics.Metric):
    """A sum over samples: what of it is large need not be held back, and nothing is said of it."""

    def __init__(self, name="confusion"):
        super().__init__(name=name)
        numbers(self, "right", "all")

    def update_state(self, y_true, y_pred, sample_weight=None):
        right = ops.cast(ops.equal(y_true > 0.5, y_pred > 0.5), "float32")
        self.right.assign_add(ops.sum(ops.mean(right, axis=-1)))
        self.all.assign_add(ops.cast(ops.shape(y_true)[0], "float32"))

    def result(self):
        return self.right / self.all


class IoU(keras.metrics.MeanIoU):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true[:, 0], ops.argmax(y_pred, axis=-1))


def correct(y_true, y_pred):
    return ops.mean(ops.cast(ops.equal(y_true > 0.5, y_pred > 0.5), "float32"), axis=-1)


def test_a_large_output_is_not_held_back_and_said_to_be(monkeypatch):
    monkeypatch.setattr("autobatch.metrics.whole_batch.MOST_BYTES", 100)
    x, y = binary()
    sums = [Confusion(), IoU(2), correct, keras.metrics.AUC()]
    model = build(lambda: [MeanOverBatches("large"), *sums])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=10, epochs=2, shuffle=False, verbose=0)
    said = said_of(caught)
    assert "The metric large is updated with each micro-batch" in said
    assert said.count("The metric") == 1
    expected = build(lambda: [Confusion(), IoU(2), correct, keras.metrics.AUC()]).fit(
        x, y, batch_size=TARGET, epochs=2, shuffle=False, verbose=0
    )
    assert_same({name: actual.history[name] for name in expected.history}, expected.history)


class Norm(keras.metrics.Metric):
    """Given one number for a batch."""

    def __init__(self, name="norm"):
        super().__init__(name=name)
        numbers(self, "value")

    def update_state(self, value):
        self.value.assign(value)

    def result(self):
        return self.value + 0


class ByModel(keras.metrics.Metric):
    """Looks at the outputs by a model of its own."""

    def __init__(self, name="by_model"):
        super().__init__(name=name)
        numbers(self, "value")
        self.judge = keras.Sequential([keras.Input((2,)), layers.Dense(1)])

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign_add(ops.max(self.judge(y_pred)))

    def result(self):
        return self.value + 0


class Refused(OwnStep):
    def __init__(self):
        super().__init__()
        self.norm, self.by_model = Norm(), ByModel()
        self.in_function, self.in_branch = Calls("in_function"), Calls("in_branch")

    def logs(self, y, outputs, loss):
        @tf.function
        def within(y, outputs):
            self.in_function.update_state(y, outputs)

        def branch():
            self.in_branch.update_state(y, outputs)
            return 0

        within(y, outputs)
        tf.cond(tf.shape(y)[0] > 0, branch, lambda: 0)
        self.norm.update_state(tf.linalg.global_norm(self.trainable_weights) * loss)
        self.by_model.update_state(y, outputs)
        return super().logs(y, outputs, loss)


def test_what_cannot_be_held_back_is_named_with_its_reason():
    x, y = binary()
    model = Refused()
    model.compile(keras.optimizers.SGD(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=10, verbose=0)
    said = " ".join(history.report.warnings)
    assert "The metric in_branch is updated with each micro-batch" in said
    assert "it is updated within a loop or a branch" in said
    assert "The metric norm is updated with each micro-batch" in said
    assert "The metric by_model is updated with each micro-batch" in said
    assert "variables that are not its own" in said
    assert "dice" not in said
    assert "in_function" not in said, "a tf.function of the step's own is traced anew, and what it updates is held back"


class InPython(keras.metrics.Metric):
    """Keeps its state in Python, and has no result before the first update."""

    def __init__(self, name="in_python"):
        super().__init__(name=name)
        self.values = []

    def reset_state(self):
        self.values = []

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.values.append(np.abs(np.asarray(y_true) - np.asarray(y_pred)))

    def result(self):
        return {"mean_in_python": float(np.mean(np.concatenate(self.values)))}


class CallsInPython(InPython):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.values.append(1)

    def result(self):
        return float(len(self.values))


def test_metrics_that_keep_their_state_in_python():
    history, said = fit_both(
        lambda: build(lambda: [InPython(), CallsInPython("calls")], run_eagerly=True), *binary(), 10
    )
    assert history["calls"] == [3.0, 3.0]
    assert "in_python is updated with each micro-batch" in said
    assert "its result cannot be read before its first update" in said
    assert "calls" not in said


@pytest.mark.parametrize("decorate", [lambda step: step, tf.function], ids=["function", "tf.function"])
def test_a_loop_that_updates_metrics_itself(decorate):
    """What AutoGraph converts in a metric of a ``tf.function`` it converts where the metric is updated later, too."""
    x, y = binary(60)

    class Branching(Calls):
        def update_state(self, y_true, y_pred, sample_weight=None):
            if tf.executing_eagerly() or ops.max(y_pred) > 2:
                self.count.assign_add(1.0)
            else:
                self.count.assign_add(10.0)

    def make():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), layers.Dense(2, "sigmoid")])
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        loss_of = keras.losses.BinaryCrossentropy()
        dice, calls = MeanOverBatches(), Branching() if decorate is tf.function else Calls()

        @decorate
        def step(batch):
            with tf.GradientTape() as tape:
                outputs = model(batch[0], training=True)
                loss = loss_of(batch[1], outputs)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            dice.update_state(batch[1], outputs)
            calls.update_state(batch[1], outputs)
            return {"dice": dice.result(), "calls": calls.result(), "loss": loss}

        return model, optimizer, step

    batches = [(x[:TARGET], y[:TARGET]), (x[TARGET:], y[TARGET:])]
    _, _, plain = make()
    model, optimizer, step = make()
    ours = autobatch.wrap_step(step, model=model, optimizer=optimizer, target_batch=TARGET, micro_batch=13)
    for batch in batches:
        assert_same(tf.nest.map_structure(float, ours(batch)), tf.nest.map_structure(float, plain(batch)))
