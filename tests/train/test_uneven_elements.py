"""Elements whose parts have different numbers of rows train as in plain Keras: in proportion, or each whole."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from put_back import putting_back
from uneven import (
    Elements,
    U,
    X,
    Y,
    both,
    contrastive,
    fixmatch,
    gallery,
    graph,
    graphs,
    labelled,
    made,
    mean_teacher,
    merged_molecules,
    molecules,
    off,
    side_by_side,
    stacked,
    triplet,
    two_views,
    unlabelled,
    zipped,
)

import autobatch


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
            'uneven.py", line [0-9]+ takes single rows',
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


def test_batches_that_cannot_be_read_again_are_taken_whole_where_rows_are_taken_by_number():
    def numbered(x):
        edges = tf.numpy_function(lambda: np.array([0, 1]), [], tf.int64)
        return {"nodes": x, "edges": tf.ensure_shape(edges, [2])}

    batches = tf.data.Dataset.from_tensor_slices(X).map(numbered).batch(4)
    # The trace has shown it before anything of them was read.
    with pytest.warns(autobatch.AutobatchWarning, match="takes rows of the batch by numbers"):
        difference, _, history, _ = both(graph, lambda: batches, target=8, micro=2)
    assert difference == 0
    assert history.plan.effective_batch == 1


def test_molecules_with_a_target_in_atoms_are_taken_whole_for_their_edges():
    with pytest.warns(autobatch.AutobatchWarning, match="takes rows of the batch by numbers"):
        difference, _, history, _ = both(molecules, merged_molecules, target=20, micro="auto")
    assert difference == 0
    assert history.plan.effective_batch == 1


def test_validation_elements_are_cut_like_those_of_training_or_run_whole():
    streams = lambda: zipped((labelled(), unlabelled()))  # noqa: E731
    rest = zipped((labelled(samples=20, drop=False), unlabelled()))
    plain, model = made(mean_teacher), made(mean_teacher)
    start, options = plain.get_weights(), {"verbose": 0, "shuffle": False}
    back = [putting_back(each) for each in (plain, model)]
    for validation in (streams(), rest):
        for put_back in back:
            put_back()
        expected = plain.fit(streams(), validation_data=validation, **options)
        history = autobatch.fit(model, streams(), target_batch=8, micro_batch=3, validation_data=validation, **options)
        assert off(model, plain, start) < 2e-6
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
