"""The worst case among the samples seen fills every micro-batch of a trial; the data are left as they were."""

import numpy as np
import pytest
import tensorflow as tf
from models import arrays

from autobatch.data.effective_batches import EffectiveBatches
from autobatch.trial.worst_case import WorstCaseSample

X, Y = arrays(samples=10)
LENGTHS = [2, 1, 5, 3, 4, 9, 1, 0, 2, 3]  # the longest, number 5, is in the second effective batch of four
RAGGED = tf.RaggedTensor.from_row_lengths(tf.concat([tf.fill([n], i) for i, n in enumerate(LENGTHS)], 0), LENGTHS)
NUMBERS = np.arange(10)


def sample_of(*data, **options):
    return WorstCaseSample(EffectiveBatches(*data, target_batch=4, **{"shuffle": False, **options}))


@pytest.mark.parametrize("samples", [1, 3, 4, 11])
def test_fixed_shapes_repeat_the_first_effective_batch(samples):
    sample = sample_of(X, Y)
    assert sample.rows == 4
    x, y = sample.micro_batch(samples)
    np.testing.assert_array_equal(x, X[np.arange(samples) % 4])
    np.testing.assert_array_equal(y, Y[np.arange(samples) % 4])


@pytest.mark.parametrize("shuffle", [False, True])
def test_of_ragged_arrays_the_longest_of_all_is_repeated(shuffle):
    ragged, numbers = sample_of(RAGGED, NUMBERS, shuffle=shuffle).micro_batch(6)
    assert ragged.to_list() == [[5] * 9] * 6
    assert numbers.numpy().tolist() == [5] * 6


def test_of_a_ragged_dataset_the_longest_of_the_first_effective_batch_is_repeated():
    data = tf.data.Dataset.from_tensor_slices((RAGGED, NUMBERS)).batch(2)
    ragged, numbers = sample_of(data).micro_batch(3)
    assert ragged.to_list() == [[2] * 5] * 3
    assert numbers.numpy().tolist() == [2] * 3


def test_several_parts_of_varying_size_stay_together():
    lengths = [10, 1, 8, 1, 1, 3, 1, 1, 1, 1]  # number 2 has 13 in all, number 0 and number 5 have 12
    other = tf.RaggedTensor.from_row_lengths(tf.zeros([sum(lengths)]), lengths)
    first, second = sample_of((RAGGED, other), NUMBERS).micro_batch(2)[0]
    assert first.to_list() == [[2] * 5] * 2
    assert second.row_lengths().numpy().tolist() == [8, 8]


def test_deeper_ragged_tensors_count_all_that_is_in_them():
    deep = tf.ragged.constant([[[1], [2], [3]], [[4] * 9], [[5, 6]]])
    assert sample_of(deep).micro_batch(1).to_list() == [[[4] * 9]]


def test_sparse_samples_count_what_is_there():
    pytest.importorskip("scipy")
    from scipy import sparse

    dense = np.zeros((10, 6), "float32")
    dense[7] = 1
    dense[1, 2] = 1
    for data in (tf.sparse.from_dense(dense), sparse.csr_matrix(dense)):
        x, y = sample_of(data, NUMBERS).micro_batch(3)
        np.testing.assert_array_equal(tf.sparse.to_dense(x), np.ones((3, 6)))
        assert y.numpy().tolist() == [7] * 3
    dataset = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(dense), NUMBERS)).batch(3)
    assert sample_of(dataset).micro_batch(2)[1].numpy().tolist() == [1, 1]


def test_strings_count_their_characters():
    words = [["a"], ["bbb"], ["cc"], ["d"], ["eeeeee"]]
    assert sample_of(tf.constant(words)).micro_batch(2).numpy().tolist() == [[b"eeeeee"]] * 2
    assert (
        sample_of(np.array([word for (word,) in words], dtype=object)).micro_batch(2).numpy().tolist()
        == [b"eeeeee"] * 2
    )
    first_four = tf.data.Dataset.from_tensor_slices(words).batch(5)
    assert sample_of(first_four).micro_batch(2).numpy().tolist() == [[b"bbb"]] * 2


def test_a_generator_yields_to_training_what_was_looked_at():
    read = []

    def generator():
        for start in range(0, 10, 3):
            read.append(start)
            yield X[start : start + 3], Y[start : start + 3]

    batches = EffectiveBatches(generator(), target_batch=4)
    assert WorstCaseSample(batches).rows == 4
    trained = np.concatenate([x.numpy() for x, _ in batches])
    np.testing.assert_array_equal(trained, X)
    assert read == [0, 3, 6, 9]


def test_a_cache_is_neither_filled_nor_spoilt():
    data = tf.data.Dataset.range(10).map(lambda i: (tf.fill([2], i), tf.random.uniform([]))).cache().batch(2)
    batches = EffectiveBatches(data, target_batch=4)
    looked = WorstCaseSample(batches).micro_batch(4)
    first, second = [[(x.numpy().tolist(), y.numpy().tolist()) for x, y in batches] for _ in range(2)]
    assert first == second
    assert next(x for x, _ in first) == looked[0].numpy().tolist()


def test_no_data():
    with pytest.raises(ValueError, match="dataset is empty"):
        sample_of(tf.data.Dataset.range(4).filter(lambda x: x > 9).batch(2))
