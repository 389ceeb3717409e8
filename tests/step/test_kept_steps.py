"""A second training of a model traces nothing anew where Keras would not; what is kept lives as long as with Keras."""

from __future__ import annotations

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import MemoryHog, arrays, relative_error

import autobatch
from autobatch.step import kept_steps

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning", "ignore::UserWarning")

OPTIONS = {"shuffle": False, "verbose": 0}


class Traced(layers.Layer):
    """Counts how often it is called from Python: once for each trace."""

    calls = 0

    def call(self, inputs):
        self.calls += 1
        return inputs


def made(optimizer=None, *, frozen=False, extra=(), metrics=()):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((16,)), layers.Dense(12, activation="relu"), Traced(), *extra, layers.Dense(10)]
    )
    model.layers[0].trainable = not frozen
    model.compile(
        optimizer or keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=list(metrics),
    )
    return model


def traces(model):
    return model.layers[1].calls


HOW = {"whole": {"micro_batch": 16}, "micro": {"micro_batch": 5}, "auto": {}}


VALIDATION = arrays(seed=8, samples=10)


@functools.cache
def trained_three_times_by_keras():
    plain = made(metrics=["accuracy"])
    data = [arrays(seed=seed) for seed in range(3)]
    options = {"batch_size": 16, "validation_data": VALIDATION, **OPTIONS}
    return [plain.fit(*each, **options).history for each in data], plain.get_weights()


@pytest.mark.parametrize("how", HOW)
def test_a_second_fit_traces_nothing_and_trains_as_kerass(how):
    ours = made(metrics=["accuracy"])
    histories, weights = trained_three_times_by_keras()
    counts = []
    for seed, expected in enumerate(histories):
        data = arrays(seed=seed)
        history = autobatch.fit(ours, *data, target_batch=16, validation_data=VALIDATION, **HOW[how], **OPTIONS)
        for name, values in expected.items():
            np.testing.assert_allclose(history.history[name], values, rtol=1e-5)
        counts.append(traces(ours))
    assert counts[0] == counts[1] == counts[2]
    assert relative_error(ours.get_weights(), weights) < 1e-5


def test_a_fit_after_tune_traces_nothing_and_runs_no_trial_again():
    model = made(extra=[MemoryHog(lambda samples: samples > 21)])
    report = autobatch.tune(model, *arrays(), target_batch=40)
    before = traces(model)
    history = autobatch.fit(model, *arrays(), target_batch=40, **OPTIONS)
    assert traces(model) == before
    assert history.plan == report.plan
    assert history.report.stopped_because.startswith("remembered from an earlier search of this model")
    assert history.report.trials == report.trials


def test_a_size_that_has_run_out_since_is_searched_anew():
    room = {"samples": 21}
    model = made(extra=[MemoryHog(lambda samples: samples > room["samples"])])
    options = {"target_batch": 40, **OPTIONS}
    assert not autobatch.fit(model, *arrays(), **options).recoveries
    room["samples"] = 4
    assert autobatch.fit(model, *arrays(), **options).recoveries
    third = autobatch.fit(model, *arrays(), **options)
    assert third.plan.micro_batch <= 4
    assert not third.recoveries


def test_without_the_cache_every_fit_searches():
    model = made(extra=[MemoryHog(lambda samples: samples > 21)])
    for _ in range(2):
        history = autobatch.fit(model, *arrays(), target_batch=40, cache=False, **OPTIONS)
        assert not history.report.stopped_because.startswith("remembered")


def float64(data):
    return data[0].astype("float64").astype("float16"), data[1]


def weighted(data):
    return (*data, np.linspace(0, 2, len(data[0])).astype("float32"))


OTHERS = {
    "another effective batch": (lambda model: None, lambda data: data, 12),
    "another dtype": (lambda model: None, float64, 16),
    "weights": (lambda model: None, weighted, 16),
    "compiled anew": (lambda model: model.compile(keras.optimizers.SGD(0.3), model.loss), lambda data: data, 16),
    "a smaller last batch": (lambda model: None, lambda data: (data[0][:41], data[1][:41]), 16),
}


@functools.cache
def trained_on_another_by_keras(other):
    change, remake, size = OTHERS[other]
    plain = made()
    plain.fit(*arrays(), batch_size=16, **OPTIONS)
    change(plain)
    x, y, *weight = remake(arrays(seed=4))
    plain.fit(x, y, batch_size=size, sample_weight=weight[0] if weight else None, **OPTIONS)
    return plain.get_weights()


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("micro_batch", [5, 16])
def test_another_training_is_traced_anew_where_it_differs(other, micro_batch):
    change, remake, size = OTHERS[other]
    ours = made()
    autobatch.fit(ours, *arrays(), target_batch=16, micro_batch=micro_batch, **OPTIONS)
    change(ours)
    x, y, *weight = remake(arrays(seed=4))
    options = {**OPTIONS, "sample_weight": weight[0]} if weight else OPTIONS
    autobatch.fit(ours, x, y, target_batch=size, micro_batch=micro_batch, **options)
    assert relative_error(ours.get_weights(), trained_on_another_by_keras(other)) < 1e-5
    before = traces(ours)
    for _ in range(2):  # the first of them once more, which is kept beside the other unless the model was compiled
        autobatch.fit(ours, x, y, target_batch=size, micro_batch=micro_batch, **options)
    assert traces(ours) == before


def test_weights_loaded_between_two_fits_are_trained_on(tmp_path):
    plain, ours = made(), made()
    plain.save_weights(tmp_path / "first.weights.h5")
    for model, fit in ((plain, plain_fit), (ours, our_fit)):
        fit(model)
        model.load_weights(tmp_path / "first.weights.h5")
        model.optimizer.learning_rate = 0.02
        fit(model)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def plain_fit(model, size=16):
    model.fit(*arrays(), batch_size=size, **OPTIONS)


def our_fit(model, micro_batch=5):
    autobatch.fit(model, *arrays(), target_batch=16, micro_batch=micro_batch, **OPTIONS)


def whole_fit(model):
    our_fit(model, 16)


def freeze(model):
    model.layers[0].trainable = False


def freeze_all(model):
    model.trainable = False


def unfreeze(model):
    model.layers[0].trainable = True


def freeze_and_remake(model):
    freeze(model)
    model.make_train_function(force=True)


def freeze_and_compile(model):
    freeze(model)
    model.compile(keras.optimizers.SGD(0.1), model.loss)


CHANGES = [freeze, freeze_all, unfreeze, freeze_and_remake, freeze_and_compile]


def changed(change, first, second):
    """A model that is trained, changed, and trained twice more."""
    model = made(frozen=change is unfreeze)
    first(model)
    change(model)
    second(model)
    second(model)
    return model


@functools.cache
def changed_under_keras(change):
    return changed(change, plain_fit, plain_fit)


# Behind compile nothing is left of a first training of any kind, and all of a model is frozen as a part of it is.
KEPT_CHANGES = [freeze, unfreeze, freeze_and_remake]


@pytest.mark.parametrize(
    ("fits", "change"),
    [
        *(((our_fit, our_fit), change) for change in CHANGES),
        *(((whole_fit, our_fit), change) for change in KEPT_CHANGES),
        *(((plain_fit, whole_fit), change) for change in KEPT_CHANGES),
    ],
    ids=lambda part: "-".join(fit.__name__ for fit in part) if isinstance(part, tuple) else part.__name__,
)
def test_what_is_trainable_is_what_keras_takes_it_to_be(change, fits):
    plain, ours = changed_under_keras(change), changed(change, *fits)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    moved = [np.any(a != b) for a, b in zip(ours.get_weights(), made().get_weights(), strict=True)]
    assert all(moved) is (change is not unfreeze)
    assert [layer.trainable for layer in ours.layers] == [layer.trainable for layer in plain.layers]
    assert [weight.trainable for weight in ours.weights] == [weight.trainable for weight in plain.weights]


def test_a_change_after_tune_and_before_the_first_training_counts():
    plain, ours = made(), made()
    autobatch.tune(ours, *arrays(), target_batch=16)
    for model in (plain, ours):
        freeze(model)
    plain_fit(plain)
    our_fit(ours)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


class Inner(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            our_fit(self.model, 8)


def test_a_fit_in_a_callback_of_a_fit_has_a_step_of_its_own():
    class Plain(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                plain_fit(self.model)

    plain, ours = made(), made()
    plain.fit(*arrays(), batch_size=16, epochs=2, callbacks=[Plain()], **OPTIONS)
    autobatch.fit(ours, *arrays(), target_batch=16, micro_batch=5, epochs=2, callbacks=[Inner()], **OPTIONS)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


class Noted(np.ndarray):
    """An array that weak references may point at."""


@pytest.mark.parametrize("how", HOW)
def test_neither_the_model_nor_the_data_are_kept_alive(how):
    model, data = made(), arrays()[0].view(Noted)
    autobatch.fit(model, data, arrays()[1], target_batch=16, **HOW[how], **OPTIONS)
    kept = weakref.ref(data)
    del data
    gc.collect()
    assert kept() is None
    step = weakref.ref(next(iter(kept_steps.kept_steps(model)._steps.values())))
    model.compile("sgd", model.loss)
    gc.collect()
    assert step() is None
    autobatch.fit(model, *arrays(), target_batch=16, **HOW[how], **OPTIONS)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_few_steps_are_kept():
    model = made()
    for size in range(8, 8 + kept_steps.MOST_KEPT + 2):
        autobatch.fit(model, *arrays(), target_batch=size, micro_batch=size, **OPTIONS)
    assert len(kept_steps.kept_steps(model)._steps) == kept_steps.MOST_KEPT


def test_sums_take_no_memory_between_two_fits_and_are_whole_again():
    model = made(extra=[layers.Dense(30)])
    our_fit(model)
    (step,) = kept_steps.kept_steps(model)._steps.values()
    assert step.accumulators
    assert all(int(tf.size(sums)) == 0 for sums in step.accumulators)
    our_fit(model)
    plain = made(extra=[layers.Dense(30)])
    plain_fit(plain)
    plain_fit(plain)
    assert relative_error(model.get_weights(), plain.get_weights()) < 1e-5


def test_rows_of_an_embedding_are_kept_anew():
    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5000, 4), layers.Flatten()])
        model.add(layers.Dense(2))
        model.compile(keras.optimizers.SGD(0.5), "mse")
        return model

    x = np.random.default_rng(0).integers(0, 5000, (24, 3))
    y = np.ones((24, 2), "float32")
    plain, ours = build(), build()
    for _ in range(2):
        plain.fit(x, y, batch_size=12, **OPTIONS)
        autobatch.fit(ours, x, y, target_batch=12, micro_batch=5, **OPTIONS)
    (step,) = kept_steps.kept_steps(ours)._steps.values()
    assert step.tables_kept_as_rows
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


@pytest.mark.parametrize("kind", ["deepcopy", "save"])
def test_a_model_with_kept_steps_is_copied_and_saved(kind, tmp_path):
    import copy

    model = keras.Sequential([keras.Input((16,)), layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    our_fit(model)
    if kind == "save":
        model.save(tmp_path / "model.keras")
        other = keras.saving.load_model(tmp_path / "model.keras")
    else:
        other = copy.deepcopy(model)
    our_fit(other)
    our_fit(model)
    assert relative_error(other.get_weights(), model.get_weights()) < 1e-6


class TwoRates(keras.Model):
    """Trains its first layer by the optimizer of ``compile``, and the second by one of its own."""

    def __init__(self):
        super().__init__()
        self.first = keras.Sequential([keras.Input((16,)), layers.Dense(12, activation="relu")])
        self.second = keras.Sequential([keras.Input((12,)), layers.Dense(10)])
        self.other = keras.optimizers.SGD(0.02)
        self.loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.built = True

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(data[1], self.second(self.first(data[0])))
        parts = self.first.trainable_variables, self.second.trainable_variables
        gradients = tape.gradient(loss, parts)
        self.optimizer.apply(gradients[0], parts[0])
        self.other.apply(gradients[1], parts[1])
        return {"loss": loss}


def test_what_another_optimizer_trains_is_no_frozen_weight_after_kerass_fit():
    def trained(second_fit):
        keras.utils.set_random_seed(2)
        model = TwoRates()
        model.compile(keras.optimizers.SGD(0.1))
        model.fit(*arrays(), batch_size=16, **OPTIONS)
        between = model.get_weights()
        second_fit(model)
        return between, model.get_weights()

    between, expected = trained(lambda model: model.fit(*arrays(seed=1), batch_size=16, **OPTIONS))
    _, found = trained(lambda model: autobatch.fit(model, *arrays(seed=1), target_batch=16, micro_batch=5, **OPTIONS))
    for before, plain, ours in zip(between, expected, found, strict=True):
        assert np.abs(plain - before).max() > 1e-4
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)


def test_a_train_function_that_a_user_puts_away_is_traced_anew():
    model = made()
    autobatch.fit(model, *arrays(), target_batch=16, micro_batch=5, **OPTIONS)
    model.layers[0].trainable = False
    model.optimizer = keras.optimizers.SGD(0.0)
    model.train_function = None
    before = model.get_weights()
    autobatch.fit(model, *arrays(), target_batch=16, micro_batch=5, **OPTIONS)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
