"""Samples of varying length: short effective batches take larger micro-batches, long ones smaller; all are exact."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import relative_error

import autobatch
from autobatch.records import MemoryModel
from autobatch.recovery.sample_lengths import LengthRule
from autobatch.tensors.batch_structure import Structure

TARGET = 24
MOST_ELEMENTS = 100
FIRST = 10  # the length of the samples that the search sees: 8 of them are the most of 24 / k that fit


class Holding(layers.Layer):
    """Notes (samples, length) of what passes it, and really runs out of memory for more elements than ``most``."""

    def __init__(self, most):
        super().__init__()
        self.most = most
        self.passed = []

    def call(self, inputs):
        def size_of(shape):
            samples, length = (int(n) for n in shape)
            if samples * length > self.most(samples, length):
                return np.int64(1 << 44)
            self.passed.append((samples, length))
            return np.int64(1)

        size = tf.numpy_function(size_of, [tf.shape(inputs)], tf.int64)
        return inputs + tf.cast(0.0 * tf.random.normal(tf.reshape(size, [1]))[0], inputs.dtype)


class Watching(keras.callbacks.Callback):
    """Forgets what the search ran; at each update's end, takes what passed in it."""

    def __init__(self):
        super().__init__()
        self.updates = []

    def on_train_begin(self, logs=None):
        self.model.layers[0].passed.clear()

    def on_train_batch_end(self, batch, logs=None):
        self.updates.append(list(self.model.layers[0].passed))
        self.model.layers[0].passed.clear()


def build(most=lambda samples, length: MOST_ELEMENTS, **options):
    keras.utils.set_random_seed(1)
    stack = [layers.Embedding(50, 4), layers.Conv1D(4, 1), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    model = keras.Sequential([keras.Input((None,), dtype="int32"), Holding(most), *stack])
    model.compile(
        keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=[], **options
    )
    return model


def padded(lengths):
    """One effective batch of each length, as ``padded_batch`` makes them."""
    random = np.random.default_rng(0)

    def samples():
        for length in lengths:
            for row in range(TARGET):
                own = length if row == 0 else random.integers(1, length + 1)
                yield random.integers(1, 50, own).astype("int32"), np.int64(random.integers(0, 3))

    signature = (tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int64))
    kept = list(samples())
    dataset = tf.data.Dataset.from_generator(lambda: iter(kept), output_signature=signature)
    return dataset.padded_batch(TARGET, ([None], []))


def both(lengths, most=lambda samples, length: MOST_ELEMENTS, **options):
    """Train plainly and by autobatch; return its History and, for each update, the micro-batches that passed."""
    data = padded(lengths)
    plain, ours = build(lambda samples, length: 10**9), build(most, **options)
    expected = plain.fit(data, verbose=0)
    watching = Watching()
    history = autobatch.fit(ours, data, target_batch=TARGET, verbose=0, callbacks=[watching])
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-5)
    assert [sum(samples for samples, _ in update) for update in watching.updates] == [TARGET] * len(lengths)
    return history, watching.updates


def test_a_micro_batch_holds_as_many_elements_whatever_their_length():
    history, updates = both([FIRST, 5, 2, 20, FIRST])
    tried = history.plan.micro_batch
    assert tried <= 8
    assert history.recoveries == ()  # a long one is met with fewer samples, not with a failure
    assert [update[0] for update in updates[::4]] == [(tried, FIRST)] * 2
    for update, length in zip(updates, [FIRST, 5, 2, 20, FIRST], strict=True):
        assert max(samples * length for samples, length in update) <= tried * FIRST
        assert len(update) == -(-TARGET // max(1, tried * FIRST // length))


def test_what_does_not_shrink_with_the_length_is_rolled_back_and_tried_less_boldly():
    history, updates = both([FIRST, 2, 2, 2], most=lambda samples, length: MOST_ELEMENTS if samples <= 8 else 0)
    assert {samples for update in updates for samples, _ in update} <= set(range(1, 9))
    assert history.recoveries
    assert {recovery.update for recovery in history.recoveries} == {1}  # after that it knows
    assert history.recoveries[-1].micro_batch_after >= history.plan.micro_batch


def test_a_long_one_that_fails_all_the_same_shrinks_further():
    history, updates = both([FIRST, 20, 20], most=lambda samples, length: 30 if length > FIRST else MOST_ELEMENTS)
    sizes = [(recovery.micro_batch_before, recovery.micro_batch_after) for recovery in history.recoveries]
    assert all(after < before for before, after in sizes)
    assert {samples for update in updates[1:] for samples, _ in update} == {1}


def test_ragged_samples_go_by_the_longest_of_each_effective_batch():
    random = np.random.default_rng(0)
    lengths = [FIRST] + [3] * (TARGET - 1) + [2] * TARGET
    x = tf.ragged.constant([random.integers(1, 50, length).tolist() for length in lengths], dtype=tf.int32)
    data = tf.data.Dataset.from_tensor_slices((x, random.integers(0, 3, 2 * TARGET))).batch(TARGET)

    class Pad(layers.Layer):
        def call(self, inputs):
            return inputs.to_tensor()

    holding = Holding(lambda samples, length: MOST_ELEMENTS)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.stack = keras.Sequential([layers.Embedding(50, 4), layers.GlobalAveragePooling1D(), layers.Dense(3)])

        def call(self, inputs):
            return self.stack(holding(inputs.to_tensor()))

    model = Model()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    epochs = []

    class Mark(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            holding.passed.clear()

        def on_train_batch_end(self, batch, logs=None):
            epochs.append(list(holding.passed))
            holding.passed.clear()

    history = autobatch.fit(model, data, target_batch=TARGET, verbose=0, callbacks=[Mark()])
    assert history.recoveries == ()
    assert len(epochs[0]) == history.plan.accumulation_steps > len(epochs[1])


def rule(*, peak_bytes=None, budget_bytes=None, specs=((None, None),), dtype=tf.float32):
    structure = Structure([tf.TensorSpec(spec, dtype) for spec in specs])
    tried = [tf.zeros([8, *(10 if size is None else size for size in spec[1:])], dtype) for spec in specs]
    model = MemoryModel(fixed_bytes=200, per_sample_bytes=50)
    return LengthRule(
        structure, tried, peak_bytes=peak_bytes, micro_batch=8, memory_model=model, budget_bytes=budget_bytes
    )


@pytest.mark.parametrize(
    ("ratio", "budget_bytes", "expected"),
    [
        (2.0, 10_000, 8),  # 200 + 8 * 50 * 4 is 1800: there is room for all of it
        (2.0, 1400, 6),  # 200 + 6 * 200
        (2.0, 600, 2),
        (9.0, 600, 1),  # one sample is always tried
        (2.0, None, 4),  # no figures: in proportion
        (0.5, 600, 16),
        (0.4, 600, 20),
        (1.0, 600, 8),
    ],
)
def test_a_longer_batch_uses_the_room_that_there_is(ratio, budget_bytes, expected):
    assert rule(peak_bytes=600, budget_bytes=budget_bytes).sized(8, ratio, 1000) == expected


def test_steps_are_evened_out_and_no_more_samples_are_taken_than_there_are():
    assert rule().sized(8, 0.5, 30) == 15
    assert rule().sized(8, 0.01, 30) == 30
    assert rule().sized(8, 0.5, 5) == 8


def test_the_leaf_that_grew_most_decides():
    found = rule(specs=((None, None), (None, 7), (None, None, 3)))
    assert found.ratio([tf.zeros([4, 5]), tf.zeros([4, 7]), tf.zeros([4, 30, 3])]) == 3.0
    assert rule(specs=((None, 7),)).ratio([tf.zeros([4, 7])]) == 1.0


def test_strings_are_left_as_they_are():
    assert rule(specs=((None, None),), dtype=tf.string).ratio([tf.fill([4, 3], "a")]) == 1.0
