"""Rows that a step takes by their numbers: those that show that batches cannot be cut, and those that do not."""

import pytest
import tensorflow as tf

from autobatch.graphs.row_numbers import taken_by_number

SPECS = [tf.TensorSpec([None, 4]), tf.TensorSpec([None, 2], tf.int64)]
WEIGHTS = tf.Variable(tf.ones([9, 4]))


def found(step, given=SPECS, specs=SPECS):
    traced = tf.function(step, autograph=False, input_signature=given).get_concrete_function()
    return taken_by_number(traced.graph, specs)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        pytest.param(lambda x, i: tf.gather(x, i[:, 0]), "by numbers that the batch itself holds", id="edges"),
        pytest.param(lambda x, i: tf.gather(tf.nn.relu(x @ tf.ones([4, 3])), i), "by numbers", id="behind a layer"),
        pytest.param(lambda x, i: tf.gather(x, tf.where(i < 0, i + 5, i)), "by numbers", id="negative numbers"),
        pytest.param(lambda x, i: tf.gather_nd(x, i[:, :1]), "by numbers", id="gather_nd"),
        pytest.param(
            lambda x, i: tf.reduce_sum(x[0] * x[1]) + tf.cast(tf.size(i), tf.float32), "single rows", id="two rows"
        ),
    ],
)
def test_what_shows_that_batches_cannot_be_cut(step, words):
    sentence = found(step)
    assert words in sentence
    assert f'"{__file__}", line ' in sentence


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda x, i: tf.gather(WEIGHTS, i), id="an embedding"),
        pytest.param(lambda x, i: tf.gather(x, i, axis=1, batch_dims=1), id="within each sample"),
        pytest.param(lambda x, i: tf.gather(x, tf.argsort(x[:, 0])), id="an order of the batch"),
        pytest.param(lambda x, i: tf.gather(x, tf.range(tf.shape(x)[0])), id="all in turn"),
        pytest.param(lambda x, i: tf.gather(tf.reduce_sum(x, 0), i), id="of a sum"),
        pytest.param(lambda x, i: x[0] + tf.cast(i[0, 0], tf.float32), id="one row for all"),
        pytest.param(lambda x, i: tf.reduce_sum(x) + x[0] + x[1], id="rows, and all of them"),
        pytest.param(lambda x, i: x[:1] + x[1:2], id="slices"),
    ],
)
def test_what_shows_nothing(step):
    assert not found(step)


def test_a_function_of_something_else_is_not_looked_at():
    assert not found(lambda x: x[0] + x[1], [tf.TensorSpec([2, 4])], SPECS[:1])
