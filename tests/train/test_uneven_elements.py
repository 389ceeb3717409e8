"""Elements whose parts have different numbers of rows train as in plain Keras: in proportion, or each whole."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import AtCall, run_out_if

import autobatch

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(64, 6)).astype("float32"), RANDOM.integers(0, 3, 64)
U = RANDOM.normal(size=(192, 6)).astype("float32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
zipped = tf.data.Dataset.zip


def labelled(samples=64, size=8, drop=True):
    return tf.data.Dataset.from_tensor_slices((X[:samples], Y[:samples])).batch(size, drop_remainder=drop)


def unlabelled(size=24):
    return tf.data.Dataset.from_tensor_slices(U).batch(size, drop_remainder=True)


class Stepping(keras.Model):
    """A model whose train_step differentiates ``loss(model, data)``; ``asked`` makes a step run out of memory."""

    def __init__(self, loss, asked=None):
        super().__init__()
        self.net = keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(3)])
        self.net.build((None, 6))
        self.teacher = keras.models.clone_model(self.net)
        self.teacher.build((None, 6))
        self.loss_of, self.asked = loss, asked
        self.tracker = keras.metrics.Mean(name="loss")
        self.certainty = keras.metrics.Mean(name="certainty")

    @property
    def metrics(self):
        return [self.tracker, self.certainty]

    def call(self, inputs):
        return self.net(inputs)

    def _logs(self, data, loss):
        self.tracker.update_state(loss)
        rows = [part for part in tf.nest.flatten(data) if part.dtype.is_floating and part.shape[1:] == (6,)]
        if rows:
            self.certainty.update_state(tf.reduce_max(self.teacher(rows[-1]), -1))
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(self, data)
            if self.asked is not None:
                loss *= 1.0 + run_out_if(self.asked)  # the gradients wait for it
        weights = self.net.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return self._logs(data, loss)

    def test_step(self, data):
        return self._logs(data, self.loss_of(self, data))


def mean_teacher(model, data):
    (x, y), u = data
    target = tf.nn.softmax(model.teacher(u * 0.9))
    consistency = tf.reduce_mean(tf.reduce_sum((tf.nn.softmax(model.net(u)) - target) ** 2, -1))
    return CROSS_ENTROPY(y, model.net(x)) + 2.0 * consistency


def fixmatch(model, data):
    """Only unlabelled samples that the teacher is sure of count, and they count as a sum over their own number."""
    (x, y), u = data
    target = tf.nn.softmax(model.teacher(u * 0.9))
    sure = tf.cast(tf.reduce_max(target, -1) > 0.4, tf.float32)
    each = tf.reduce_sum((tf.nn.softmax(model.net(u)) - target) ** 2, -1)
    return CROSS_ENTROPY(y, model.net(x)) + tf.reduce_sum(sure * each) / tf.reduce_sum(sure)


def side_by_side(model, data):
    """Both streams go through the network together, as where it normalises, and are taken apart again."""
    (x, y), u = data
    samples = tf.shape(x)[0]
    logits = model.net(tf.concat([x, u], 0))
    target = tf.nn.softmax(model.teacher(u * 0.9))
    sure = tf.cast(tf.reduce_max(target, -1) > 0.4, tf.float32)
    each = tf.reduce_sum((tf.nn.softmax(logits[samples:]) - target) ** 2, -1)
    return CROSS_ENTROPY(y, logits[:samples]) + tf.reduce_sum(sure * each) / tf.reduce_sum(sure)


def two_views(model, data):
    (x, y), u = data
    one, other = tf.split(model.net(tf.concat([u * 1.1, u * 0.9], 0)), 2)
    return CROSS_ENTROPY(y, model.net(x)) + tf.reduce_sum((one - other) ** 2) / 50.0


def contrastive(model, data):
    u, (x, y) = data
    one, other = (tf.math.l2_normalize(model.net(view), 1) for view in (u, u * 1.1 + 0.1))
    alike = tf.matmul(one, other, transpose_b=True) / 0.1
    return CROSS_ENTROPY(tf.range(tf.shape(u)[0]), alike) + CROSS_ENTROPY(y, model.net(x))


def gallery(model, data):
    query, others = data
    return CROSS_ENTROPY(tf.constant([3]), tf.matmul(model.net(query), model.net(others), transpose_b=True))


def triplet(model, data):
    anchor, positive, negatives = data
    near = tf.reduce_sum((model.net(anchor) - model.net(positive)) ** 2, -1)
    far = tf.reshape(tf.reduce_sum((model.net(negatives) - tf.repeat(model.net(anchor), 3, 0)) ** 2, -1), [-1, 3])
    return tf.reduce_mean(tf.maximum(near - tf.reduce_min(far, -1) + 1.0, 0.0))


def graph(model, data):
    nodes, edges = data["nodes"], data["edges"]
    hidden = model.net(nodes)
    return tf.reduce_mean((tf.gather(hidden, edges[:, 0]) - tf.gather(hidden, edges[:, 1])) ** 2)


def molecules(model, data):
    """Molecules of one size merged into one graph: atoms, bonds and labels have a measure, and the edges none."""
    (x, y, _) = keras.utils.unpack_x_y_sample_weight(data)
    atoms = model.net(x["atoms"])
    messages = keras.ops.take(atoms, x["pairs"][:, 1], axis=0)
    received = keras.ops.segment_sum(messages, x["pairs"][:, 0], num_segments=20)
    pooled = keras.ops.segment_sum(received, x["molecule"], num_segments=4)
    return tf.reduce_mean((tf.reduce_sum(pooled, -1, keepdims=True) - y) ** 2)


def merged_molecules(batches=3):
    random = np.random.default_rng(2)
    offsets = np.repeat(np.arange(4) * 5, 7)[:, None]
    return Elements(
        [
            (
                {
                    "atoms": random.normal(size=(20, 6)).astype("float32"),
                    "molecule": np.repeat(np.arange(4), 5).astype("int32"),
                    "pairs": (random.integers(0, 5, (28, 2)) + offsets).astype("int32"),
                },
                random.normal(size=(4, 1)).astype("float32"),
            )
            for _ in range(batches)
        ]
    )


def stacked(model, data):
    pair = data[0] if isinstance(data, tuple) else data
    anchors, positives = pair[0], pair[1]
    similarities = tf.einsum("ae,pe->ap", model.net(anchors), model.net(positives)) / 0.2
    return CROSS_ENTROPY(tf.range(3), similarities)


def made(loss, asked=None, **options):
    keras.utils.set_random_seed(1)
    model = Stepping(loss, asked)
    model.compile(keras.optimizers.SGD(0.1), **options)
    return model


class Elements(keras.utils.PyDataset):
    def __init__(self, elements):
        super().__init__()
        self.elements = elements

    def __len__(self):
        return len(self.elements)

    def __getitem__(self, index):
        return self.elements[index]


def graphs(*sizes):
    random = np.random.default_rng(1)
    return Elements(
        [
            {"nodes": random.normal(size=(n, 6)).astype("float32"), "edges": random.integers(0, n, (edges, 2))}
            for n, edges in sizes
        ]
    )


def off(model, plain, start):
    """The largest difference from plain Keras's weights, relative to what plain training has changed."""
    changes = zip(model.get_weights(), plain.get_weights(), start, strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b - w).max() + 1e-12)) for a, b, w in changes)


def both(loss, data, *, target, micro, plain_data=None, epochs=2, **options):
    """Train in plain Keras and here; return the difference, both histories, and the model."""
    plain, model = made(loss), made(loss)
    start = plain.get_weights()
    options |= {"epochs": epochs, "verbose": 0, "shuffle": False}
    expected = plain.fit(data() if plain_data is None else plain_data(), **options)
    history = autobatch.fit(model, data(), target_batch=target, micro_batch=micro, **options)
    return off(model, plain, start), expected, history, model


@pytest.mark.parametrize(
    ("loss", "data", "micro", "micro_batches"),
    [
        pytest.param(mean_teacher, lambda: zipped((labelled(), unlabelled())), 3, (3, 3, 2), id="mean teacher"),
        pytest.param(fixmatch, lambda: zipped((labelled(), unlabelled())), 3, (3, 3, 2), id="FixMatch"),
        pytest.param(side_by_side, lambda: zipped((labelled(), unlabelled())), 3, (3, 3, 2), id="side by side"),
        pytest.param(two_views, lambda: zipped((labelled(), unlabelled())), 3, (3, 3, 2), id="two views, a sum"),
        pytest.param(contrastive, lambda: zipped((unlabelled(), labelled())), 24, (24,), id="SimCLR"),
        pytest.param(
            triplet,
            lambda: Elements([(X[i : i + 8], X[i + 1 : i + 9], U[3 * i : 3 * i + 24]) for i in range(0, 48, 8)]),
            3,
            (3, 3, 2),
            id="triplets with three negatives",
        ),
    ],
)
def test_streams_of_fixed_proportions_train_as_in_plain_keras(loss, data, micro, micro_batches):
    target = sum(micro_batches)
    difference, expected, history, model = both(loss, data, target=target, micro=micro)
    assert difference < 2e-6
    assert history.report.warnings == ()
    assert history.plan.micro_batches == micro_batches
    assert int(model.optimizer.iterations.numpy()) == 2 * len(data())
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=2e-6)


def test_proportions_of_two_to_three_and_their_sizes_in_samples():
    """Sizes count the first stream's samples in the plan and the report, in multiples of two."""
    data = lambda: zipped((labelled(size=16), unlabelled(size=24)))  # noqa: E731
    difference, _, history, _ = both(mean_teacher, data, target=16, micro=7)
    assert difference < 2e-6
    assert history.plan.micro_batches == (6, 6, 4)
    assert (history.plan.micro_batch, history.plan.effective_batch) == (6, 16)
    report = autobatch.tune(made(mean_teacher), data(), target_batch=16, memory_limit="1GiB")
    assert report.plan.effective_batch == 16
    assert {trial.micro_batch % 2 for trial in report.trials} == {0}


@pytest.mark.filterwarnings("ignore:The parts of each element")
def test_several_elements_make_one_update():
    data = lambda: zipped((labelled(drop=False), unlabelled()))  # noqa: E731
    plain = lambda: zipped((labelled(size=16), unlabelled(size=48)))  # noqa: E731
    difference, _, history, _ = both(mean_teacher, data, target=16, micro=5, plain_data=plain)
    assert difference < 2e-6
    assert history.plan.accumulation_steps == 4


def test_where_one_stream_has_run_out_the_element_is_trained_whole():
    data = lambda: zipped((labelled(samples=60, drop=False), unlabelled()))  # noqa: E731
    with pytest.warns(autobatch.AutobatchWarning, match="parts have 4 and 24 rows, which are not the proportions"):
        difference, expected, history, model = both(mean_teacher, data, target=8, micro=3)
    assert difference < 2e-6
    assert int(model.optimizer.iterations.numpy()) == 16
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=2e-6)


@pytest.mark.parametrize(
    ("loss", "data", "micro", "said"),
    [
        pytest.param(graph, lambda: graphs((4, 9), (6, 6), (5, 11), (3, 8)), 2, "no common measure", id="a graph"),
        pytest.param(graph, lambda: graphs((12, 30), (12, 30)), "auto", "no common measure", id="of one size"),
        pytest.param(graph, lambda: graphs((4, 8), (5, 10), (6, 12)), "auto", "takes rows of the batch", id="1 to 2"),
        pytest.param(graph, lambda: graphs((4, 4), (6, 6), (5, 5)), 2, "takes rows of the batch", id="even"),
        pytest.param(graph, lambda: graphs((4, 4), (6, 6), (5, 5)), 4, "takes rows of the batch", id="even, not cut"),
        pytest.param(molecules, merged_molecules, 2, "target_batch=4 is no multiple", id="molecules"),
        pytest.param(
            gallery,
            lambda: Elements([(X[i : i + 1], U[i : i + 50]) for i in range(5)]),
            "auto",
            "1 and 50 rows",
            id="a query and its gallery",
        ),
        pytest.param(
            stacked,
            lambda: Elements([np.stack([X[i : i + 3], X[i + 3 : i + 6]]) for i in range(5)]),
            "auto",
            'test_uneven_elements.py", line [0-9]+ takes single rows',
            id="anchors and positives stacked",
        ),
    ],
)
def test_what_cannot_be_cut_is_trained_whole_and_said_once(loss, data, micro, said):
    with pytest.warns(autobatch.AutobatchWarning, match=said) as warnings:
        difference, _, history, model = both(loss, data, target=4, micro=micro)
    assert difference == 0
    assert int(model.optimizer.iterations.numpy()) == 2 * len(data())
    assert (history.plan.micro_batch, history.plan.effective_batch) == (1, 1)
    assert history.report.stopped_because.endswith("sizes count elements, which cannot be cut")
    assert len([each for each in warnings if issubclass(each.category, autobatch.AutobatchWarning)]) == 1


def test_a_step_that_runs_eagerly_is_looked_at_too():
    model = made(graph, run_eagerly=True)
    model(X[:2])  # one that is not built is not looked at
    with pytest.warns(autobatch.AutobatchWarning, match="takes rows of the batch by numbers"):
        history = autobatch.fit(model, graphs((4, 4), (6, 6), (5, 5)), target_batch=4, micro_batch=2, verbose=0)
    assert history.plan.effective_batch == 1
    streams = zipped((labelled(), unlabelled()))
    plain, model = made(mean_teacher), made(mean_teacher, run_eagerly=True)
    start = plain.get_weights()
    plain.fit(streams, verbose=0)
    autobatch.fit(model, streams, target_batch=8, micro_batch=3, verbose=0)
    assert off(model, plain, start) < 2e-6


def test_batches_that_cannot_be_read_again_are_refused_where_rows_are_taken_by_number():
    def numbered(x):
        edges = tf.numpy_function(lambda: np.array([0, 1]), [], tf.int64)
        return {"nodes": x, "edges": tf.ensure_shape(edges, [2])}

    batches = tf.data.Dataset.from_tensor_slices(X).map(numbered).batch(4)
    with pytest.raises(ValueError, match="cannot be read again to take each whole.*Received"):
        autobatch.fit(made(graph), batches, target_batch=8, micro_batch=2, verbose=0)


def test_molecules_with_a_target_in_atoms_are_taken_whole_for_their_edges():
    with pytest.warns(autobatch.AutobatchWarning, match="takes rows of the batch by numbers"):
        difference, _, history, _ = both(molecules, merged_molecules, target=20, micro="auto")
    assert difference == 0
    assert history.plan.effective_batch == 1


def test_validation_elements_are_cut_like_those_of_training_or_run_whole():
    streams = lambda: zipped((labelled(), unlabelled()))  # noqa: E731
    rest = zipped((labelled(samples=20, drop=False), unlabelled()))
    for validation in (streams(), rest):
        difference, expected, history, _ = both(
            mean_teacher, streams, target=8, micro=3, epochs=1, validation_data=validation
        )
        assert difference < 2e-6
        np.testing.assert_allclose(history.history["val_loss"], expected.history["val_loss"], rtol=2e-6)


# -- loops of the user's own ------------------------------------------------------------------------------------------


def looped(loss, elements, *, target, micro):
    plain, model = made(loss), made(loss)
    start = plain.get_weights()
    optimizer = keras.optimizers.SGD(0.1)

    def step(data):
        with tf.GradientTape() as tape:
            value = loss(model, data)
        weights = model.net.trainable_weights
        optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))
        return value

    wrapped = autobatch.wrap_step(step, model=model, optimizer=optimizer, target_batch=target, micro_batch=micro)
    for element in elements:
        plain.fit(Elements([element]), verbose=0)
        wrapped(element)
    return off(model, plain, start), wrapped


def test_a_loop_cuts_streams_in_proportion_and_trains_the_rest_whole():
    elements = [((X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]), U[24 * i : 24 * i + 24]) for i in range(4)]
    elements.insert(2, ((X[:3], Y[:3]), U[:24]))
    with pytest.warns(autobatch.AutobatchWarning, match="3 and 24 rows, which are not the proportions"):
        difference, wrapped = looped(mean_teacher, elements, target=8, micro=3)
    assert difference < 2e-6
    assert wrapped.report.plan.micro_batches == (3, 3, 2)


@pytest.mark.parametrize("sizes", [((4, 9), (6, 6), (5, 11)), ((4, 4), (6, 6), (5, 11))])
def test_a_loop_over_graphs_takes_each_whole(sizes):
    with pytest.warns(autobatch.AutobatchWarning, match="neither cut nor joined"):
        difference, wrapped = looped(graph, graphs(*sizes).elements, target=4, micro="auto")
    assert difference == 0
    assert wrapped.report.plan.effective_batch == 1


def test_a_loop_takes_elements_whole_where_the_target_cuts_no_portion():
    elements = [(U[24 * i : 24 * i + 24], (X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8])) for i in range(3)]
    with pytest.warns(autobatch.AutobatchWarning, match="target_batch=8 is no multiple.*give a multiple of 3"):
        difference, wrapped = looped(contrastive, elements, target=8, micro=2)
    assert difference == 0
    assert wrapped.report.plan.effective_batch == 1


# -- running out of memory --------------------------------------------------------------------------------------------


def test_recovery_halves_streams_in_proportion_and_counts_the_first():
    data = lambda: zipped((labelled(size=16), unlabelled(size=24)))  # noqa: E731
    plain, model = made(mean_teacher), made(mean_teacher, AtCall(2))
    start = plain.get_weights()
    plain.fit(data(), verbose=0)
    history = autobatch.fit(model, data(), target_batch=16, micro_batch=8, verbose=0)
    assert off(model, plain, start) < 2e-6
    assert [(each.micro_batch_before, each.micro_batch_after) for each in history.recoveries] == [(8, 6)]


def test_recovery_in_validation_counts_what_the_validation_batch_has():
    """Even batches count their own samples, though sizes of training are multiples of two."""

    class Validated(Stepping):
        def test_step(self, data):
            loss = tf.reduce_mean(self.net(data[0]) ** 2) * (1.0 + run_out_if(self.asked_in_test))
            return {"loss": loss}

    keras.utils.set_random_seed(1)
    model = Validated(mean_teacher)
    model.asked_in_test = AtCall(0)
    model.compile(keras.optimizers.SGD(0.1))
    streams = zipped((labelled(size=16), unlabelled(size=24)))
    history = autobatch.fit(model, streams, target_batch=16, micro_batch=8, validation_data=labelled(), verbose=0)
    assert [(each.micro_batch_before, each.micro_batch_after) for each in history.recoveries] == [(4, 3)]


def test_a_whole_element_that_does_not_fit_ends_training_in_words():
    elements = Elements([(X[i : i + 1], U[i : i + 50]) for i in range(4)])
    model = made(gallery, AtCall(2))
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even one element, which cannot be cut, fits"):
        autobatch.fit(model, elements, target_batch=4, micro_batch=1, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations.numpy()) == 2
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even a micro-batch of 1 fits|Not even one element"):
        autobatch.tune(made(gallery, lambda: True), elements, target_batch=4, cache=False)


def test_an_element_apart_gets_the_memory_of_the_accumulators_before_it_is_given_up():
    """The last element fails once beside them, and the training ends as in plain Keras."""
    data = lambda: zipped((labelled(samples=60, drop=False), unlabelled()))  # noqa: E731
    plain, model = made(mean_teacher), made(mean_teacher, AtCall(21))  # 7 updates of 3 micro-batches before it
    start = plain.get_weights()
    plain.fit(data(), verbose=0)
    history = autobatch.fit(model, data(), target_batch=8, micro_batch=3, verbose=0)
    assert off(model, plain, start) < 2e-6
    assert history.recoveries == ()
