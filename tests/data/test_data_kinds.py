"""Every kind of data that ``Model.fit`` takes, in micro-batches: the weights of plain ``fit`` on the same samples."""

import functools
import warnings

import keras
import numpy as np
import optional
import pytest
import tensorflow as tf
from keras import layers
from models import arrays, classifier, relative_error
from put_back import putting_back

import autobatch
from autobatch.data import fit_data

SAMPLES, TARGET, MICRO = 44, 16, 6  # three updates an epoch, of 6 + 5 + 5 samples, the last of 6 + 6
X, Y = arrays(samples=SAMPLES)
W = np.random.default_rng(5).uniform(0.5, 2, SAMPLES).astype("float32")


@functools.cache
def made_once(make_model, whose):
    """A model, and a function that gives it its first values back: data alike are trained on with the same traces."""
    model = make_model()
    return model, putting_back(model)


def weights_after(fit, make_model, whose):
    model, put_back = made_once(make_model, whose)
    put_back()
    history = fit(model)
    return [variable.numpy() for variable in model.trainable_variables], history.history


@functools.cache
def trained_plainly(plain, make_model):
    return weights_after(plain, make_model, "Keras's")


def assert_same_training(ours, plain, *, make_model=classifier, most=1e-5):
    """Train the same model in both ways; weights, and every figure in the history, agree.

    What is compared with several times is trained once: pass the same ``plain`` and ``make_model``.
    """
    expected, expected_history = trained_plainly(plain, make_model)
    actual, history = weights_after(ours, make_model, "ours")
    assert relative_error(actual, expected) < most
    assert history.keys() == expected_history.keys()
    for name in history:
        np.testing.assert_allclose(history[name], expected_history[name], rtol=1e-4, atol=1e-6)


def ours_on(*data, target=TARGET, micro=MICRO, **options):
    options = {"shuffle": False, "verbose": 0, **options}
    return lambda model: autobatch.fit(model, *data, target_batch=target, micro_batch=micro, **options)


def plain_on(*data, batch_size=TARGET, **options):
    options = {"shuffle": False, "verbose": 0, **options}
    return lambda model: model.fit(*data, batch_size=batch_size, **options)


PLAIN, PLAIN_TWICE = plain_on(X, Y), plain_on(X, Y, epochs=2)
WEIGHTED = plain_on(X, Y, sample_weight=W)
CLASS_WEIGHT = {label: 1.0 + label / 3 for label in range(10)}
CLASS_WEIGHTED = plain_on(X, Y, class_weight=CLASS_WEIGHT)


class Batches(keras.utils.PyDataset):
    def __init__(self, size, parts=(X, Y), **options):
        super().__init__(**options)
        self.size, self.parts = size, parts

    def __len__(self):
        return -(-len(self.parts[0]) // self.size)

    def __getitem__(self, index):
        return tuple(part[index * self.size : (index + 1) * self.size] for part in self.parts)


def batches_of(size, parts=(X, Y)):
    for start in range(0, len(parts[0]), size):
        yield tuple(part[start : start + size] for part in parts)


def slices(*parts):
    return tf.data.Dataset.from_tensor_slices(parts or (X, Y))


def from_pandas():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(X, columns=[f"f{i}" for i in range(16)]), pandas.Series(Y)


KINDS = {
    "numpy": lambda: (X, Y),
    "tuple": lambda: ((X, Y),),
    "float64": lambda: (X.astype("float64"), Y),
    "tensors": lambda: (tf.constant(X), tf.constant(Y)),
    "pandas": from_pandas,
    "effective batches": lambda: (slices().batch(TARGET),),
    "small batches": lambda: (slices().batch(7),),
    "large batches": lambda: (slices().batch(40),),
    "static batches": lambda: (slices().batch(11, drop_remainder=True),),
    "samples": lambda: (slices(),),
    "mapped": lambda: (slices().batch(7).map(lambda x, y: (x, y)).cache().prefetch(2),),
    "PyDataset": lambda: (Batches(7),),
    "PyDataset with workers": lambda: (Batches(7, workers=2),),
    "PyDataset with processes": lambda: (Batches(7, workers=2, use_multiprocessing=True),),
    "torch": lambda: (torch_loader(batch_size=7),),
    "torch with workers": lambda: (torch_loader(batch_size=7, num_workers=2),),
    "torch tensors": lambda: tuple(optional.torch().tensor(part) for part in (X, Y)),
    "Grain": lambda: (grain_samples().batch(7),),
    "Grain, iterated": lambda: (grain_samples().to_iter_dataset().batch(7),),
}


def grain_samples():
    return optional.grain().MapDataset.source(list(zip(X, Y, strict=True)))


def torch_loader(**options):
    torch = optional.torch()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_effective_batches(kind):
    batches, _ = fit_data.prepare_data(
        classifier(), *(*KINDS[kind](), None)[:2], target_batch=TARGET, options={"shuffle": False}
    )
    for look_first in (False, True):
        looked = batches.look() if look_first else None
        batches.on_epoch_begin()
        found = [[np.asarray(part) for part in batch] for batch in batches]
        batches.on_epoch_end()
        assert [len(x) for x, _ in found] == [16, 16, 12]
        np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), X)
        np.testing.assert_array_equal(np.concatenate([y.reshape(-1) for _, y in found]), Y)
        if look_first:
            np.testing.assert_array_equal(looked[0], X[:TARGET])
    # Whether a PyDataset's last batch is a whole one is not known: 43 samples and 49 are different numbers of updates.
    # How many batches Grain makes is not asked.
    assert batches.expected_batches == (None if kind.startswith(("PyDataset", "Grain")) else 3)


@pytest.mark.parametrize(
    "kind", ["pandas", "samples", "PyDataset with workers", "PyDataset with processes", "torch with workers", "Grain"]
)
def test_every_kind_trains_the_same_weights(kind):
    assert_same_training(ours_on(*KINDS[kind](), epochs=2), PLAIN_TWICE)


def test_generator_loses_nothing_to_the_search():
    read = []

    def generator():
        for batch in batches_of(7):
            read.append(batch[0][:, 0])
            yield batch

    def searching(model):
        return autobatch.fit(model, generator(), target_batch=TARGET, verbose=0)

    assert_same_training(searching, PLAIN)
    np.testing.assert_array_equal(np.concatenate(read), X[:, 0])


def test_generator_of_sample_weights_and_of_missing_ones():
    ours = ours_on(batches_of(7, (X, Y, W)))
    assert_same_training(ours, WEIGHTED)

    without = ((x, y, None) for x, y in batches_of(7))
    assert_same_training(ours_on(without), PLAIN)


def test_scipy_sparse_and_tensorflow_sparse():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    dense = np.where(np.abs(X) > 1, X, 0).astype("float32")

    def model():
        keras.utils.set_random_seed(1)
        made = keras.Sequential([keras.Input((16,), sparse=True), layers.Dense(10)])
        made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    sparse = tf.sparse.from_dense(dense)
    plain = plain_on(sparse, Y)
    for data in ((scipy_sparse.csr_matrix(dense), Y), (slices(sparse, Y).batch(7),)):
        assert_same_training(ours_on(*data), plain, make_model=model)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        pytest.param((X, Y), {"sample_weight": W}, id="sample_weight"),
        pytest.param(((X, Y, W),), {}, id="sample_weight in a tuple"),
        pytest.param((slices(X, Y, W).batch(7),), {}, id="sample_weight in a dataset"),
        pytest.param((Batches(7, (X, Y, W)),), {}, id="sample_weight in a PyDataset"),
    ],
)
def test_sample_weight(data, options):
    assert_same_training(ours_on(*data, **options), WEIGHTED)


@pytest.mark.parametrize("data", [(X, Y), (slices().batch(7),), (Batches(7),)], ids=["arrays", "dataset", "PyDataset"])
def test_class_weight(data):
    assert_same_training(ours_on(*data, class_weight=CLASS_WEIGHT), CLASS_WEIGHTED)


@pytest.mark.parametrize(
    "validation",
    [
        pytest.param(lambda: {"validation_split": 0.25}, id="split"),
        pytest.param(lambda: {"validation_data": (X[:20], Y[:20], W[:20])}, id="weighted"),
        pytest.param(lambda: {"validation_data": slices(X[:20], Y[:20]).batch(6)}, id="dataset"),
        pytest.param(lambda: {"validation_data": Batches(6)}, id="PyDataset"),
        pytest.param(lambda: {"validation_data": torch_loader(batch_size=6)}, id="torch"),
        pytest.param(lambda: {"validation_data": batches_of(6), "validation_steps": 3}, id="generator"),
        pytest.param(
            lambda: {"validation_data": slices(X[:20], Y[:20]).batch(6).repeat(), "validation_steps": 3}, id="infinite"
        ),
    ],
)
def test_validation(validation):
    assert_same_training(ours_on(X, Y, **validation()), plain_on(X, Y, **validation()))


def test_validation_of_single_samples():
    ours = ours_on(X, Y, validation_data=slices(X[:20], Y[:20]))
    assert_same_training(ours, plain_on(X, Y, validation_data=(X[:20], Y[:20])))


def two_inputs():
    keras.utils.set_random_seed(1)
    first, second = keras.Input((16,), name="first"), keras.Input((1,), name="second")
    joined = layers.Concatenate()([first, second])
    outputs = {"label": layers.Dense(10, name="label")(joined), "size": layers.Dense(1, name="size")(joined)}
    model = keras.Model({"first": first, "second": second}, outputs)
    losses = {"label": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"}
    model.compile("sgd", losses)
    return model


NESTED = {"second": X[:, :1] * 2, "first": X}, {"size": X[:, 1:2], "label": Y}


PLAIN_NESTED = plain_on(*NESTED)


@pytest.mark.parametrize(
    "data",
    [lambda: NESTED, lambda: (slices(*NESTED).batch(7),), lambda: (slices(*NESTED),)],
    ids=["arrays", "batches", "samples"],
)
def test_dicts_of_several_inputs_and_outputs(data):
    assert_same_training(ours_on(*data()), PLAIN_NESTED, make_model=two_inputs)


def test_structures_within_structures():
    def model():
        keras.utils.set_random_seed(1)
        one, other, third = (keras.Input((16,)) for _ in range(3))
        inputs = {"pair": [one, other], "rest": {"third": third}}
        made = keras.Model(inputs, layers.Dense(10)(layers.Concatenate()([one, other, third])))
        made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    nest = {"pair": [X, X * 2], "rest": {"third": X - 1}}
    plain = plain_on(nest, Y)
    assert_same_training(ours_on(nest, Y), plain, make_model=model)
    as_tuple = {**nest, "pair": tuple(nest["pair"])}  # from_tensor_slices would stack a list
    assert_same_training(ours_on(slices(as_tuple, Y).batch(7)), plain, make_model=model)


def test_lists_of_inputs():
    def model():
        keras.utils.set_random_seed(1)
        inputs = [keras.Input((16,)), keras.Input((16,))]
        made = keras.Model(inputs, layers.Dense(10)(layers.Add()(inputs)))
        made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    plain = plain_on([X, X * 2], Y)
    for data in (([X, X * 2], Y), (slices((X, X * 2), Y),)):
        assert_same_training(ours_on(*data), plain, make_model=model)


def test_inputs_without_targets():
    class Autoencoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(16)

        def call(self, x):
            return self.dense(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(keras.ops.square(x - y_pred))

    def model():
        keras.utils.set_random_seed(1)
        made = Autoencoder()
        made.build((None, 16))
        made.dense.build((None, 16))
        made.compile("sgd")
        return made

    plain = plain_on(X)
    for data in (X, tf.data.Dataset.from_tensor_slices(X)):
        assert_same_training(ours_on(data), plain, make_model=model)


def test_infinite_dataset_with_steps_per_epoch():
    endless = slices().batch(7).repeat()
    counted = slices().repeat().batch(TARGET)
    assert_same_training(ours_on(endless, steps_per_epoch=4), plain_on(counted, batch_size=None, steps_per_epoch=4))


class EndlessBatches(keras.utils.PyDataset):
    """Batches of 7 without an end."""

    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        rows = np.arange(7 * index, 7 * index + 7) % SAMPLES
        return X[rows], Y[rows]


def test_infinite_py_dataset_with_steps_per_epoch():
    counted = slices().repeat().batch(TARGET)
    ours = ours_on(EndlessBatches(), steps_per_epoch=4)
    assert_same_training(ours, plain_on(counted, batch_size=None, steps_per_epoch=4))


def test_infinite_dataset_without_steps_per_epoch_warns_and_goes_on_as_in_keras():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 4

    with pytest.warns(autobatch.AutobatchWarning, match="the first epoch never ends.*Pass steps_per_epoch"):
        history = ours_on(slices().batch(7).repeat(), callbacks=[Stop()])(classifier())
    assert len(history.history["loss"]) == 1


def words(pad, length=None):
    """Token ids of lengths 1 to 9, as single samples; ``pad`` marks what is missing."""
    random = np.random.default_rng(2)
    for label in range(SAMPLES):
        ids = random.integers(1, 9, random.integers(1, 10) if length is None else length)
        yield ids.astype("int32"), np.int32(label % 3)


def text_model(pad=0):
    keras.utils.set_random_seed(1)
    ids = keras.Input((None,), dtype="int32")
    mask = layers.Lambda(lambda t: tf.cast(t != pad, "float32")[..., None], output_shape=(None, 1))(ids)
    vectors = layers.Embedding(12, 4)(keras.ops.maximum(ids, 0)) * mask
    pooled = keras.ops.sum(vectors, axis=1) / keras.ops.sum(mask, axis=1)
    model = keras.Model(ids, layers.Dense(3)(pooled))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


SIGNATURE = (tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32))


@pytest.mark.parametrize("pad", [0, -1])
def test_padded_batches_are_padded_as_the_user_padded_them(pad):
    samples = tf.data.Dataset.from_generator(lambda: words(pad), output_signature=SIGNATURE)
    values = (np.int32(pad), np.int32(0))
    expected = samples.padded_batch(TARGET, padding_values=values)
    small = samples.padded_batch(7, padding_values=values)
    plain, make_model = plain_on(expected, batch_size=None), functools.partial(text_model, pad)
    with warnings.catch_warnings():
        warnings.simplefilter("error", autobatch.AutobatchWarning)
        assert_same_training(ours_on(small.prefetch(1)), plain, make_model=make_model)
    mapped = small.map(lambda x, y: (x, y))
    with pytest.warns(autobatch.AutobatchWarning, match=f"padded with {pad} to the longest"):
        assert_same_training(ours_on(mapped), plain, make_model=make_model)


def test_no_word_about_padding_where_lengths_agree():
    samples = tf.data.Dataset.from_generator(lambda: words(0, length=4), output_signature=SIGNATURE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", autobatch.AutobatchWarning)
        ours_on(samples.batch(7))(text_model())


def test_images_of_varying_sizes():
    def batches():
        for size in (4, 6, 5):
            yield np.full((3, size, size + 1, 2), size, "float32"), np.arange(3)

    model = keras.Sequential([keras.Input((None, None, 2)), layers.GlobalMaxPooling2D(), layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.warns(autobatch.AutobatchWarning, match="padded with 0 to the longest"):
        autobatch.fit(model, batches(), target_batch=9, micro_batch=9, verbose=0)


class RaggedSum(keras.Model):
    """Takes ragged token ids; dense ones inside."""

    def __init__(self):
        super().__init__()
        self.embed, self.dense = layers.Embedding(12, 4), layers.Dense(3)
        self.embed.build(None)
        self.dense.build((None, 4))
        self.built = True

    def call(self, ids):
        ids = ids.to_tensor() if isinstance(ids, tf.RaggedTensor) else ids
        return self.dense(keras.ops.sum(self.embed(ids) * tf.cast(ids > 0, "float32")[..., None], axis=1))


def test_ragged_tensors_and_datasets():
    def model():
        keras.utils.set_random_seed(1)
        made = RaggedSum()
        made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    ids, labels = zip(*words(0), strict=True)
    ragged, labels = tf.ragged.constant(ids, dtype=tf.int32), np.array(labels)
    plain = plain_on(ragged, labels)
    assert_same_training(ours_on(ragged, labels), plain, make_model=model)
    assert_same_training(ours_on(slices(ragged, labels).batch(7)), plain, make_model=model)
    assert_same_training(ours_on(slices(ragged, labels)), plain, make_model=model)
