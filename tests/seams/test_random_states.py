"""The private names behind TensorFlow's random states are where autobatch looks for them."""

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops

from autobatch.seams import data_adapters, random_states


def test_seeds_of_operations_go_on_where_they_were():
    keras.utils.set_random_seed(5)
    tf.random.uniform([2])
    state = random_states.eager_seeds()
    assert state["seed"] == 5
    following = [tf.random.uniform([2]).numpy() for _ in range(2)]
    tf.random.set_seed(6)
    random_states.continue_eager_seeds(state)
    assert context.global_seed() == 5
    assert np.array_equal([tf.random.uniform([2]).numpy() for _ in range(2)], following)


def test_the_global_generator_is_seen_once_there_is_one():
    tf.random.get_global_generator()
    assert random_states.global_generator_variables() == [stateful_random_ops.global_generator.state]


def test_shuffles_of_arrays_follow_a_variable():
    seed = tf.Variable(1, dtype=tf.int64, trainable=False)
    x = np.arange(30)

    def order(dataset):
        return np.concatenate([batch[0].numpy() for batch in dataset]).tolist()

    for shuffle in (True, "batch"):
        with random_states.shuffles_seeded_by(seed):
            adapter = data_adapters.data_adapter_for(x=x, y=x, batch_size=10, shuffle=shuffle)
            dataset = adapter.get_tf_dataset()
        orders = []
        for value in (1, 2, 1):
            seed.assign(value)
            orders.append(order(dataset))
        assert orders[0] == orders[2] != orders[1]
        assert sorted(orders[1]) == x.tolist()
    parts = [[number % 10 for number in orders[0][start : start + 10]] for start in (0, 10, 20)]
    assert parts[0] != parts[1], "batches that are shuffled apart have orders of their own"


def test_a_dataset_without_a_seed_is_told_by_what_draws():
    from autobatch.seams import tf_data

    numbers = tf.data.Dataset.range(20)

    def drawing(number):
        return number + tf.random.uniform([], maxval=3, dtype=tf.int64)

    tf.random.set_seed(1)
    seeded = numbers.shuffle(5).map(drawing)
    before, context.context()._seed = context.context()._seed, None
    try:
        assert tf_data.draws_without_seed(numbers.shuffle(5).batch(2).prefetch(1)) == ["shuffle"]
        assert tf_data.draws_without_seed(numbers.map(drawing)) == ["RandomUniformInt"]
        nested = numbers.interleave(lambda _: tf.data.Dataset.range(3).shuffle(2))
        assert tf_data.draws_without_seed(nested) == ["shuffle"]
        assert tf_data.draws_without_seed(numbers.shuffle(5, seed=3)) == []
        assert tf_data.draws_without_seed(seeded) == []
    finally:
        context.context()._seed = before
