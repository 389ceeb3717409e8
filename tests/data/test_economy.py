"""Economy with host memory: the same batches in the same order, from less that is held at a time."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from autobatch.data import arrays, economy, fit_data, host_memory
from autobatch.seams import tf_data

SAMPLES = 300
X = np.random.default_rng(0).normal(size=(SAMPLES, 1000))
Y = np.arange(SAMPLES)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 30

    def __getitem__(self, index):
        return X[10 * index : 10 * index + 10, :4].astype("float32"), Y[10 * index : 10 * index + 10]


def dataset():
    made = tf.data.Dataset.from_tensor_slices((X[:, :3], Y)).shuffle(50, seed=4)
    return made.map(lambda x, y: (2 * x, y), num_parallel_calls=tf.data.AUTOTUNE).batch(7).prefetch(tf.data.AUTOTUNE)


def padded():
    made = tf.data.Dataset.range(1, SAMPLES).map(lambda size: (tf.ones([size % 5 + 1]), size))
    return made.padded_batch(4).map(lambda x, y: (x, y))


KINDS = {
    "arrays": lambda: ((X, Y), {"sample_weight": np.linspace(0, 1, SAMPLES)}),
    "arrays split": lambda: ((X, Y), {"validation_split": 0.25}),
    "arrays in order": lambda: ((X.astype("float16"), None), {"shuffle": False}),
    "class weights": lambda: ((X, Y % 2), {"class_weight": {0: 1.0, 1: 2.0}}),
    "dataset": lambda: ((dataset(), None), {}),
    "padded": lambda: ((padded(), None), {}),
    "PyDataset": lambda: ((Batches(), None), {"shuffle": False}),
    "threads": lambda: ((Batches(workers=4, max_queue_size=8), None), {"shuffle": False}),
}


def model():
    return keras.Sequential([keras.layers.Dense(1)])


def read(kind, level):
    keras.utils.set_random_seed(5)
    (x, y), options = KINDS[kind]()
    with economy.economising(level):
        batches, _ = fit_data.prepare_data(model(), x, y, target_batch=64, options=options)
        found = [tf.nest.flatten(batch) for _ in range(2) for batch in batches]
    return [[np.asarray(leaf) for leaf in batch if leaf is not None] for batch in found]


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_reads_the_same(kind):
    plain = read(kind, 0)
    assert len(plain) >= 8
    for level in (1, 2):
        spared = read(kind, level)
        for one, other in zip(plain, spared, strict=True):
            assert len(one) == len(other)
            for leaf, same in zip(one, other, strict=True):
                assert leaf.dtype == same.dtype
                np.testing.assert_array_equal(leaf, same)


@pytest.mark.parametrize("limit", [2**26, 2**21, 2**14])
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_arena_reads_the_same(kind, limit, monkeypatch):
    plain = read(kind, 0)
    monkeypatch.setattr(economy.arena, "arena_limit_bytes", lambda device: limit)
    for one, other in zip(plain, read(kind, 0), strict=True):
        for leaf, same in zip(one, other, strict=True):
            assert leaf.dtype == same.dtype
            np.testing.assert_array_equal(leaf, same)


@pytest.mark.parametrize(("limit", "ahead"), [(None, 2), (2**40, 0)])
def test_nothing_is_made_ahead_in_an_arena(limit, ahead, monkeypatch):
    monkeypatch.setattr(economy.arena, "arena_limit_bytes", lambda device: limit)
    assert economy.batches_ahead() == ahead
    with economy.economising(1):
        assert economy.batches_ahead() == min(ahead, 1)


def kinds_in(dataset):
    """The kinds of datasets that run beside a step, from the end on."""
    found = [tf_data.kind_of(dataset)] if tf_data.constant_of(dataset, "_buffer_size") != 0 else []
    return found + [kind for source in tf_data.inputs_of(dataset)[:1] for kind in kinds_in(source)]


@pytest.mark.parametrize("rows", [SAMPLES, 4])
@pytest.mark.parametrize("limit", [None, 2**40, 8 * SAMPLES])
def test_slices_of_arrays_are_cut_in_turn_in_an_arena(limit, rows, monkeypatch):
    """The last arena is too small for a copy of the array."""
    monkeypatch.setattr(economy.arena, "arena_limit_bytes", lambda device: limit)
    adapter = arrays.adapter_for(X[:rows], Y[:rows], None, are_arrays=True, batch_size=8, shuffle=False)
    slices, ahead = economy.slices_ahead(adapter.get_tf_dataset())
    assert bool({"ParallelMap", "Prefetch"} & set(kinds_in(slices)[:5])) is (limit is None)
    assert (ahead == 0) is (limit is not None)
    options = slices.options().experimental_optimization
    assert (options.map_parallelization, options.inject_prefetch) == ((None, None) if limit is None else (False, False))
    for first, (x, y) in zip(range(0, rows, 8), slices, strict=True):
        np.testing.assert_array_equal(x, X[:rows][first : first + 8].astype("float32"))
        np.testing.assert_array_equal(y, Y[:rows][first : first + 8])


def test_an_array_that_would_fill_an_arena_is_not_copied(monkeypatch):
    for limit, spared in ((10 * X.nbytes, False), (10 * X.nbytes - 10, True), (None, False)):
        monkeypatch.setattr(economy.arena, "arena_limit_bytes", lambda device, limit=limit: limit)
        assert economy.spares_copy_of(X) is spared
        assert (host_memory.uses_of_arrays(X, None, None) == ()) is spared


def test_arrays_are_not_copied():
    with economy.economising(1):
        assert host_memory.uses_of_arrays(X, None, None) == ()
        adapter = arrays.adapter_for(X, Y, None, are_arrays=True, batch_size=8, shuffle=True)
        assert isinstance(adapter, arrays.MappedArrays)
    assert host_memory.uses_of_arrays(X, None, None) != ()


@pytest.mark.parametrize(("level", "workers", "queue"), [(0, 8, 10), (1, 4, 2), (2, 2, 1)])
def test_a_py_dataset_has_fewer_workers_until_the_economy_ends(level, workers, queue):
    loader = Batches(workers=8, max_queue_size=10)
    with economy.economising(level):
        economy.lessen_loader(loader)
        assert (loader.workers, loader.max_queue_size) == (workers, queue)
    assert (loader.workers, loader.max_queue_size) == (8, 10)


@pytest.mark.parametrize("least", [{"workers": 1}, {"workers": 2}, {"workers": 1, "use_multiprocessing": True}])
def test_the_fewest_workers_stay(least):
    loader = Batches(**least)
    with economy.economising(3):
        economy.lessen_loader(loader)
        assert loader.workers == least["workers"]


def test_queues_whose_length_tf_data_chooses_are_bounded():
    with economy.economising(1):
        first = economy.prefetched(dataset()).options().autotune.ram_budget
    with economy.economising(2):
        options = economy.prefetched(dataset()).options()
    assert 0 < options.autotune.ram_budget < first
    assert options.threading.private_threadpool_size == 1
    assert economy.prefetched(dataset()).options().autotune.ram_budget is None
