"""Models with a ``fit`` of their own: what it does happens once, to what the user has passed."""

from __future__ import annotations

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import MemoryHog, arrays, classifier, relative_error
from put_back import putting_back

import autobatch
from autobatch.data import fit_data, own_fit

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")


def compiled(kind, features=16, extra=()):
    keras.utils.set_random_seed(1)
    model = kind([keras.Input((features,)), *extra, layers.Dense(10)])
    model.seen = []
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class Counting(keras.callbacks.Callback):
    epochs = batches = 0

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1


class AddsCallback(keras.Sequential):
    def fit(self, *args, callbacks=None, **kwargs):
        self.counting = Counting()
        return super().fit(*args, callbacks=[*(callbacks or []), self.counting], **kwargs)


class Scales(keras.Sequential):
    def fit(self, x=None, y=None, **kwargs):
        self.seen.append((type(x), len(x)))
        return super().fit(x * 0.5, y, **kwargs)


class Maps(keras.Sequential):
    def fit(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        self.seen.append(batch_size)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size or 32)
        data = data.map(lambda x, y: (x + 1.0, y, tf.cast(y + 1, tf.float32)))
        return super().fit(x=data, y=None, batch_size=None, sample_weight=None, **kwargs)


class MoreSamples(keras.Sequential):
    def fit(self, x, y, **kwargs):
        return super().fit(np.concatenate([x, -x]), np.concatenate([y, y]), **kwargs)


class OneEpochMore(keras.Sequential):
    def fit(self, *args, epochs=1, **kwargs):
        return super().fit(*args, epochs=epochs + 1, **kwargs)


class Twice(keras.Sequential):
    def fit(self, x, y, **kwargs):
        super().fit(x[:16], y[:16], **kwargs)
        return super().fit(x, y, **kwargs)


class Mixin:
    def fit(self, data, labels=None, **kwargs):
        self.seen.append(len(data))
        return super().fit(data, labels, **kwargs)


class Mixed(Mixin, keras.Sequential):
    pass


def halved(fit):
    @functools.wraps(fit)
    def wrapper(self, x, *args, **kwargs):
        self.seen.append(len(x))
        return fit(self, x / 2, *args, **kwargs)

    return wrapper


class Wrapped(keras.Sequential):
    fit = halved(keras.Model.fit)


class Named(keras.Sequential):
    def fit(self, *, x, y, noise=0.0, **kwargs):
        self.seen.append(noise)
        return keras.Model.fit(self, x=x + noise, y=y, **kwargs)


class ByAHelper(keras.Sequential):
    def fit(self, x, y, **kwargs):
        return self.train_now(x, y, kwargs)

    def train_now(self, x, y, options):
        return super().fit(x, y, **options)


class Compiles(keras.Sequential):
    def fit(self, *args, **kwargs):
        self.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return super().fit(*args, **kwargs)


class OnTheInstance(keras.Sequential):
    pass


KINDS = [AddsCallback, Scales, Maps, MoreSamples, OneEpochMore, Twice, Mixed, Wrapped, Named, ByAHelper, Compiles]


@pytest.mark.parametrize("kind", [*KINDS, OnTheInstance], ids=lambda kind: kind.__name__)
def test_it_does_once_what_it_does_under_keras(kind):
    x, y = arrays()
    plain, ours = compiled(kind), compiled(kind)
    if kind is OnTheInstance:
        for model in (plain, ours):
            own = model.fit
            model.fit = lambda x, y, own=own, **options: own(x * 2, y, **options)
    options = {"shuffle": False, "verbose": 0, "epochs": 2, "validation_data": arrays(seed=3, samples=9)}
    if kind is Named:
        options["noise"] = 0.25
        expected = plain.fit(x=x, y=y, batch_size=16, **options)
    else:
        expected = plain.fit(x, y, batch_size=16, **options)
    put_back = putting_back(ours)
    for micro_batch in (5, 16):
        put_back()
        ours.seen = []
        history = autobatch.fit(ours, x, y, target_batch=16, micro_batch=micro_batch, **options)
        assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
        assert ours.seen == plain.seen
        assert isinstance(history, autobatch.TrainingHistory)
        assert history.epoch == expected.epoch
        np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-5)
        assert history.plan.micro_batch == min(micro_batch, 16)
        if kind is AddsCallback:
            assert vars(ours.counting)["batches"] == plain.counting.batches
            assert ours.counting.epochs == 2


def test_a_fit_within_the_fit_is_kerass_own():
    class Again(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.fit(*arrays(seed=5, samples=8), batch_size=4, shuffle=False, verbose=0)

    plain, ours = compiled(Scales), compiled(Scales)
    plain.fit(*arrays(), batch_size=16, shuffle=False, verbose=0, callbacks=[Again()])
    autobatch.fit(ours, *arrays(), target_batch=16, micro_batch=8, shuffle=False, verbose=0, callbacks=[Again()])
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    assert ours.seen == plain.seen


def test_the_recoveries_of_every_training_within_are_returned():
    room = {"samples": 16}
    model = compiled(Twice, extra=[MemoryHog(lambda samples: samples > room["samples"])])
    room["samples"] = 4
    history = autobatch.fit(model, *arrays(), target_batch=16, micro_batch=8, verbose=0)
    assert [recovery.micro_batch_before for recovery in history.recoveries[::2]] == [8, 8]


class Pooling(keras.Sequential):
    """Makes 16 features of 64, and counts what it is asked to do."""

    calls = 0

    def fit(self, x, y=None, batch_size=None, **kwargs):
        self.calls += 1
        np.random.uniform(size=3)
        self.layers[-1].kernel.assign_add(self.layers[-1].kernel)
        data = tf.data.Dataset.from_tensor_slices((x, y)) if batch_size else x
        data = (data.batch(batch_size) if batch_size else data).map(
            lambda x, y: (tf.reduce_mean(tf.reshape(x, [-1, 16, 4]), -1), y)
        )
        return super().fit(data, **kwargs)


@pytest.mark.parametrize("kind", ["arrays", "batches"])
def test_tune_sizes_what_the_fit_makes_of_the_data_and_changes_nothing(kind):
    seen = []
    hog = MemoryHog(lambda samples: seen.append(samples) or samples > 21)
    model = compiled(Pooling, extra=[hog])
    x, y = arrays(features=64)
    data = (x, y) if kind == "arrays" else (tf.data.Dataset.from_tensor_slices((x, y)).batch(7),)
    before, state = model.get_weights(), np.random.get_state()[1].copy()
    report = autobatch.tune(model, *data, target_batch=40, exact=True, objective="largest")
    assert report.plan.micro_batch == report.largest_fit == 21 or report.largest_fit == 20
    assert seen
    assert model.calls == 0
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    for left, right in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(left, right)
    history = autobatch.fit(model, *data, target_batch=40, verbose=0)
    assert model.calls == 1
    assert history.plan.micro_batch <= 21


def test_a_fit_that_never_calls_kerass_is_refused_before_it_begins():
    class Loop(keras.Sequential):
        def fit(self, x, y, **options):
            self.seen.append(1)
            for sample, label in zip(x, y, strict=True):
                self.train_on_batch(sample[None], label[None])

    model = compiled(Loop)
    for call in (autobatch.fit, autobatch.tune):
        with pytest.raises(ValueError, match="does not call Keras's own fit.*super.*wrap_step.*Received: Loop"):
            call(model, *arrays(), target_batch=16)
    assert model.seen == []


def test_a_fit_of_another_model_is_refused():
    class Around(keras.Sequential):
        def fit(self, *args, **options):
            return self.inside[0].fit(*args, **options)

    model = compiled(Around)
    model.inside = [classifier()]
    with pytest.raises(ValueError, match="does not call Keras's own fit on the model.*Received: Around"):
        autobatch.fit(model, *arrays(), target_batch=16, verbose=0)


def test_options_that_it_does_not_take_or_lacks_are_named():
    with pytest.raises(TypeError, match="hands on to Keras's what that does not take.*'colour'"):
        autobatch.fit(compiled(Scales), *arrays(), target_batch=16, colour="red")

    class Wanting(keras.Sequential):
        def fit(self, x, y, noise, **options):
            return super().fit(x + noise, y, **options)

    with pytest.raises(TypeError, match="The fit of Wanting cannot be called.*'noise'"):
        autobatch.tune(compiled(Wanting), *arrays(), target_batch=16)


def test_kerass_fit_is_as_it_was_afterwards():
    before = keras.Model.fit
    autobatch.fit(compiled(Wrapped), *arrays(), target_batch=16, micro_batch=4, verbose=0)
    assert keras.Model.fit is before
    model = compiled(Wrapped)
    model.fit(*arrays(), batch_size=16, verbose=0)
    assert int(model.optimizer.iterations) == 3


class Evaluates(keras.Sequential):
    """Overrides what ``fit`` calls, and what a callback may."""

    def evaluate(self, *args, **kwargs):
        self.seen.append("evaluate")
        return super().evaluate(*args, **kwargs)

    def train_on_batch(self, x, y, **kwargs):
        self.seen.append("train_on_batch")
        return super().train_on_batch(x * 0.5, y, **kwargs)

    def make_test_function(self, force=False):
        self.seen.append("make_test_function")
        return super().make_test_function(force)

    def fit(self, *args, **kwargs):
        self.train_on_batch(*arrays(seed=4, samples=8))
        return super().fit(*args, **kwargs)


def test_other_methods_that_are_overridden_are_called_as_by_keras():
    options = {"shuffle": False, "verbose": 0, "epochs": 2, "validation_data": arrays(seed=3, samples=9)}
    plain, ours = compiled(Evaluates), compiled(Evaluates)
    expected = plain.fit(*arrays(), batch_size=16, **options)
    history = autobatch.fit(ours, *arrays(), target_batch=16, micro_batch=5, **options)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    assert ours.seen == plain.seen
    np.testing.assert_allclose(history.history["val_loss"], expected.history["val_loss"], rtol=1e-5)


class Batches:
    """Batches as Grain's are: nothing shows how they were made."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield np.zeros((self.rows, 4), "float32"), np.zeros(self.rows)


Batches.__module__ = "grain.of_a_test"


@pytest.mark.parametrize(
    ("rows", "steps", "stay", "refused"),
    [
        pytest.param(8, 3, True, False, id="batches of the target"),
        pytest.param(5, 1, True, False, id="fewer samples than the target"),
        pytest.param(4, 5, False, True, id="another size, counted in epochs"),
        pytest.param(4, None, False, False, id="another size, read to its end"),
    ],
)
def test_batches_that_show_nothing_stay_as_they_come_only_if_they_are_of_the_target(rows, steps, stay, refused):
    class Mapped(keras.Model):
        def fit(self, x=None, y=None, batch_size=None, **options):
            return super().fit(Batches(rows), steps_per_epoch=steps, **options)

    seen = []
    own_fit.call_own_fit(
        Mapped(),
        np.zeros((20, 4)),
        np.zeros(20),
        target_batch=8,
        options={},
        instead=lambda given, keras_fit: seen.append(given),
    )
    assert (fit_data.AS_THEY_COME in seen[0]) is stay
    with pytest.raises(ValueError, match="batches of 4 samples") if refused else contextlib.nullcontext():
        own_fit.require_known_passes(seen[0], {}, 8)
