"""Private parts of TensorFlow's graphs: a clear failure where one of them moves."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from autobatch.graphs.replay import Replay, Source
from autobatch.seams.conditions import conditions_taken
from autobatch.seams.graph_functions import branch_around, functions_of, loop_around


def traced(function):
    return tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec([None], tf.float32))


def test_operations_are_made_again_in_another_graph_with_the_functions_that_they_run():
    variable = tf.Variable(2.0)
    table = tf.constant([1.0, 10.0])  # captured

    @tf.function(autograph=False)
    def called(x):
        return x + variable

    def step(x):
        total = tf.while_loop(lambda i, s: i < 3, lambda i, s: (i + 1, s + called(x)), (0, tf.zeros_like(x)))[1]
        return tf.cond(variable > 1.0, lambda: total * table[1], lambda: total)

    concrete = traced(step)
    source = Source(concrete.graph)
    (result,) = concrete.graph.outputs

    def again(x):
        replay = Replay(source, {id(source.arguments[0]): x})
        replay.run((each for each in concrete.graph.get_operations() if each.type != "Placeholder"), {})
        return replay.of(result)

    function = traced(again)
    x = tf.constant([1.0, 5.0])
    np.testing.assert_allclose(function(x), [90.0, 210.0])
    variable.assign(0.0)
    np.testing.assert_allclose(function(x), [3.0, 15.0])
    kinds = {each.type: functions_of(each) for each in concrete.graph.get_operations()}
    assert [len(kinds[kind]) for kind in ("While", "StatelessIf")] == [2, 2]
    assert kinds["Placeholder"] is None


def test_loops_and_branches_are_known_by_their_graphs():
    seen = []

    def step(x):
        outer = tf.compat.v1.get_default_graph()

        def look(*given):
            graph = tf.compat.v1.get_default_graph()
            seen.append((loop_around(graph, outer), branch_around(graph, outer)))
            return given[0] if given else x

        look()
        tf.cond(x[0] > 0, look, lambda: x)
        tf.while_loop(lambda i: i < 1, lambda i: tf.cond(i > 0, lambda: look(i), lambda: i) + 1, [0])
        return x

    traced(step)
    assert seen == [(False, False), (False, True), (True, True)]


def test_conditions_are_taken_however_they_are_written():
    import keras

    taken = []

    def take(original, pred, true_fn, false_fn):
        taken.append(pred)
        return original(pred, true_fn, false_fn)

    def step(x):
        one = tf.cond(x[0] > 0, lambda: x, lambda: -x)
        return one + keras.ops.cond(x[0] > 1, lambda: x, lambda: -x)

    @tf.function
    def converted(x):
        if x[0] > 0:
            return x
        return -x

    with conditions_taken(take):
        traced(step)
        converted.get_concrete_function(tf.TensorSpec([None], tf.float32))
    assert len(taken) == 3
    traced(step)
    assert len(taken) == 3
