"""A pass over data goes on in another process: every sample once, in the order that it had."""

import random

import keras
import numpy as np
import optional
import pytest
import tensorflow as tf

from autobatch.backup.packing import from_bytes, to_bytes
from autobatch.data.effective_batches import EffectiveBatches
from autobatch.data.random_states import RandomStates

SAMPLES, TARGET, TAKEN = 44, 10, 3
NUMBERS = np.arange(SAMPLES, dtype="int64")


class Shuffled(keras.utils.PyDataset):
    """Batches of 7 numbers in an order of the epoch's own; it counts what is asked of it."""

    def __init__(self, random=None, **kwargs):
        super().__init__(**kwargs)
        self.random, self.order, self.read = random or np.random, NUMBERS.copy(), []

    def __len__(self):
        return 7

    def __getitem__(self, index):
        self.read.append(index)
        return self.order[7 * index : 7 * index + 7], self.order[7 * index : 7 * index + 7]

    def on_epoch_end(self):
        self.random.shuffle(self.order)


class Augmented(Shuffled):
    """Batches that are changed by NumPy's global numbers when they are made."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 1000 * np.random.randint(1, 100, x.shape), y


class WithState(Shuffled):
    def get_state(self):
        return {"order": self.order.copy()}

    def set_state(self, state):
        self.order = state["order"]


def numbers_in(batch):
    return np.asarray(batch[0]).tolist()


def mapped(folder):
    if not (folder / "numbers.npy").exists():  # another writing would cut it under those who read it
        np.save(folder / "numbers.npy", NUMBERS)
    return np.load(folder / "numbers.npy", mmap_mode="r")


def dataset(seed=None):
    return tf.data.Dataset.from_tensor_slices((NUMBERS, NUMBERS)).shuffle(20, seed=seed).batch(4)


def from_generator():
    spec = tf.TensorSpec([], tf.int64), tf.TensorSpec([], tf.int64)
    pairs = tf.data.Dataset.from_generator(
        lambda: ((n, n) for n in np.random.permutation(NUMBERS)), output_signature=spec
    )
    return pairs.batch(4)


def torch_loader():
    torch = optional.torch()
    numbers = torch.arange(SAMPLES)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(numbers, numbers), batch_size=7, shuffle=True)


class Pairs:
    """Samples of which it is noted which were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.read.append(int(index))
        return NUMBERS[index], NUMBERS[index]


class NamedPairs(Pairs):
    """The same, which prints alike in every process, as Grain's loader asks of a source."""

    def __repr__(self):
        return "pairs of numbers"


def grain_dataset(pairs=None):
    return optional.grain().MapDataset.source(pairs or Pairs()).shuffle(seed=3).batch(4)


def grain_stream(pairs=None):
    options = optional.grain().ReadOptions(num_threads=1, prefetch_buffer_size=2)
    samples = optional.grain().MapDataset.source(pairs or Pairs()).shuffle(seed=3)
    return samples.to_iter_dataset(options).batch(7)


def grain_loader(pairs=None):
    grain = optional.grain()
    sampler = grain.samplers.IndexSampler(SAMPLES, shuffle=True, seed=1, num_epochs=1)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    operations = [grain.transforms.Batch(4)]
    return grain.DataLoader(
        data_source=pairs or Pairs(), sampler=sampler, operations=operations, read_options=options, worker_count=0
    )


def stateful_loader(pairs=None):
    return optional.stateful_data_loader()(pairs or Pairs(), batch_size=7, shuffle=True)


KINDS = {
    "arrays": lambda folder: (NUMBERS, NUMBERS),
    "arrays in order": lambda folder: (NUMBERS, NUMBERS),
    "batches shuffled": lambda folder: (NUMBERS, NUMBERS),
    "mapped": lambda folder: (mapped(folder), mapped(folder)),
    "tf.data with a seed": lambda folder: (dataset(5), None),
    "tf.data without a seed": lambda folder: (dataset(), None),
    "from_generator": lambda folder: (from_generator(), None),
    "torch loader": lambda folder: (torch_loader(), None),
    "stateful torch loader": lambda folder: (stateful_loader(), None),
    "Grain": lambda folder: (grain_dataset(), None),
    "Grain, iterated": lambda folder: (grain_stream(), None),
    "loader of Grain's": lambda folder: (grain_loader(), None),
    "PyDataset": lambda folder: (Shuffled(), None),
    "PyDataset with a generator": lambda folder: (Shuffled(np.random.default_rng(3)), None),
    "PyDataset with a state": lambda folder: (WithState(), None),
}
SHUFFLE = {"arrays in order": False, "batches shuffled": "batch"}


@pytest.fixture
def without_seed():
    """No seed of TensorFlow's, as in a program that sets none; NumPy's are any."""
    from tensorflow.python.eager import context

    before = context.global_seed()
    context.context()._seed = None
    yield
    context.context()._seed = before


def epoch(batches, most=None):
    """The numbers of an epoch's batches, as Keras asks for them, up to ``most`` of these."""
    batches.on_epoch_begin()
    iterator = iter(batches)
    seen = [numbers_in(batch) for batch in (iterator if most is None else (next(iterator) for _ in range(most)))]
    if most is None:
        batches.on_epoch_end()
    return seen, iterator


def opened(kind, folder, position=None):
    x, y = KINDS[kind](folder)
    batches = EffectiveBatches(x, y, target_batch=TARGET, keeps_order=True, shuffle=SHUFFLE.get(kind, True))
    batches.look()
    if position is not None:
        batches.continue_from(position)
    batches.on_epoch_end()  # as Keras calls it before a training
    return batches


@pytest.mark.parametrize("epochs_before", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_seen_once_in_the_order_of_the_pass(kind, epochs_before, tmp_path, without_seed):
    np.random.seed(8)
    first = opened(kind, tmp_path)
    for _ in range(epochs_before):
        epoch(first)
    before, iterator = epoch(first, TAKEN)
    position = first.position(iterator.taken)
    assert position["taken"] == TAKEN
    rest = [numbers_in(batch) for batch in iterator]

    np.random.seed(8 if kind == "from_generator" else 9)
    second = opened(kind, tmp_path, position)
    behind, iterator = epoch(second)
    assert behind == rest
    assert sorted(np.concatenate(before + behind)) == NUMBERS.tolist()
    assert iterator.taken == 5
    assert sorted(np.concatenate(epoch(second)[0])) == NUMBERS.tolist()


def test_the_place_in_a_dataset_that_is_made_otherwise_is_refused(tmp_path, without_seed):
    first = opened("tf.data without a seed", tmp_path)
    _, iterator = epoch(first, TAKEN)
    other = EffectiveBatches(dataset().prefetch(3), target_batch=TARGET, keeps_order=True)
    other.continue_from(first.position(iterator.taken))
    with pytest.raises(ValueError, match=r"this dataset is made in another way: by other steps, or in a limited CPU"):
        epoch(other)


@pytest.mark.parametrize("kind", ["tf.data with a seed", "PyDataset", "PyDataset with a generator"])
def test_the_epochs_behind_it_have_the_order_that_they_would_have_had(kind, tmp_path):
    np.random.seed(8)
    first = opened(kind, tmp_path)
    epoch(first)
    _, iterator = epoch(first, TAKEN)
    position = first.position(iterator.taken)
    states = RandomStates()
    list(iterator)
    first.on_epoch_end()
    following = epoch(first)[0]

    np.random.seed(8)
    second = opened(kind, tmp_path, position)
    second.on_epoch_begin()
    iterator = iter(second)
    iterator.begin()
    states.replay(second.states_at_begin)  # as a backup does
    list(iterator)
    second.on_epoch_end()
    assert epoch(second)[0] == following


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_of_a_pydataset_are_gone_on_with_by_their_index(shuffle):
    def opened(position=None):
        data = Augmented()
        batches = EffectiveBatches(data, target_batch=TARGET, keeps_order=True, shuffle=shuffle)
        if position is not None:
            batches.continue_from(position)
        batches.on_epoch_end()
        return data, batches

    np.random.seed(3)
    random.seed(3)
    _, first = opened()
    epoch(first)
    _, iterator = epoch(first, 3)
    position = first.position(iterator.taken)
    behind = position["pass"]["index"]["batches"]
    rest = [numbers_in(batch) for batch in iterator]

    np.random.seed(3)
    random.seed(4)
    data, second = opened(position)
    data.read.clear()
    second.on_epoch_begin()
    iterator = iter(second)
    again = [numbers_in(next(iterator))]
    position = second.position(iterator.taken)  # of a pass that was gone on with
    again += [numbers_in(batch) for batch in iterator]
    assert again == rest
    assert len(data.read) == 7 - behind <= 3

    data, third = opened(position)
    data.read.clear()
    assert epoch(third)[0] == rest[1:]
    assert len(data.read) == 7 - position["pass"]["index"]["batches"] <= 2


@pytest.mark.parametrize(
    "make", [grain_dataset, grain_stream, grain_loader, stateful_loader], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("epochs_before", [0, 1])
def test_loaders_that_tell_their_state_are_gone_on_with_from_it(make, epochs_before, without_seed):
    def opened(position=None):
        pairs = NamedPairs()
        batches = EffectiveBatches(make(pairs), target_batch=TARGET, keeps_order=True)
        batches.look()
        if position is not None:
            batches.continue_from(position)
        batches.on_epoch_end()
        return pairs, batches

    _, first = opened()
    for _ in range(epochs_before):
        epoch(first)
    before, iterator = epoch(first, 3)
    position = first.position(iterator.taken)
    assert position["pass"]["index"] is not None
    rest = [numbers_in(batch) for batch in iterator]

    position = from_bytes(to_bytes(position))  # as a backup keeps it
    pairs, second = opened(position)
    looked_at = len(pairs.read)
    second.on_epoch_begin()
    iterator = iter(second)
    again = [numbers_in(next(iterator))]
    position = from_bytes(to_bytes(second.position(iterator.taken)))  # of a pass that was gone on with
    again += [numbers_in(batch) for batch in iterator]
    assert again == rest
    assert sorted(np.concatenate(before + again)) == NUMBERS.tolist()
    assert len(pairs.read) - looked_at <= SAMPLES - 3 * TARGET + 7  # those that are left, and the batch that was cut

    _, third = opened(position)
    assert epoch(third)[0] == rest[1:]


def test_orders_of_unseeded_arrays_differ_from_epoch_to_epoch(tmp_path, without_seed):
    batches = opened("arrays", tmp_path)
    assert len({str(epoch(batches)[0]) for _ in range(3)}) == 3


def test_mapped_files_are_not_read_behind(tmp_path, monkeypatch):
    from autobatch.data import arrays

    read = []
    original = arrays._read_rows

    def noting(array, numbers):
        return tf.numpy_function(lambda rows: (read.extend(rows.tolist()), array[rows])[1], [numbers], tf.int64)

    monkeypatch.setattr(arrays, "_read_rows", noting)
    assert original is not noting
    first = opened("mapped", tmp_path)
    _, iterator = epoch(first, 4)
    position = first.position(iterator.taken)
    second = opened("mapped", tmp_path, position)
    read.clear()
    rest = [row for batch in epoch(second)[0] for row in batch]
    assert sorted(read) == sorted(rest * 2)  # x and y


def test_an_order_that_nobody_can_find_again_is_said(tmp_path, without_seed):
    unsaved = dataset().map(lambda x, y: (x, y + tf.cast(tf.random.uniform([]), tf.int64)))
    batches = EffectiveBatches(unsaved, target_batch=TARGET, keeps_order=True)
    with pytest.warns(UserWarning, match=r"without a seed \(RandomUniform, shuffle\).*Give\s+shuffle a seed"):
        next(iter(batches))
