"""What is private in tf.data and in Keras's adapters is where it was: each of these fails loudly when it moves."""

import keras
import numpy as np
import optional
import pytest
import tensorflow as tf

from autobatch.data import cardinality, random_states
from autobatch.seams import data_adapters, tf_data


def test_the_names_of_what_datasets_do():
    source = tf.data.Dataset.range(4)
    made = {
        "Batch": source.batch(2),
        "ParallelBatch": source.batch(2, num_parallel_calls=2),
        "PaddedBatch": source.padded_batch(2),
        "Rebatch": source.batch(2).rebatch(3),
        "Map": source.map(lambda x: x),
        "ParallelMap": source.map(lambda x: x, num_parallel_calls=2),
        "Prefetch": source.prefetch(1),
        "Options": source.with_options(tf.data.Options()),
        "Cache": source.cache(),
        "Shuffle": source.shuffle(2),
        "Take": source.take(1),
        "Skip": source.skip(1),
        "Repeat": source.repeat(2),
        "Shard": source.shard(2, 0),
        "Concatenate": source.concatenate(source),
        "AssertCardinality": source.apply(tf.data.experimental.assert_cardinality(4)),
    }
    assert [tf_data.kind_of(dataset) for dataset in made.values()] == list(made)
    assert all(tf_data.inputs_of(dataset)[0] is source for name, dataset in made.items() if name != "Rebatch")


def test_the_arguments_of_datasets():
    source = tf.data.Dataset.range(4)
    assert tf_data.constant_of(source.batch(3), "_batch_size") == 3
    assert tf_data.constant_of(source.batch(3), "_drop_remainder") is False
    assert tf_data.constant_of(source.shuffle(5), "_buffer_size") == 5
    assert tf_data.constant_of(source.prefetch(6), "_buffer_size") == 6
    assert tf_data.constant_of(source.cache(), "_filename") in ("", b"")
    assert tf_data.constant_of(source.repeat(7), "_count") == 7
    shapes, values = tf_data.padding_of(source.padded_batch(2, padding_values=np.int64(9)))
    assert shapes is not None
    assert tf.get_static_value(values) == 9
    assert len(tf_data.tensors_in(tf.data.Dataset.from_tensor_slices((np.ones(3), np.ones(3))).batch(2))) == 2


def test_a_parallel_map_in_turn():
    source, options = tf.data.Dataset.range(4), tf.data.Options()
    options.deterministic = False
    parallel = source.map(lambda x: x + 1, num_parallel_calls=2)
    for dataset in (parallel, parallel.with_options(options)):
        in_turn = tf_data.mapped_in_turn(dataset)
        assert [int(each) for each in in_turn] == [1, 2, 3, 4]
        assert "ParallelMap" not in (tf_data.kind_of(in_turn), tf_data.kind_of(tf_data.inputs_of(in_turn)[0]))
        assert in_turn.options().deterministic is dataset.options().deterministic
    assert tf_data.mapped_in_turn(source) is source
    arrays = data_adapters.data_adapter_for(x=np.ones([4, 2]), y=np.arange(4), batch_size=2).get_tf_dataset()
    slices = tf_data.mapped_in_turn(tf_data.inputs_of(arrays)[0])
    assert (tf_data.kind_of(arrays), tf_data.kind_of(slices)) == ("Prefetch", "Options")
    assert tf_data.kind_of(cardinality.behind(slices, ("Options",))) == "Map"


@pytest.mark.parametrize("keep_order", [True, False])
def test_an_independent_copy(keep_order):
    made = tf.data.Dataset.range(20).shuffle(20, seed=3).cache().batch(20).prefetch(1)
    copied = tf_data.independent_copy(made, keep_order=keep_order, may_call_python=False)
    epochs = [next(iter(copied)).numpy().tolist() for _ in range(2)]
    original = next(iter(made)).numpy().tolist()
    assert original != sorted(original)
    assert (epochs[0] == original) is keep_order
    assert sorted(epochs[0]) == sorted(original)
    assert (epochs[1] == sorted(original)) is not keep_order


def test_what_is_too_large_to_copy_is_not_copied(monkeypatch):
    monkeypatch.setattr(tf_data, "_MOST_GRAPH_BYTES", 79)
    made = tf.data.Dataset.from_tensor_slices(np.ones(10))
    assert tf_data.independent_copy(made, keep_order=True, may_call_python=False) is None


def test_python_is_called_for_a_copy_only_where_it_may_be():
    source = tf.data.Dataset.from_generator(lambda: iter(range(3)), output_signature=tf.TensorSpec([], tf.int64))
    for made in (source, tf.data.Dataset.range(3).map(lambda v: tf.numpy_function(lambda n: n, [v], tf.int64))):
        assert tf_data.independent_copy(made, keep_order=True, may_call_python=False) is None
        copied = tf_data.independent_copy(made, keep_order=True, may_call_python=True)
        assert [int(value) for value in copied] == [0, 1, 2]


def test_the_adapters():
    array_adapter = data_adapters.data_adapter_for(x=np.ones((3, 2)), y=np.ones(3), batch_size=2)
    assert data_adapters.array_samples(array_adapter) == 3
    assert [part.shape for part in data_adapters.packed_arrays(array_adapter)] == [(3, 2), (3,)]
    dataset_adapter = data_adapters.data_adapter_for(x=tf.data.Dataset.range(3))
    assert data_adapters.is_dataset_adapter(dataset_adapter)
    assert not data_adapters.is_dataset_adapter(array_adapter)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return np.full((3, 1), index), np.zeros(3)

    data = Batches()
    adapter = data_adapters.data_adapter_for(x=data)
    adapter.get_tf_dataset()
    assert data_adapters.py_dataset_of(adapter) is data
    assert [spec.shape.rank for spec in data_adapters.signature_of(adapter)] == [2, 1]
    assert [int(x[0, 0]) for x, _ in data_adapters.batches_without_iterating(adapter)] == [0, 1]


def test_the_torch_adapter():
    torch = optional.torch()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(5, 2), torch.ones(5)), batch_size=2)
    adapter = data_adapters.data_adapter_for(x=loader)
    adapter.get_tf_dataset()
    assert data_adapters.torch_loader_of(adapter) is loader
    assert data_adapters.samples_of_loader(adapter, None) == (5, 5)
    assert len(data_adapters.signature_of(adapter)) == 2


def test_random_states_are_replayed_only_where_nobody_has_drawn():
    import random

    np.random.seed(8)  # another test may have left the seed that is set below
    before = random_states.RandomStates()
    drawn = random.random(), np.random.random()
    after = random_states.RandomStates()
    following = random.random(), np.random.random()
    before.restore()
    np.random.seed(5)
    seeded = np.random.get_state()[1].copy()
    after.replay(before)
    assert random.random() == following[0] != drawn[0]
    np.testing.assert_array_equal(np.random.get_state()[1], seeded)


def test_variables_and_what_a_cache_holds_are_found():
    generator = tf.random.Generator.from_seed(1)
    numbers = tf.data.Dataset.range(8)

    def drawn(number):
        return tf.cast(number, tf.float32) + generator.normal([])

    within = numbers.interleave(lambda number: tf.data.Dataset.range(number).map(drawn))
    for dataset in (numbers.map(drawn).batch(2), within, tf.data.Dataset.zip((numbers, numbers.map(drawn)))):
        assert tf_data.variables_in(dataset) == [generator.state]
    assert tf_data.variables_in(numbers.map(lambda number: number + 1)) == []
    for dataset in (
        numbers.shuffle(8, seed=1).cache().batch(2),
        numbers.map(drawn).cache(),
        numbers.map(lambda number: tf.random.uniform([], seed=1)).cache().shuffle(8),
        numbers.map(lambda number: tf.numpy_function(lambda given: given, [number], tf.int64)).cache(),
    ):
        assert tf_data.caches_what_is_drawn(dataset)
    for dataset in (numbers.cache().shuffle(8), numbers.map(lambda number: number + 1).cache(), numbers.map(drawn)):
        assert not tf_data.caches_what_is_drawn(dataset)


NUMBERS = tf.data.Dataset.range(30)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NUMBERS.shuffle(30, seed=2).batch(1),
        lambda: NUMBERS.shuffle(30, seed=2).map(lambda x: x).shuffle(8, seed=4).batch(1).prefetch(2),
        lambda: NUMBERS.shuffle(30, seed=2).shuffle(8, seed=4).shuffle(8, seed=5),
        lambda: tf.data.Dataset.zip((NUMBERS.shuffle(9, seed=1).shuffle(9, seed=3), NUMBERS.shuffle(30, seed=2))),
        lambda: NUMBERS.shuffle(30, seed=1).concatenate(NUMBERS.shuffle(9, seed=2).shuffle(30, seed=2)),
        lambda: NUMBERS.shuffle(30, seed=1).repeat(3),
        lambda: NUMBERS.shuffle(5, seed=1).shuffle(30, seed=1).repeat(2).shuffle(4, seed=2),
        lambda: NUMBERS.shuffle(30, seed=1).batch(3).filter(lambda x: x[0] > 2).unbatch().shuffle(5, seed=7),
        lambda: NUMBERS.shuffle(30, seed=2).window(3).flat_map(lambda window: window.batch(3)).shuffle(4, seed=3),
        lambda: (
            NUMBERS.shuffle(3, seed=1)
            .interleave(lambda i: NUMBERS.map(lambda x: x + i).shuffle(9, seed=5), cycle_length=2)
            .shuffle(9, seed=4)
        ),
        lambda: tf.data.Dataset.sample_from_datasets(
            [NUMBERS.shuffle(9, seed=3), NUMBERS.shuffle(9, seed=3).shuffle(30, seed=4)], seed=9
        ),
        lambda: NUMBERS.cache().shuffle(30, seed=4).map(lambda x: x, num_parallel_calls=2).shuffle(8, seed=4),
    ],
)
def test_a_pass_that_is_not_read_can_draw_as_one_that_was(make):
    def third(pass_over):
        tf.random.set_seed(3)
        dataset = make()
        for _ in range(2):
            pass_over(dataset)
        return [np.ravel(tf.nest.flatten(each)).tolist() for each in dataset.as_numpy_iterator()]

    def drawn(dataset):
        iter(dataset)
        tf_data.draw_as_if_read(dataset)

    assert third(drawn) == third(list)
