"""The losses of ``test_loss_degrees`` where they are harder to follow: loops, replicas, eager code, penalties."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_loss_degrees import (
    BESIDE_THE_BATCHS_OWN,
    LOSSES,
    TARGET,
    apart,
    build,
    data,
    require_exact,
    squares,
    trained,
)

import autobatch


def looped(loss_of, micro_batch, returned=lambda loss, p: loss, decorate=lambda step: step):
    """A loop of one's own over three batches, the last one smaller: the weights' changes, and what it returned."""
    model = build("compile", "mse")
    optimizer = keras.optimizers.SGD(0.01)
    before = model.get_weights()

    def train_step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            p = model(x, training=True)
            loss = loss_of(y, p)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return returned(loss, p)

    step = decorate(train_step)
    if micro_batch is not None:
        step = autobatch.wrap_step(step, model=model, optimizer=optimizer, target_batch=TARGET, micro_batch=micro_batch)
    x, y = data()
    results = [step((x[at : at + TARGET], y[at : at + TARGET])) for at in range(0, len(x), TARGET)]
    moved = [(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)]
    return np.concatenate(moved), results


@pytest.mark.parametrize("name", ["vector", "matrix", "sum", "masked mean", "keras mean and own sum"])
def test_a_loop_returns_what_the_whole_batch_returns(name):
    reference, expected = looped(LOSSES[name], None)
    for micro_batch in (8, 5):
        moved, results = looped(LOSSES[name], micro_batch)
        assert apart(moved, reference) < 1e-5
        for result, whole in zip(results, expected, strict=True):
            assert result.shape == whole.shape
            np.testing.assert_allclose(result, whole, rtol=1e-4, atol=1e-6)


def test_a_loop_returns_each_samples_own_results():
    def returned(loss, p):
        return {"loss": loss, "predicted": p, "best": tf.argmax(p, -1), "size": tf.shape(p)[1]}

    reference, expected = looped(LOSSES["sum"], None, returned)
    moved, results = looped(LOSSES["sum"], 5, returned)
    assert apart(moved, reference) < 1e-5
    for result, whole in zip(results, expected, strict=True):
        for name, value in whole.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vector", "sum", "masked mean"])
def test_a_decorated_loop(name):
    reference, _ = looped(LOSSES[name], None)
    moved, _ = looped(LOSSES[name], 5, decorate=tf.function)
    assert apart(moved, reference) < 1e-5


@pytest.mark.parametrize("name", ["vector", "matrix", "sum", "sum over its shape", "mean", "sum of columns", "l2_loss"])
@pytest.mark.parametrize("place", ["train_step", "compile"])
def test_run_eagerly(place, name):
    require_exact(place, LOSSES[name], micro_batches=(5,), run_eagerly=True)


@pytest.mark.parametrize("name", ["masked mean", "sum and mean"])
def test_what_cannot_be_weighed_eagerly_is_said(name):
    _, _, said = trained("train_step", LOSSES[name], 5, run_eagerly=True)
    assert len(said) == 1
    assert "is not known" in said[0]


def test_eager_code_that_keeps_what_it_has_seen_keeps_no_trace_of_it():
    class Keeping(keras.Model):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.seen, self.by_name, self.steps = [], {}, 0

        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum((self(x) - y) ** 2)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            self.steps += 1
            self.seen.append(loss)
            self.by_name["loss"] = loss
            return {"loss": loss}

    inputs = keras.Input((6,))
    model = Keeping(inputs, keras.layers.Dense(3)(inputs))
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    x, y = data(samples=TARGET)
    autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=4, verbose=0)
    assert model.steps == 5
    assert len([float(loss) for loss in model.seen]) == 5
    assert float(model.by_name["loss"]) > 0


class Penalised(keras.Model):
    """A gradient penalty, as in WGAN-GP: each sample's gradient by itself, within the loss."""

    penalty_of = staticmethod(tf.reduce_mean)

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                score = tf.reduce_sum(self(x, training=True) ** 2, -1)
            slopes = inner.gradient(score, x)
            penalty = (tf.norm(slopes, axis=-1) - 1.0) ** 2
            loss = type(self).penalty_of(penalty) + tf.reduce_mean(squares(y, self(x)))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


class SummedPenalty(Penalised):
    penalty_of = staticmethod(tf.reduce_sum)


class Adversarial(keras.Model):
    """Trains on samples moved along the gradient of a mean: each sample's is divided by how many there are."""

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_mean(squares(y, self(x, training=True)))
        moved = x + 3.0 * tape.gradient(loss, x)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(squares(y, self(moved, training=True)))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def penalised(kind, micro_batch, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    model = kind(inputs, keras.layers.Dense(3)(keras.layers.Dense(5, activation="tanh")(inputs)))
    model.compile(keras.optimizers.SGD(0.01), **options)
    before = model.get_weights()
    x, y = data()
    if micro_batch is None:
        history = model.fit(x, y, batch_size=TARGET, epochs=2, shuffle=False, verbose=0)
    else:
        history = autobatch.fit(
            model, x, y, target_batch=TARGET, micro_batch=micro_batch, epochs=2, shuffle=False, verbose=0
        )
    moved = [(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)]
    return np.concatenate(moved), history.history["loss"]


# A sum and a mean together are not weighed where no graph tells them apart: run eagerly they are named.
OF_SAMPLES = [(kind, how) for kind in (Penalised, SummedPenalty, Adversarial) for how in ({}, {"jit_compile": True})]
OF_SAMPLES += [(kind, {"run_eagerly": True}) for kind in (Penalised, Adversarial)]


@pytest.mark.parametrize(("kind", "options"), OF_SAMPLES, ids=str)
def test_gradients_of_the_samples_themselves(kind, options):
    reference, expected = penalised(kind, None, **options)
    moved, losses = penalised(kind, 5, **options)
    assert apart(moved, reference) < 1e-5
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["sum", "vector", "masked mean", "dice of the batch", "root of the mean"])
def test_validation(name):
    def evaluated(micro_batch):
        model = build("compile", LOSSES[name])
        x, y = data()
        options = {"validation_data": (x[:21], y[:21]), "validation_batch_size": TARGET, "shuffle": False, "verbose": 0}
        if micro_batch is None:
            return model.fit(x, y, batch_size=TARGET, **options).history["val_loss"]
        return autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=micro_batch, **options).history["val_loss"]

    np.testing.assert_allclose(evaluated(5), evaluated(None), rtol=1e-5)


@pytest.mark.parametrize("name", ["sum", "vector", "masked mean", "sum and mean"])
def test_mixed_precision(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        loss_of = LOSSES[name]
        reference, _, _ = trained("compile", lambda y, p: loss_of(y, tf.cast(p, tf.float32)), None)
        moved, _, said = trained("compile", lambda y, p: loss_of(y, tf.cast(p, tf.float32)), 5)
    finally:
        keras.config.set_dtype_policy("float32")
    assert apart(moved, reference) < 2e-2  # 8 bits
    assert not said


@pytest.mark.parametrize("how", ["sample_weight", "class_weight"])
@pytest.mark.parametrize("name", ["mean", "sum", "root of the mean", "vector", "dice of the batch"])
def test_weights_beside_a_loss_that_makes_one_number(how, name):
    random = np.random.default_rng(3)
    x, y = data()
    y = (y > 0).astype("float32")
    if how == "class_weight":
        y, options = np.eye(3, dtype="float32")[np.argmax(y, -1)], {"class_weight": {0: 0.5, 1: 2.0, 2: 1.0}}
    else:
        options = {"sample_weight": random.random(len(x)).astype("float32") + 0.1}
    options |= {"shuffle": False, "verbose": 0, "epochs": 2}
    plain, ours = build("compile", LOSSES[name]), build("compile", LOSSES[name])
    before = plain.get_weights()
    expected = plain.fit(x, y, batch_size=TARGET, **options)
    history = autobatch.fit(ours, x, y, target_batch=TARGET, micro_batch=5, **options)
    moved, reference = (
        np.concatenate([(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)])
        for model in (ours, plain)
    )
    assert apart(moved, reference) < 1e-5
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-5)
    assert not history.report.warnings


def assert_exact_and_silent(build_model, x, y):
    """One epoch by plain Keras and by ours end alike, and nothing is said."""
    changes = []
    for micro_batch in (None, 5):
        keras.utils.set_random_seed(0)
        model = build_model()
        before = model.get_weights()
        if micro_batch is None:
            model.fit(x, y, batch_size=TARGET, shuffle=False, verbose=0)
        else:
            history = autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=micro_batch, shuffle=False, verbose=0)
            assert not history.report.warnings
        changes.append([(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)])
    assert apart(np.concatenate(changes[1]), np.concatenate(changes[0])) < 1e-5


def mean_of_positives(y, p):
    weight = tf.cast(y > 0, p.dtype)
    return tf.reduce_sum((y - p) ** 2 * weight) / tf.reduce_sum(weight)


@pytest.mark.parametrize("loss_of", [*(LOSSES[name] for name in ("mean", "sum", "vector")), mean_of_positives])
def test_a_mask_of_keras_beside_a_loss_of_ones_own(loss_of):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(45, 7, 4)).astype("float32"), random.normal(size=(45, 7, 3)).astype("float32")
    x[np.arange(7)[None] >= random.integers(2, 8, 45)[:, None]] = 0

    def build_model():
        stack = [keras.layers.Masking(), keras.layers.LSTM(5, return_sequences=True), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((7, 4)), *stack])
        model.compile(keras.optimizers.SGD(0.01), loss_of)
        return model

    assert_exact_and_silent(build_model, x, y)


@pytest.mark.parametrize("name", ["mean", "sum", "dice of the batch", *BESIDE_THE_BATCHS_OWN])
def test_images_through_a_transposed_convolution(name):
    random = np.random.default_rng(0)
    x = random.normal(size=(21, 8, 8, 1)).astype("float32")
    y = random.normal(size=(21, 8, 8, 1)).astype("float32")

    def build_model():
        down = keras.layers.Conv2D(3, 3, strides=2, padding="same", activation="tanh")
        up = keras.layers.Conv2DTranspose(1, 3, strides=2, padding="same")
        model = keras.Sequential([keras.Input((8, 8, 1)), down, up])
        model.compile(keras.optimizers.SGD(0.01), {**LOSSES, **BESIDE_THE_BATCHS_OWN}[name])
        return model

    assert_exact_and_silent(build_model, x, y)


def test_what_a_step_returns_is_the_batchs_whatever_it_is():
    def returned(loss, p):
        return {
            "positive": tf.reduce_sum(tf.cast(p > 0, tf.int32)),
            "size": tf.shape(p)[0],
            "largest": tf.reduce_max(p),
            "smallest": tf.reduce_min(p, 0),
            "any": tf.reduce_any(p > 1),
            "means": tf.reduce_mean(p, 0),
            "sums": tf.reduce_sum(p, 0),
            "root": tf.sqrt(loss),
            "rounded": tf.round(10 * loss),
        }

    _, expected = looped(LOSSES["mean"], None, returned)
    _, results = looped(LOSSES["mean"], 5, returned)
    for result, whole in zip(results, expected, strict=True):
        assert result.keys() == whole.keys()
        for name, value in whole.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_a_step_returns_that_cannot_be_merged_is_named():
    class Norms(keras.Model):
        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(squares(y, self(x, training=True)))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss, "norm": tf.linalg.global_norm(gradients)}

    inputs = keras.Input((6,))
    model = Norms(inputs, keras.layers.Dense(3)(inputs))
    model.compile(keras.optimizers.SGD(0.01))
    history = autobatch.fit(model, *data(), target_batch=TARGET, micro_batch=5, verbose=0)
    (said,) = history.report.warnings
    assert "What train_step returns as 'norm' may not be the full batch's" in said


def test_eager_code_whose_loss_depends_on_what_it_counts_is_named():
    class Alternating(keras.Model):
        def train_step(self, batch):
            x, y = batch
            self.turn = getattr(self, "turn", 0) + 1
            with tf.GradientTape() as tape:
                reduce = tf.reduce_sum if self.turn % 8 > 4 else tf.reduce_mean
                loss = reduce(squares(y, self(x, training=True)))
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    inputs = keras.Input((6,))
    model = Alternating(inputs, keras.layers.Dense(3)(inputs))
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    history = autobatch.fit(model, *data(), target_batch=TARGET, micro_batch=5, verbose=0)
    (said,) = [each for each in history.report.warnings if "is not known" in each]
    assert "counts in turn" in said


class Recomputing(keras.Model):
    """Forgets a layer's activations and computes them again in the backward pass, which asks a tape of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(3)
        self.first.build((None, 6))
        self.last.build((None, 5))
        self.recomputed = tf.recompute_grad(lambda x: self.first(x))

    def call(self, x):
        return self.last(self.recomputed(x))


@pytest.mark.parametrize("loss", ["mse", LOSSES["sum"], LOSSES["vector"], LOSSES["sum and mean"]])
def test_a_forward_pass_that_is_computed_again(loss):
    def build_model():
        model = Recomputing()
        model.compile(keras.optimizers.SGD(0.01), loss)
        model.build((None, 6))
        return model

    assert_exact_and_silent(build_model, *data())
