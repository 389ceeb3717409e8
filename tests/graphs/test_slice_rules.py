"""Tensors put side by side along the samples are followed until they are taken apart again, at their own bounds."""

import pytest
import tensorflow as tf

from autobatch.graphs.sample_flow import SampleFlow


def flow_of(function):
    """The dependence of what ``function(x, u)`` returns, for n rows of x and 3 n rows of u."""
    specs = [tf.TensorSpec([None, 4]), tf.TensorSpec([None, 3, 4])]
    graph = (
        tf.function(lambda x, u: function(x, tf.reshape(u, [-1, 4])), autograph=False)
        .get_concrete_function(*specs)
        .graph
    )
    flow = SampleFlow.of_leaves(graph.inputs[:2], ())
    return [flow.of(output) for output in graph.outputs]


def side_by_side(x, u):
    return tf.nn.relu(tf.concat([x, u, x], 0) @ tf.ones([4, 2]) + 1.0)


@pytest.mark.parametrize(
    ("taken", "parts"),
    [
        pytest.param(lambda x, u: side_by_side(x, u)[: tf.shape(x)[0]], 1, id="the first"),
        pytest.param(lambda x, u: side_by_side(x, u)[tf.shape(x)[0] :], 4, id="all but the first"),
        pytest.param(
            lambda x, u: side_by_side(x, u)[tf.shape(x)[0] :][: tf.shape(u, tf.int64)[0]], 3, id="one in the middle"
        ),
        pytest.param(lambda x, u: tf.split(tf.concat([u, u], 0), 2)[1], 3, id="halves"),
        pytest.param(
            lambda x, u: tf.split(tf.concat([x, u], 0), tf.stack([tf.shape(x)[0], tf.shape(u)[0]]))[1], 3, id="by sizes"
        ),
        pytest.param(
            lambda x, u: tf.reshape(tf.concat([x, u], 0), [-1, 2, 2])[: tf.shape(x)[0]], 1, id="reshaped rows"
        ),
    ],
)
def test_what_was_put_side_by_side_is_taken_apart(taken, parts):
    (found,) = flow_of(taken)
    assert (found.axis, found.parts, found.unknown) == (0, parts, "")
    (mean,) = flow_of(lambda x, u: tf.reduce_sum(taken(x, u)))
    assert mean.is_plain_sum
    assert mean.degree == 1


@pytest.mark.parametrize(
    "taken",
    [
        pytest.param(lambda x, u: u[: tf.shape(x)[0]], id="a third of one tensor"),
        pytest.param(lambda x, u: tf.concat([x, u], 0)[: 2 * tf.shape(x)[0]], id="no bound of either"),
        pytest.param(lambda x, u: tf.concat([x, u], 0)[:5], id="a fixed number"),
        pytest.param(lambda x, u: tf.concat([x, u], 0)[: tf.shape(x)[0] : 2], id="every second"),
        pytest.param(lambda x, u: tf.split(tf.concat([x, u], 0), 2)[0], id="halves across the bound"),
        pytest.param(lambda x, u: tf.concat([x[x[:, 0] > 0], u], 0)[: tf.shape(x)[0]], id="samples picked before"),
        pytest.param(lambda x, u: tf.reshape(tf.concat([x, u], 0), [-1, 8])[: tf.shape(x)[0]], id="rows joined"),
    ],
)
def test_any_other_slice_takes_some_of_the_samples(taken):
    assert flow_of(taken)[0].unknown
