"""Effective batches, tails and validation batches are cut into micro-batches of even sizes, wherever they run."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import MemoryHog, arrays, relative_error
from put_back import putting_back

import autobatch
from autobatch.step.division import evenly, with_few_shapes

MODES = {"graph": {}, "eager": {"run_eagerly": True}, "XLA": {"jit_compile": True}}
REPLICAS = Path(__file__).parents[1] / "integration" / "even_replicas.py"
ROOM = 64

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")


def sizes_of(division, samples):
    """The sizes in turn, as the loop over them takes them."""
    sizes = []
    while sum(sizes) < samples:
        sizes.append(int(division.larger if sum(sizes) < division.larger_samples else division.smaller))
    return sizes


def test_as_few_as_can_be_none_too_large_and_no_two_further_apart_than_one():
    for samples in range(1, 130):
        for micro_batch in range(1, samples + 3):
            division = evenly(samples, micro_batch)
            sizes = sizes_of(division, samples)
            assert sum(sizes) == samples
            assert len(sizes) == -(-samples // micro_batch)
            assert sizes[0] == division.larger == max(sizes) <= micro_batch
            assert max(sizes) - min(sizes) <= 1
            assert tuple(sizes) == autobatch.Plan(micro_batch, len(sizes), samples).micro_batches


@pytest.mark.parametrize(("samples", "micro_batch"), [(16, 5), (17, 5), (256, 85), (256, 15), (3, 100), (1, 1)])
def test_tensors_are_divided_as_numbers_are(samples, micro_batch):
    division = evenly(tf.constant(samples, tf.int64), tf.constant(micro_batch, tf.int64))
    assert [int(part) for part in division] == list(evenly(samples, micro_batch))


def test_a_plan_of_several_replicas_tells_the_largest_share():
    assert autobatch.Plan(4, 3, 17, 2).micro_batches == (3, 3, 3)
    assert autobatch.Plan(4, 3, 21, 2).micro_batches == (4, 4, 3)


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [
        (101, [64, 37]),  # even ones would be 51 and 50, two shapes more
        (95, [48, 47]),  # 64 and 31: less than half
        (96, [48, 48]),  # one shape more, as with 64 and 32
        (128, [64, 64]),
        (50, [50]),
        (166, [64, 64, 38]),
        (150, [50, 50, 50]),
    ],
)
def test_a_tail_takes_the_compiled_size_and_a_remainder_where_that_saves_a_shape(samples, sizes):
    assert sizes_of(with_few_shapes(samples, 64, whole=256), samples) == sizes


def test_few_shapes_are_never_more_than_even_ones_nor_tiny_nor_too_large():
    for whole in (16, 17, 48, 100):
        for micro_batch in range(1, whole):
            compiled = set(sizes_of(evenly(whole, micro_batch), whole))
            assert with_few_shapes(whole, micro_batch, whole=whole) == evenly(whole, micro_batch)
            for samples in range(1, whole):
                even = sizes_of(evenly(samples, micro_batch), samples)
                few = sizes_of(with_few_shapes(samples, micro_batch, whole=whole), samples)
                assert len(few) == len(even)
                assert sum(few) == samples
                assert max(few) <= micro_batch
                assert 2 * min(few) >= max(few) or few == even
                assert len(set(few) - compiled) <= len(set(even) - compiled)


class Noting(layers.Layer):
    """Passes its inputs on, and keeps the size of each micro-batch, in training and in evaluation."""

    def build(self, shape):
        self.kept = {kind: tf.Variable(tf.zeros([ROOM], tf.int32), trainable=False) for kind in (True, False)}
        self.count = {kind: tf.Variable(0, trainable=False) for kind in (True, False)}

    def call(self, inputs, training=False):
        kept, count = self.kept[bool(training)], self.count[bool(training)]
        kept.scatter_nd_update([[count.read_value()]], tf.shape(inputs)[:1])
        count.assign_add(1)
        return inputs

    def forget(self):
        for count in self.count.values():
            count.assign(0)

    def sizes(self, *, training=True):
        return self.kept[training].numpy()[: int(self.count[training])].tolist()


def build(*extra, features=16, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((features,)), *extra, layers.Dense(4, activation="tanh"), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.3), loss, metrics=["accuracy"], **options)
    return model


CUTS = [
    (16, 8, [8, 8]),
    (17, 5, [5, 4, 4, 4]),
    (16, 5, [4, 4, 4, 4]),
    (48, 5, [5] * 8 + [4] * 2),
    (21, 5, [5, 4, 4, 4, 4]),
]


# Where sizes are plain numbers, and where few are to be compiled, these are enough: the functions have tests above.
CUTS_OF = {"graph": CUTS, "eager": CUTS[1:4], "XLA": CUTS[1:3]}


@functools.cache
def trained_by_keras(samples):
    """Weights and history of plain Keras, for an effective batch and a tail of 11."""
    x, y = arrays(samples=samples + 11)
    plain = build()
    expected = plain.fit(x, y, batch_size=samples, validation_data=(x[:13], y[:13]), **VALIDATED)
    return plain.get_weights(), expected.history


VALIDATED = {"shuffle": False, "verbose": 0, "validation_batch_size": 13}


@pytest.mark.parametrize("mode", MODES)
def test_an_effective_batch_its_tail_and_validation(mode):
    noting = Noting()
    ours = build(noting, **MODES[mode])
    put_back = putting_back(ours)
    for samples, micro_batch, sizes in CUTS_OF[mode]:
        put_back()
        noting.forget()
        x, y = arrays(samples=samples + 11)
        options = {"target_batch": samples, "micro_batch": micro_batch, "validation_data": (x[:13], y[:13])}
        history = autobatch.fit(ours, x, y, **options, **VALIDATED)
        weights, expected = trained_by_keras(samples)
        tail = sizes_of(evenly(11, micro_batch), 11)
        if mode == "XLA":
            tail = sizes_of(with_few_shapes(11, micro_batch, whole=samples), 11)
        assert noting.sizes() == [*sizes, *tail]
        assert noting.sizes(training=False) == sizes_of(evenly(13, micro_batch), 13)
        assert history.plan == autobatch.Plan(micro_batch, len(sizes), samples)
        assert list(history.plan.micro_batches) == sizes
        assert relative_error(ours.get_weights(), weights) < 1e-5
        for name, values in expected.items():
            np.testing.assert_allclose(history.history[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("compiled", "tail"), [(False, [13, 12]), (True, [16, 9])])
def test_under_xla_a_tail_saves_a_shape_where_it_can(compiled, tail):
    x, y = arrays(samples=32 + 25)
    noting = Noting()
    autobatch.fit(build(noting, jit_compile=compiled), x, y, target_batch=32, micro_batch=16, verbose=0, shuffle=False)
    assert noting.sizes() == [16, 16, *tail]


@pytest.mark.parametrize("eager", [False, True])
def test_denominators_are_counted_over_the_same_micro_batches(eager):
    passed = []

    class Noted(layers.Layer):
        supports_masking = True

        def call(self, inputs):
            note = tf.numpy_function(lambda n: (passed.append(int(n)), n)[1], [tf.shape(inputs)[0]], tf.int32)
            return inputs + 0.0 * tf.cast(tf.ensure_shape(note, []), tf.float32)

    def masked(*extra, **options):
        keras.utils.set_random_seed(1)
        embedding = layers.Embedding(11, 6, mask_zero=True)
        model = keras.Sequential([keras.Input((7,)), embedding, *extra, layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.5), loss, **options)
        return model

    random = np.random.default_rng(0)
    x, y = random.integers(0, 11, (16, 7)), random.integers(0, 3, (16, 7))
    ours, plain = masked(Noted(), run_eagerly=eager), masked()
    autobatch.fit(ours, x, y, target_batch=16, micro_batch=5, verbose=0)
    plain.fit(x, y, batch_size=16, verbose=0)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    assert set(passed) == {4}


def test_batch_normalization_keeps_the_statistics_of_even_batches():
    x = (np.random.default_rng(0).normal(size=(512, 6)) * 3).astype("float32")
    y = np.zeros(512, "int32")
    found = {}
    for name in ("ours", "plain"):
        norm = layers.BatchNormalization(momentum=0.5)
        model = build(norm, features=6)
        if name == "ours":
            autobatch.fit(model, x, y, target_batch=256, micro_batch=85, epochs=6, verbose=0, shuffle=False)
        else:
            model.fit(x, y, batch_size=256, epochs=6, verbose=0, shuffle=False)
        found[name] = norm.moving_variance.numpy()
    np.testing.assert_allclose(found["ours"], found["plain"], rtol=1e-5)
    assert np.mean(found["ours"] / x.var(0)) == pytest.approx(1, abs=0.01)


class Standardize(layers.Layer):
    """Divides by the unbiased deviation, which a single sample has none of."""

    def call(self, inputs):
        centred = inputs - tf.reduce_mean(inputs, 0)
        degrees = tf.cast(tf.shape(inputs)[0] - 1, tf.float32)
        return centred / tf.sqrt(tf.reduce_sum(centred**2, 0) / degrees + 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_an_unbiased_variance_is_a_number(mode):
    x, y = arrays()
    losses = []
    model = build(Standardize(), **MODES[mode])
    put_back = putting_back(model)
    for micro_batch in (5, 4):
        put_back()
        history = autobatch.fit(
            model,
            x,
            y,
            target_batch=16,
            micro_batch=micro_batch,
            verbose=0,
            shuffle=False,
            validation_data=(x[:16], y[:16]),
            validation_batch_size=16,
        )
        losses.append([*history.history["loss"], *history.history["val_loss"]])
    assert losses[0] == losses[1]  # 16 at 5 is four times 4
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_after_a_failure_sizes_are_even_again(mode):
    noted, most = [], {"now": 100}

    def too_many(samples):
        noted.append(samples)
        return samples > most["now"]

    class Shrink(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            noted.append("update")
            most["now"] = 5

    x, y = arrays(samples=2 * 16 + 9)
    ours, plain = build(MemoryHog(too_many), **MODES[mode]), build()
    history = autobatch.fit(ours, x, y, target_batch=16, micro_batch=7, verbose=0, shuffle=False, callbacks=[Shrink()])
    plain.fit(x, y, batch_size=16, verbose=0, shuffle=False)
    # 16 at 7 is 6 + 5 + 5. What ran out of memory was 6, not 7; three quarters of that is 4.
    assert [(each.micro_batch_before, each.micro_batch_after) for each in history.recoveries] == [(6, 4)]
    first = noted.index("update")
    after = [size for size in noted[first + 1 :] if size != "update"]
    assert (noted[first - 3 : first], after) == ([6, 5, 5], [6, 4, 4, 4, 4, 3, 3, 3])
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def test_the_size_that_failed_in_an_epochs_tail_is_the_one_that_was_run():
    limit = {"now": 100}

    class Tail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            limit["now"] = 4

    x, y = arrays(samples=16 + 9)
    model = build(MemoryHog(lambda samples: samples > limit["now"]))
    history = autobatch.fit(model, x, y, target_batch=16, micro_batch=8, verbose=0, shuffle=False, callbacks=[Tail()])
    # 9 at 8 is 5 + 4.
    assert [(each.micro_batch_before, each.micro_batch_after) for each in history.recoveries] == [(5, 3)]


def test_a_loop_of_ones_own_with_batches_of_several_sizes():
    noting = Noting()
    model = build(noting)
    loss_of, optimizer = model.loss, keras.optimizers.SGD(0.1)

    def train_step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=16, micro_batch=5)
    x, y = arrays()
    for samples in (16, 11, 7):
        step((x[:samples], y[:samples]))
    assert noting.sizes() == [4, 4, 4, 4, 4, 4, 3, 4, 3]


@pytest.mark.slow
def test_on_every_replica():
    done = subprocess.run([sys.executable, str(REPLICAS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # 20 at 4 on each of two is 10: 4 + 3 + 3. The tail of 17 is 8 and 9. The larger share takes 3 + 3 + 3, and the
    # smaller one as many.
    assert found["passed"] == [[4, 3, 3, 3, 3, 2], [4, 3, 3, 3, 3, 3]]
    assert found["masked"] == [[4, 3, 2], [4, 3]]
    assert found["validation"] == [[3, 3, 3], [4, 3, 3]]
    assert found["weights"] < 1e-5
    assert found["masked_weights"] < 1e-5
    # Out of memory in the tail, at 3 and not at 4; then 9 is five micro-batches on the second replica.
    assert found["recoveries"] == [[1, "train", 3, 2]]
    assert found["after"] == [2, 2, 2, 2, 1]
