"""What is refused by name, and what a fit leaves behind."""

from __future__ import annotations

import gc
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras.src.losses import loss as loss_module
from keras_version import KERAS
from models import Subclassed, arrays, classifier, relative_error
from put_back import putting_back

import autobatch
from autobatch.memory import limits


def test_a_strategy_is_refused_before_anything_runs():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = classifier()
    with pytest.raises(ValueError, match="under a tf.distribute strategy is not supported.*OneDeviceStrategy"):
        autobatch.fit(model, *arrays(), target_batch=16, verbose=0)


def test_a_model_with_its_own_train_function_is_refused():
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            return super().make_train_function(force)

    model = Own([keras.Input((16,)), layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="overrides make_train_function.*Received: Own"):
        autobatch.fit(model, *arrays(), target_batch=16, verbose=0)


class Hidden(keras.Sequential):
    """Keeps its optimizer where it was put: in a container, or nowhere to be seen."""

    where = "list"

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - tf.cast(y, tf.float32)[:, None]))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.chosen().apply(gradients, self.trainable_weights)
        return {"loss": loss}


@pytest.mark.parametrize("hide", [False, True], ids=["container", "closure"])
def test_an_optimizer_in_a_container_or_out_of_sight_is_found(hide):
    def build():
        keras.utils.set_random_seed(1)
        model = Hidden([keras.Input((16,)), layers.Dense(1)])
        optimizer = keras.optimizers.SGD(0.1)
        model.chosen = lambda: optimizer
        if not hide:
            model.parts = {"only": optimizer}
        model.compile()
        return model

    x, y = arrays()
    plain, ours = build(), build()
    plain.fit(x, y, batch_size=48, shuffle=False, verbose=0)
    autobatch.fit(ours, x, y, target_batch=48, micro_batch=13, shuffle=False, verbose=0)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    assert int(ours.chosen().iterations.numpy()) == 1


def test_a_step_that_updates_the_weights_without_an_optimizer_is_refused():
    class Descending(keras.Sequential):
        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=data[1], y_pred=self(data[0]))
            for weight, gradient in zip(
                self.trainable_weights, tape.gradient(loss, self.trainable_weights), strict=True
            ):
                weight.assign_sub(0.1 * gradient)
            return {"loss": loss}

    model = Descending([keras.Input((16,)), layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="applied no Keras optimizer.*Received: Descending"):
        autobatch.fit(model, *arrays(), target_batch=48, micro_batch=13, verbose=0)


def test_the_accumulators_memory_is_given_back():
    model = classifier("adam", extra=[layers.Dense(2000), layers.Dense(500)])
    x, y = arrays()
    held = []
    for _ in range(3):
        autobatch.fit(model, x, y, target_batch=48, micro_batch=16, verbose=0, memory_watch=False)
        gc.collect()
        held.append(limits.bytes_in_use("CPU:0"))
    if held[0] is not None:  # the allocator keeps figures
        assert held[2] - held[0] < 2 * 2**20


def test_an_unbuilt_eager_model_is_not_searched():
    model = Subclassed()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    with pytest.raises(ValueError, match="runs eagerly and is not built yet.*Received: Subclassed"):
        autobatch.fit(model, *arrays(), target_batch=32, verbose=0)
    autobatch.fit(model, *arrays(), target_batch=32, micro_batch=16, verbose=0)


def test_compile_in_a_callback_is_not_undone():
    class Again(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            self.model.make_train_function(force=True)

    x, y = arrays()
    model = classifier()
    autobatch.fit(model, x, y, target_batch=32, micro_batch=16, callbacks=[Again()], verbose=0)
    model.fit(x, y, batch_size=16, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 3


def test_an_apply_that_the_user_set_is_called_and_kept():
    model = classifier()
    calls = []
    original = model.optimizer.apply

    def apply(grads, trainable_variables=None):
        calls.append(1)
        original(grads, trainable_variables)

    model.optimizer.apply = apply
    for micro_batch in (16, 48):
        autobatch.fit(model, *arrays(), target_batch=48, micro_batch=micro_batch, verbose=0)
        assert model.optimizer.apply is apply
    assert len(calls) == 2


def test_fits_on_several_threads_leave_keras_as_it_was():
    before = loss_module.reduce_weighted_values, keras.metrics.Mean.update_state
    models = [classifier() for _ in range(3)]

    def run(model):
        autobatch.fit(model, *arrays(), target_batch=48, micro_batch=13, verbose=0)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == (loss_module.reduce_weighted_values, keras.metrics.Mean.update_state)
    assert all(int(model.optimizer.iterations.numpy()) == 1 for model in models)


def test_a_backup_is_kept_where_not_even_one_sample_fits(tmp_path):
    from models import MemoryHog

    limit = {"now": 1000}

    class Tighter(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            limit["now"] = 0

    model = classifier(extra=[MemoryHog(lambda samples: samples > limit["now"])])
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(autobatch.NoFeasibleBatchError):
        autobatch.fit(
            model, *arrays(), target_batch=16, micro_batch=4, epochs=3, callbacks=[backup, Tighter()], verbose=0
        )
    assert list((tmp_path / "backup").rglob("*.weights.h5"))


def test_sixteen_bit_weights_are_summed_in_thirty_two():
    x, y = arrays(samples=256)

    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), layers.Dense(10, dtype="bfloat16")])
        model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    start = [np.asarray(weight, "float32") for weight in build().get_weights()]
    moved = []
    for micro_batch in (256, 1):
        model = build()
        autobatch.fit(model, x, y, target_batch=256, micro_batch=micro_batch, shuffle=False, verbose=0)
        moved.append([np.asarray(w, "float32") - s for w, s in zip(model.get_weights(), start, strict=True)])
    # bfloat16 tells 1 part in 256, of the weights; summed in it, 256 gradients lose several of that.
    for one, many in zip(*moved, strict=True):
        assert float(np.max(np.abs(one - many))) <= 2 * float(np.max(np.abs(one))) / 256 + 2 / 256


def test_a_stateful_recurrent_layer_is_refused_by_name():
    model = keras.Sequential([keras.Input((4, 3), batch_size=8), layers.LSTM(5, stateful=True, name="kept")])
    model.compile("sgd", "mse")
    x = np.zeros((16, 4, 3), "float32")
    with pytest.raises(ValueError, match="stateful=True hands each sample's state.*Received: kept"):
        autobatch.fit(model, x, x[:, 0], target_batch=8, verbose=0)
    with pytest.raises(ValueError, match="Received: kept"):
        autobatch.wrap_step(lambda batch: None, model=model, optimizer=model.optimizer, target_batch=8)
    inner = layers.Bidirectional(layers.GRU(5, stateful=True, name="inner"))
    model = keras.Sequential([keras.Input((4, 3), batch_size=8), inner])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Received: .*inner"):
        autobatch.tune(model, x, np.zeros((16, 10), "float32"), target_batch=8)


@pytest.mark.skipif(KERAS < (3, 7), reason="circle is new in Keras 3.7")
@pytest.mark.parametrize("loss", ["circle", lambda: keras.losses.Circle(), lambda: keras.losses.circle])
def test_a_loss_that_compares_samples_is_named(loss):
    x, y = arrays()
    model = keras.Sequential([keras.Input((16,)), layers.Dense(4), layers.UnitNormalization()])
    model.compile("sgd", loss if isinstance(loss, str) else loss())
    with pytest.warns(autobatch.AutobatchWarning, match="The loss circle compares samples with each other"):
        autobatch.fit(model, x, y, target_batch=16, micro_batch=8, verbose=0)


class Aside(keras.callbacks.Callback):
    """Trains and tests by itself in the middle of a fit, on data of other structures than the fit's."""

    def __init__(self):
        super().__init__()
        self.told = []

    def on_epoch_end(self, epoch, logs=None):
        x, y = arrays(seed=9, samples=20)
        weight = np.linspace(0, 1, 20).astype("float32")
        self.told += self.model.train_on_batch(x, y, sample_weight=weight)
        self.told += self.model.train_on_batch(x[:7], y[:7], class_weight={1: 3.0})
        self.told += self.model.test_on_batch(x, y, sample_weight=weight)
        self.told += self.model.evaluate(tf.data.Dataset.from_tensors((x, y, weight)), verbose=0)
        history = self.model.fit(x, y, sample_weight=weight, batch_size=9, shuffle=False, verbose=0)
        self.told += history.history["loss"]
        self.told += list(self.model.predict(x[:2], verbose=0)[0])


def test_what_a_callback_trains_on_by_itself_is_kerass():
    x, y = arrays()
    plain, ours = classifier("adam"), classifier("adam")
    put_back = putting_back(ours)
    expected = Aside()
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    plain.fit(x, y, batch_size=32, callbacks=[expected], **options)
    for micro_batch in (13, 32):
        put_back()
        actual = Aside()
        history = autobatch.fit(ours, x, y, target_batch=32, micro_batch=micro_batch, callbacks=[actual], **options)
        np.testing.assert_allclose(actual.told, expected.told, rtol=1e-4, atol=1e-6)
        assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-4
        assert int(ours.optimizer.iterations.numpy()) == int(plain.optimizer.iterations.numpy())
        assert history.plan.micro_batch == micro_batch
        assert ours.train_function.__module__.startswith("keras.")  # as after Keras's own fit
        assert ours.test_function is None


def test_running_out_of_memory_in_a_predict_of_a_callback_is_raised_as_it_is():
    from models import MemoryHog

    limit = {"now": 1000}
    weights = []

    class Predicting(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights.append(self.model.get_weights())
            if batch == 1:
                limit["now"] = 4
                self.model.predict(arrays()[0], verbose=0)

    model = classifier(extra=[MemoryHog(lambda samples: samples > limit["now"])])
    x, y = arrays()
    with pytest.raises(tf.errors.ResourceExhaustedError):
        autobatch.fit(model, x, y, target_batch=16, micro_batch=8, callbacks=[Predicting()], verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 2
    for actual, expected in zip(model.get_weights(), weights[-1], strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert model.train_function.__module__.startswith("keras.")
    assert model.test_function is None
    autobatch.fit(model, x, y, target_batch=16, micro_batch=4, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 5
