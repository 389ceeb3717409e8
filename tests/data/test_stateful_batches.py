"""Batches whose iterators tell their state, by a loader like Grain's; Grain itself is tested where it is installed."""

import numpy as np
import pytest
import tensorflow as tf

from autobatch.backup.packing import from_bytes, to_bytes
from autobatch.data import stateful_batches
from autobatch.data.random_states import RandomStates
from autobatch.data.stateful_batches import StatefulBatches, as_plain, from_plain

SIZES = (4, 4, 3, 4, 4, 2)


class Loader:
    """Numbers in batches of :data:`SIZES`; it notes which batches were made."""

    def __init__(self, refuses=False, keeps=int):
        self.made, self.refuses, self.keeps = [], refuses, keeps

    def __iter__(self):
        return LoaderIterator(self)


class LoaderIterator:
    def __init__(self, loader):
        self._loader, self._next = loader, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._next == len(SIZES):
            raise StopIteration
        self._loader.made.append(self._next)
        start = sum(SIZES[: self._next])
        self._next += 1
        return np.arange(start, start + SIZES[self._next - 1])

    def get_state(self):
        return {"next": self._loader.keeps(self._next)}

    def set_state(self, state):
        if self._loader.refuses:
            raise ValueError("another source")
        self._next = state["next"]


class Adapter:
    """What Keras's adapters do: a dataset of a generator, found by its public name."""

    def __init__(self, loader):
        self._loader = loader

    def get_tf_dataset(self):
        return tf.data.Dataset.from_generator(lambda: self._loader, output_signature=tf.TensorSpec([None], tf.int64))


def batches_of(loader, place=None):
    batches = StatefulBatches(Adapter(loader), stateful_batches._GrainIterators(), target_batch=5)
    dataset = batches.dataset()
    if place is not None:
        batches.continue_from(place, RandomStates().as_plain())
    return batches, iter(dataset)


def numbers(iterator):
    return [batch.numpy().tolist() for batch in iterator]


@pytest.mark.parametrize(
    ("rows", "batches", "gone"), [(0, 0, 0), (4, 1, 0), (9, 2, 1), (11, 3, 0), (18, 4, 3), (21, 6, 0)]
)
@pytest.mark.parametrize("refuses", [False, True])
def test_a_pass_goes_on_from_the_state_behind_a_batch(rows, batches, gone, refuses):
    first, iterator = batches_of(Loader())
    whole = np.concatenate(numbers(iterator))
    place = first.place_behind(rows)
    if rows == 0:
        assert place is None  # nothing is behind it
        return
    place = from_bytes(to_bytes(place))
    assert (place["batches"], place["rows"]) == (batches, gone)
    loader = Loader(refuses)
    _, iterator = batches_of(loader, place)
    assert np.concatenate([[], *numbers(iterator)]).tolist() == whole[rows:].tolist()
    assert loader.made == list(range(0 if refuses else batches, len(SIZES)))


def test_a_place_in_a_pass_that_was_gone_on_with():
    first, iterator = batches_of(Loader())
    numbers(iterator)
    second, iterator = batches_of(Loader(), first.place_behind(4))
    next(iterator)
    assert second.place_behind(4)["own"] == first.place_behind(4)["own"]  # nothing of it was trained on yet
    next(iterator)
    loader = Loader()
    _, iterator = batches_of(loader, second.place_behind(9))
    assert numbers(iterator)[0] == [9, 10]
    assert loader.made == [2, 3, 4, 5]


def test_a_state_that_cannot_be_kept_is_no_place():
    first, iterator = batches_of(Loader(keeps=lambda number: object()))
    numbers(iterator)
    assert first.place_behind(4) is None


def test_states_far_behind_are_dropped():
    batches, iterator = batches_of(Loader())
    batches._reach_rows = 5
    numbers(iterator)
    assert sorted(batches._states) == [4, 5, 6]
    assert batches.place_behind(4) is None


@pytest.mark.parametrize(
    "state",
    [
        {"next_index": 5},
        {1: {"a": (1, 2.5, None)}, "b": [True, "text", {}]},
        b'{"version": 2}',
        [],
        (),
        float("inf"),
        {"list": ["dict", []]},
    ],
    ids=str,
)
def test_a_state_comes_back_as_it_was(state):
    again = from_plain(from_bytes(to_bytes(as_plain(state))))
    assert again == state
    assert type(again) is type(state)


def test_arrays_in_a_state_come_back():
    state = {"generator": np.arange(3, dtype=np.uint32), "number": np.int64(4)}
    again = from_plain(from_bytes(to_bytes(as_plain(state))))
    np.testing.assert_array_equal(again["generator"], state["generator"])
    assert again["generator"].dtype == np.uint32
    assert again["number"] == 4


def test_other_generators_are_left_as_they_are():
    batches_of(Loader())
    spec = tf.TensorSpec([], tf.int64)
    assert [int(number) for number in tf.data.Dataset.from_generator(lambda: range(3), output_signature=spec)] == [
        0,
        1,
        2,
    ]
