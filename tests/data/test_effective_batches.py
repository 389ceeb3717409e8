"""What data are refused and how, what an element of a dataset is taken for, and the order in which samples come."""

import gc
import random
import sys
import weakref

import keras
import numpy as np
import optional
import pytest
import tensorflow as tf
from keras import layers
from models import arrays, classifier

import autobatch
from autobatch.data import cardinality, fit_data
from autobatch.data.effective_batches import EffectiveBatches

X, Y = arrays(samples=44)


def prepared(*data, target=16, model=None, **options):
    x, y = (*data, None)[:2]
    return fit_data.prepare_data(model or classifier(), x, y, target_batch=target, options=options)[0]


def numbers(samples=44):
    """Samples that tell their own number."""
    return tf.data.Dataset.range(samples).map(lambda i: (tf.fill([16], tf.cast(i, tf.float32)), i % 10))


def order(batches):
    """The numbers of the samples of one epoch, as they come."""
    batches.on_epoch_begin()
    found = [int(value) for batch in batches for value in tf.nest.flatten(batch)[0][:, 0]]
    batches.on_epoch_end()
    return found


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            (X, Y[:40]),
            {},
            r"x has 44 samples and y has 40 samples\. Received: x of shape \(44, 16\), y of shape \(40,\)",
        ),
        ((X, Y), {"sample_weight": Y[:3]}, "x has 44 samples, y has 44 samples and sample_weight has 3 samples"),
        (({"a": X, "b": X[:9]}, Y), {}, r"x\['a'\] has 44 samples, x\['b'\] has 9 samples and y has 44 samples"),
        ((X, Y[:40]), {"validation_split": 0.5}, "x has 44 samples and y has 40 samples"),
        ((X, Y), {"validation_data": (X, Y[:4])}, "x has 44 samples and y has 4 samples"),
        ((np.zeros((0, 16)), np.zeros(0)), {}, r"dataset is empty.*Received: x of shape \(0, 16\), y of shape \(0,\)"),
        ((tf.data.Dataset.from_tensor_slices((X[:0], Y[:0])),), {}, "dataset is empty.*Received"),
        (((X, Y, Y),), {"sample_weight": Y}, "sample_weight is given twice.*Received"),
    ],
)
def test_refused_before_anything_runs(data, options, message, recwarn):
    with pytest.raises(ValueError, match=message):
        autobatch.fit(classifier(), *data, target_batch=64, micro_batch=4, **options)
    assert not [warning for warning in recwarn if issubclass(warning.category, autobatch.AutobatchWarning)]


def test_a_dataset_that_turns_out_to_be_empty():
    nothing = numbers().filter(lambda x, y: y > 100).batch(4)
    with pytest.raises(ValueError, match="dataset is empty"):
        autobatch.fit(classifier(), nothing, target_batch=16)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((numbers().batch(4), Y), {}, "`y` should not be passed"),
        ((numbers().batch(4),), {"sample_weight": Y}, "`sample_weights` should not be passed"),
        ((X, Y), {"sample_weight": X[:, 0], "class_weight": {0: 2.0}}, "You cannot `class_weight` and `sample_weight`"),
        ((iter([]),), {}, "Unrecognized data type"),
        (((batch for batch in []),), {}, "the generator must yield at least one batch"),
        ((numbers().batch(4),), {"validation_split": 0.5}, "only supported for tensors or NumPy arrays"),
        ((X, Y), {"validation_split": 0.999}, "not sufficient to split"),
    ],
)
def test_what_keras_refuses_is_refused_in_its_words(data, options, message):
    with pytest.raises(ValueError, match=message):
        autobatch.fit(classifier(), *data, target_batch=16, micro_batch=4, **options)


# -- samples or batches -----------------------------------------------------------------------------------------------


def dataset_of(*shapes):
    specs = tuple(tf.TensorSpec(shape) for shape in shapes)
    return tf.data.Dataset.from_generator(lambda: iter(()), output_signature=specs if len(specs) > 1 else specs[0])


VECTOR, IMAGE, ANY_VECTOR = [("x", (None, 16))], [("x", (None, 8, 8, 3))], [("x", (None, 1))]


@pytest.mark.parametrize(
    ("dataset", "inputs", "samples"),
    [
        pytest.param(dataset_of([16], []), [], True, id="a scalar part"),
        pytest.param(dataset_of([None, 16], [None]), [], False, id="open first dimensions"),
        pytest.param(dataset_of([8, 8], [10]), [], True, id="first dimensions that differ"),
        pytest.param(dataset_of([16], [16]), [], False, id="unbuilt and static: Keras's reading"),
        pytest.param(dataset_of([16], [16]).batch(16, drop_remainder=True), [], False, id="unbuilt, batched"),
        pytest.param(dataset_of([16], [16]), VECTOR, True, id="one dimension less than the model's input"),
        pytest.param(dataset_of([16, 16], [16, 16]), VECTOR, False, id="static batch dimensions"),
        pytest.param(dataset_of([8, 8, 3]), IMAGE, True, id="inputs alone"),
        pytest.param(dataset_of([None, 8, 8, 3]), IMAGE, False, id="batches of inputs alone"),
        pytest.param(dataset_of([None]), ANY_VECTOR, False, id="a vector for an input of one feature"),
        pytest.param(dataset_of([1]), ANY_VECTOR, True, id="one feature"),
        pytest.param(dataset_of([100], [100]).batch(5, drop_remainder=True), [("x", (None, None))], False, id="text"),
        pytest.param(
            tf.data.Dataset.range(1000).batch(101, drop_remainder=True).map(lambda t: (t[:-1], t[1:])),
            [("x", (None, None))],
            True,
            id="sequences made by batch",
        ),
        pytest.param(
            dataset_of([4], [7]).map(lambda a, b: ({"b": b, "a": a}, b)),
            [("b", (None, 7)), ("a", (None, 4))],
            True,
            id="dict",
        ),
        pytest.param(
            tf.data.Dataset.from_tensors(({"b": tf.zeros([5, 7]), "a": tf.zeros([5, 4])}, tf.zeros([5, 7]))),
            [("b", (None, 7)), ("a", (None, 4))],
            False,
            id="dict of batches",
        ),
        pytest.param(
            dataset_of([4], [4]).map(lambda a, b: ((a, b), a)), [("p", (None, 4)), ("q", (None, 4))], True, id="two"
        ),
        pytest.param(dataset_of([None, 4], [None]).shuffle(3).prefetch(1).take(2), [], False, id="behind others"),
        pytest.param(
            dataset_of([5], [5]).batch(5, drop_remainder=True).unbatch(), [], False, id="unbatched, untellable"
        ),
    ],
)
def test_samples_or_batches(dataset, inputs, samples):
    assert cardinality.is_of_samples(dataset, inputs) is samples


def test_a_model_built_by_training_tells_its_input():
    model = keras.Sequential([layers.Dense(16)])
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    assert prepared(tf.data.Dataset.from_tensor_slices((X, X)), model=model).sample_limit == 44


# -- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "samples", "expected"),
    [
        (numbers(), 44, 3),
        (numbers().batch(7), 44, 3),
        (numbers().batch(7).cache().shuffle(3).prefetch(1), 44, 3),
        (numbers().batch(7).repeat(2), 88, 6),
        (numbers().batch(7).concatenate(numbers().batch(7)), 88, 6),
        (numbers().padded_batch(7), 44, 3),
        (numbers().batch(11, drop_remainder=True).map(lambda x, y: (x, y)).take(3), 33, 3),
        (numbers().batch(7).map(lambda x, y: (x, y)), None, 3),
        (numbers().batch(7).map(lambda x, y: (tf.repeat(x, 2, axis=0), tf.repeat(y, 2))), None, 3),
        (numbers().batch(7).filter(lambda x, y: True), None, None),
        (numbers().batch(7).repeat(), None, None),
    ],
)
def test_updates_in_an_epoch(dataset, samples, expected):
    batches = prepared(dataset)
    assert batches.sample_limit == samples
    assert batches.num_batches == (None if samples is None else expected)
    assert batches.expected_batches == expected


def test_an_epoch_is_not_cut_short_by_a_map_that_makes_more_samples():
    doubled = numbers().batch(7).map(lambda x, y: (tf.repeat(x, 2, axis=0), tf.repeat(y, 2)))
    steps = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append(batch)

    autobatch.fit(classifier(), doubled, target_batch=16, micro_batch=16, epochs=2, verbose=0, callbacks=[Count()])
    assert len(steps) == 12  # 88 samples in each of two epochs


# -- the order --------------------------------------------------------------------------------------------------------


class Reshuffled(keras.utils.PyDataset):
    def __init__(self, **options):
        super().__init__(**options)
        self.rows = np.arange(44)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows = self.rows[index * 10 : (index + 1) * 10]
        return np.repeat(rows[:, None], 16, 1).astype("float32") + np.random.uniform(0, 0.5), rows % 10

    def on_epoch_end(self):
        random.shuffle(self.rows)


def torch_shuffled(generator=None):
    torch = optional.torch()
    data = torch.utils.data.TensorDataset(torch.arange(44.0)[:, None].repeat(1, 16), torch.arange(44) % 10)
    return torch.utils.data.DataLoader(data, batch_size=7, shuffle=True, generator=generator)


SHUFFLED = {
    "seeded": lambda: numbers().shuffle(44, seed=3).batch(16),
    "unseeded": lambda: numbers().shuffle(44).batch(7),
    "cached": lambda: numbers().shuffle(44, seed=3).cache().batch(16),
    "shuffled twice": lambda: numbers().shuffle(20, seed=3).batch(4).shuffle(9, seed=5).prefetch(2),
    "shuffled files": lambda: tf.data.Dataset.range(4).shuffle(4, seed=3).interleave(lambda i: numbers()).batch(16),
    "samples": lambda: numbers().shuffle(44, seed=3),
    "varying": lambda: numbers().map(lambda x, y: (tf.RaggedTensor.from_row_splits(x, [0, 16]), y)).shuffle(44, seed=3)
    .map(lambda x, y: (x.flat_values, y)).batch(7),
    "arrays": lambda: np.repeat(np.arange(44.0)[:, None], 16, 1),
    "PyDataset": Reshuffled,
    "PyDataset with workers": lambda: Reshuffled(workers=2),
    "torch": torch_shuffled,
}  # fmt: skip


def seed_all():
    keras.utils.set_random_seed(7)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(7)


@pytest.mark.parametrize("kind", SHUFFLED)
def test_looking_changes_no_epochs_order(kind):
    SHUFFLED[kind]()  # imports torch, where it is one
    found = []
    for looks in (False, True):
        seed_all()
        batches = EffectiveBatches(SHUFFLED[kind](), target_batch=16)
        epochs = []
        for _ in range(3):
            if looks:
                batches.look()
            epochs.append(order(batches))
        found.append(epochs)
    assert found[0] == found[1]
    assert sorted(found[0][0]) != found[0][0]


@pytest.mark.parametrize("kind", ["seeded", "shuffled twice", "PyDataset", "torch"])
def test_a_tune_before_leaves_the_order_of_epochs(kind):
    SHUFFLED[kind]()
    found = []
    for tunes in (False, True):
        seed_all()
        data = SHUFFLED[kind]()
        model = classifier()
        seed_all()
        if tunes:
            autobatch.tune(model, data, target_batch=16)
        reader = data if isinstance(data, tf.data.Dataset) else EffectiveBatches(data, target_batch=16)
        read = (
            (lambda r=reader: [int(v) for x, _ in r for v in x[:, 0]]) if reader is data else lambda r=reader: order(r)
        )
        found.append([read(), read()])
    assert found[0] == found[1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_over_arrays_that_nobody_reads_is_not_begun_but_where_the_next_ones_order_needs_it(shuffle):
    batches = EffectiveBatches(np.arange(44.0)[:, None], target_batch=16, shuffle=shuffle)
    begun = []
    start = batches._start
    batches._start = lambda: begun.append(1) or start()
    unread = iter(batches)
    assert not begun
    assert sum(len(tf.nest.flatten(batch)[0]) for batch in batches) == 44
    assert len(begun) == 1 + shuffle
    assert sum(len(tf.nest.flatten(batch)[0]) for batch in unread) == 44
    assert len(begun) == 2


@pytest.mark.parametrize("shuffle", [False, True])
def test_arrays_are_let_go_of_with_what_was_not_read(shuffle):
    batches = EffectiveBatches(np.arange(44.0)[:, None], target_batch=16, shuffle=shuffle)
    list(batches)
    unread = iter(batches)
    gone = weakref.ref(batches)
    gc.disable()
    try:
        del batches, unread
        assert gone() is None
    finally:
        gc.enable()


def order_recorded(fit):
    """The numbers of the samples of every update, told by a model that is shown one feature."""
    seen = []
    seed_all()

    class Spy(keras.Model):
        def train_step(self, data):
            tf.py_function(lambda x: seen.extend(int(v) for v in x[:, 0]), [data[0]], [])
            return super().train_step(data)

    inputs = keras.Input((16,))
    model = Spy(inputs, layers.Dense(10)(inputs))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    seed_all()
    fit(model, seen)
    return seen


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: (numbers().shuffle(44, seed=3).batch(16),), id="dataset"),
        pytest.param(lambda: (numbers().shuffle(44, seed=3).batch(16).map(lambda x, y: (x, y)),), id="mapped dataset"),
        pytest.param(lambda: (np.repeat(np.arange(44.0)[:, None], 16, 1), np.arange(44) % 10), id="arrays"),
        pytest.param(lambda: (Reshuffled(),), id="PyDataset"),
        pytest.param(lambda: (torch_shuffled(),), id="torch"),
    ],
)
def test_a_search_before_training_leaves_the_order_of_plain_fit(data):
    data()

    def plain(model, seen):
        model.fit(*data(), batch_size=16, epochs=3, verbose=0)

    def searching(model, seen):
        batches = fit_data.prepare_data
        made = []

        def prepare(*args, **kwargs):
            made.append(batches(*args, **kwargs))
            made[0][0].look()  # as the trials do; their own steps would be recorded as well
            return made[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit_data, "prepare_data", prepare)
            autobatch.fit(model, *data(), target_batch=16, micro_batch=16, epochs=3, verbose=0)

    assert order_recorded(searching) == order_recorded(plain)


def test_a_dataset_over_an_iterator_that_is_read_once_loses_nothing():
    once = iter(zip(X, Y, strict=True))
    signature = (tf.TensorSpec([16]), tf.TensorSpec([], tf.int64))
    batches = prepared(tf.data.Dataset.from_generator(lambda: once, output_signature=signature).batch(3))
    np.testing.assert_array_equal(batches.look()[0], X[:16])
    np.testing.assert_array_equal(np.concatenate([x.numpy() for x, _ in batches]), X)


def test_only_looking_moves_nothing_where_python_makes_the_samples():
    def made():
        samples = tf.data.Dataset.range(44).map(lambda i: tf.numpy_function(np.float32, [i], tf.float32))
        return samples.map(lambda v: tf.fill([16], v)).shuffle(44, seed=3).batch(7)

    looked, untouched = made(), made()
    EffectiveBatches(looked, target_batch=16, only_look=True).look()
    assert [x.numpy().tolist() for x in looked] == [x.numpy().tolist() for x in untouched]


@pytest.mark.parametrize("looks", [True, False])
def test_batches_that_stay_as_they_come_do_so_where_the_first_look_reads_the_data_themselves(looks):
    sizes = [8, 8, 4, 8, 8, 4, 3]
    batches = EffectiveBatches(((X[:size], Y[:size]) for size in sizes), target_batch=8, as_they_come=True)
    if looks:
        assert len(batches.look()[0]) == 8
    assert [len(x) for x, _ in batches] == sizes
