"""Gradients of large embeddings are kept as rows: less memory, and to the optimizer what plain Keras hands to it."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import AtCall, MemoryHog, relative_error

import autobatch
from autobatch.step.accumulated_step import AccumulatedStep
from autobatch.tensors.variables import bytes_of

ROWS = 3000
TOKENS = 6
SAMPLES = 40
TARGET = 32


def data(seed=0, samples=SAMPLES):
    random = np.random.default_rng(seed)
    return random.integers(-5, 12, (samples, TOKENS)).astype("int32"), random.integers(0, 3, samples)


def stacked(inputs, table):
    return layers.GlobalAveragePooling1D()(table(inputs))


def sliced_and_shared(inputs, table):
    columns = [table(keras.ops.maximum(inputs[:, :2], 0)), table(inputs[:, 2:] + np.arange(4, dtype="int32") * 20)]
    return layers.Flatten()(layers.Concatenate(axis=1)(columns))


def shared(inputs, table):
    first = layers.GlobalAveragePooling1D()(table(inputs))
    return layers.Concatenate()([first, layers.Flatten()(table(inputs[:, 1:3] + 7))])


def built(optimizer, use=stacked, extra=(), rows=ROWS, **options):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((TOKENS,), dtype="int32")
    hidden = use(inputs, layers.Embedding(rows, 4))
    for layer in extra:
        hidden = layer(hidden)
    model = keras.Model(inputs, layers.Dense(3)(hidden))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def both(build, micro_batch=13):
    """Train plainly, eagerly, and by autobatch; the same weights and History. Returns what was warned of."""
    x, y = data()
    plain, ours = build(), build()
    plain.run_eagerly = True
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    expected = plain.fit(x, y, batch_size=TARGET, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        actual = autobatch.fit(ours, x, y, target_batch=TARGET, micro_batch=micro_batch, **options)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    for name, values in expected.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    return " ".join(str(warning.message) for warning in said)


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.3, momentum=0.9, clipnorm=0.02),
    "clipped": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3, global_clipnorm=0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.3)),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_repeated_rows_reach_the_optimizer_as_in_plain_keras(name):
    said = both(lambda: built(OPTIMIZERS[name]()))
    assert "summed before" not in said  # there is nothing to be said: nothing differs


@pytest.mark.parametrize("use", [sliced_and_shared, shared])
def test_one_table_used_more_than_once(use):
    assert "summed before" not in both(lambda: built(keras.optimizers.Adam(0.01, epsilon=1e-3), use))


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        x, y = data()
        plain, ours = built("sgd"), built("sgd")
    finally:
        keras.config.set_dtype_policy("float32")
    plain.fit(x, y, batch_size=TARGET, shuffle=False, verbose=0)
    autobatch.fit(ours, x, y, target_batch=TARGET, micro_batch=13, shuffle=False, verbose=0)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-2


def test_running_out_of_memory_in_the_middle_leaves_no_rows_behind():
    def build(too_many):
        return built(keras.optimizers.Adam(0.01, epsilon=1e-3), extra=[MemoryHog(too_many)])

    plain, ours = build(lambda samples: False), build(AtCall(1, 6))
    plain.run_eagerly = True
    x, y = data()
    plain.fit(x, y, batch_size=TARGET, shuffle=False, verbose=0, epochs=2)
    history = autobatch.fit(ours, x, y, target_batch=TARGET, micro_batch=13, shuffle=False, verbose=0, epochs=2)
    assert len(history.recoveries) == 2
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def step_of(model, x, y, **options):
    dataset = tf.data.Dataset.from_tensors((x, y))
    step = AccumulatedStep(model, dataset.element_spec, **options)
    step.accumulate(next(iter(dataset)), 8)
    step.apply()
    return step


def held_bytes(step):
    rows = step._sums.row_variables
    return bytes_of(step.accumulators) + sum(variable.dtype.size * int(tf.size(variable)) for variable in rows)


def test_a_buffer_takes_what_an_effective_batch_needs_and_gives_it_back():
    model = built("sgd")
    dense_bytes = bytes_of(model.trainable_variables)
    assert held_bytes(step_of(model, *data(), effective_batch=None)) == dense_bytes
    step = step_of(model, *data(), effective_batch=SAMPLES)
    assert [table.shape[0] for table in step.tables_kept_as_rows] == [ROWS]
    table_bytes = ROWS * 4 * 4
    assert held_bytes(step) == dense_bytes - table_bytes + (SAMPLES + 1) * TOKENS * (4 * 4 + 8) + 8
    assert held_bytes(step) < dense_bytes / 2
    rows = step._sums.row_variables
    assert rows
    step.release_accumulators()
    assert all(int(tf.size(variable)) <= 1 for variable in rows)
    assert step.tables_kept_as_rows == []


class Tied(keras.Model):
    """The table's transpose makes the logits: its gradient is dense."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(ROWS, 4)
        self.table.build()

    def call(self, inputs):
        hidden = keras.ops.mean(self.table(inputs), axis=1)
        return keras.ops.matmul(hidden, keras.ops.transpose(self.table.embeddings))


def test_where_the_gradient_is_dense_or_rows_cannot_be_counted_the_accumulator_is_dense():
    x, y = data()
    model = Tied()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.build((None, TOKENS))
    assert step_of(model, x, y, effective_batch=SAMPLES).tables_kept_as_rows == []
    hashed = built("sgd", lambda inputs, table: stacked(inputs // 2, table))
    assert step_of(hashed, x, y, effective_batch=SAMPLES).tables_kept_as_rows == []
    small = built("sgd", rows=SAMPLES * TOKENS)
    assert step_of(small, x, y, effective_batch=SAMPLES).tables_kept_as_rows == []

    def build():
        keras.utils.set_random_seed(1)
        model = Tied()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.build((None, TOKENS))
        return model

    both(build)


def test_more_samples_than_was_said():
    model, plain = built("sgd"), built("sgd")
    x, y = data()
    step = step_of(model, x[:20], y[:20], effective_batch=20)
    assert len(step.tables_kept_as_rows) == 1
    step.accumulate((tf.constant(x), tf.constant(y)), 8)
    step.apply()
    assert step.tables_kept_as_rows == []
    plain.run_eagerly = True
    plain.fit(x[:20], y[:20], batch_size=20, shuffle=False, verbose=0)
    plain.fit(x, y, batch_size=SAMPLES, shuffle=False, verbose=0)
    assert relative_error(model.get_weights(), plain.get_weights()) < 1e-5
