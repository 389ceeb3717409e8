"""An optimizer's update takes less room than Keras's, and no more than was asked for before it began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from autobatch.graphs import held_bytes
from autobatch.seams import update_order

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "update_room.py"

AT_ONCE = {"clipnorm", "global_clipnorm", "clipvalue", "LossScaleOptimizer"}
IN_TURN = ("SGD", "Adam", "AdamW", "Lion", "RMSprop", "Adamax", "Adagrad", "Lamb")


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    output = tmp_path_factory.mktemp("updates") / "update_room.json"
    command = [sys.executable, str(BENCHMARK), "--output", str(output)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.slow
class TestTheUpdateOfSixWeightsOfOneSize:
    def test_the_room_asked_for_is_enough_for_every_optimizer(self, updates):
        assert len(updates) == 20
        short = {name: update for name, update in updates.items() if update["used"] > update["room"]}
        assert not short

    def test_it_holds_less_than_keras_does(self, updates):
        # Clipped gradients are all there at once in both, give or take one.
        assert not {name for name in AT_ONCE if updates[name]["used"] > updates[name]["by_keras"] + 1.01}
        assert not {name for name in updates.keys() - AT_ONCE if updates[name]["used"] >= updates[name]["by_keras"]}
        # One weight after another, and for each one line after another: what all take is not there at any moment.
        assert updates["RMSprop"]["by_keras"] > 12
        for name in (*IN_TURN, "rows of a table"):
            assert updates[name]["used"] <= 2.1, name

    def test_no_more_is_asked_for_than_is_used(self, updates):
        for name in IN_TURN:
            assert updates[name]["room"] <= updates[name]["used"] + 0.3, name  # with each single number's 256 bytes
        assert updates["rows of a table"]["room"] <= 4
        # Gradients that are clipped all at once are all there before the first weight changes, and weights that were
        # written over by their averages have no buffer of their own.
        assert updates["global_clipnorm"]["room"] >= 6
        assert updates["EMA"]["room"] >= 6


def test_what_is_traced_while_updates_are_in_turn_waits_for_what_was_traced_before_it():
    first, second = tf.Variable(tf.zeros([8])), tf.Variable(tf.zeros([8]))

    @tf.function(autograph=False)
    def update(gradient):
        with update_order.updates_in_turn():
            doubled = 2.0 * gradient
            tf.distribute.get_strategy().extended.update(first, lambda variable: variable.assign_sub(doubled))
            tf.square(doubled, name="afterwards")
            second.assign_add(gradient)

    graph = update.get_concrete_function(tf.TensorSpec([8])).graph
    waits = {operation.type: [other.type for other in operation.control_inputs] for operation in graph.get_operations()}
    assert "Mul" in waits["AssignSubVariableOp"]
    assert "AssignSubVariableOp" in waits["Square"]
    assert "Square" in waits["AssignAddVariableOp"]


def test_a_buffer_that_is_read_under_another_name_is_not_written_over():
    shape = [256]

    @tf.function(autograph=False)
    def update(x):
        y = tf.exp(x)
        z = tf.negative(tf.identity(y))  # not in y's place, which is read below
        return tf.add(z, y)

    graph = update.get_concrete_function(tf.TensorSpec(shape)).graph
    assert sum(held_bytes.temporaries(graph, 0, unknown_bytes=0)) == 2 * 256 * 4


def test_weights_left_with_their_averages_buffers_are_counted():
    weight, average = tf.Variable(tf.zeros([64])), tf.Variable(tf.zeros([64]))

    def overwrite():
        weight.assign(average)
        return True

    @tf.function(autograph=False)
    def update(pred):
        tf.cond(pred, overwrite, lambda: False)

    graph = update.get_concrete_function(tf.TensorSpec([], tf.bool)).graph
    assert sum(held_bytes.temporaries(graph, 0, unknown_bytes=0)) >= 64 * 4


def test_a_table_that_rows_were_added_to_is_copied_when_it_is_read():
    table, shape = tf.Variable(tf.zeros([64, 4])), (64, 4)

    @tf.function(autograph=False)
    def update():
        table.assign(table.read_value() + 1.0)

    graph = update.get_concrete_function().graph
    assert sum(held_bytes.temporaries(graph, 0, unknown_bytes=0)) == 64 * 4 * 4
    # The sum is in the copy's place, and is copied itself when it is assigned.
    assert sum(held_bytes.temporaries(graph, 0, unknown_bytes=0, copied={shape})) == 2 * 64 * 4 * 4


def told(function, *specs):
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    return sum(held_bytes.temporaries(graph, 0, unknown_bytes=0))


SPEC = tf.TensorSpec([256])
UNIT = 256 * 4


def test_what_branches_and_functions_return_is_counted():
    double = tf.function(lambda x: 2.0 * x, autograph=False)
    number = tf.TensorSpec([], tf.int32)
    assert told(lambda x: double(x) + double(tf.exp(x)), SPEC) >= 3 * UNIT
    assert told(lambda i, x: tf.switch_case(i, [lambda: tf.exp(x), lambda: x * 2.0]), number, SPEC) >= 2 * UNIT


def test_elements_are_as_large_as_the_operation_makes_them():
    assert told(lambda x: tf.complex(x, x), SPEC) >= 2 * UNIT
    assert told(lambda x: tf.logical_not(x > 0), SPEC) >= 2 * 256


def test_small_blocks_take_the_allocators_unit_and_all_at_once():
    def scalars(x):
        return tf.add_n([tf.exp(x) for _ in range(100)])

    assert told(scalars, tf.TensorSpec([])) >= 100 * 256


def test_what_is_read_before_a_write_and_used_after_it_is_a_copy():
    variable = tf.Variable(tf.zeros([256]))

    def update(x):
        before = variable.read_value()
        with tf.control_dependencies([variable.assign_add(x)]):
            return before * 2.0

    assert told(update, SPEC) >= 2 * UNIT


def test_a_branch_that_only_touches_variables_waits_its_turn():
    variable = tf.Variable(tf.zeros([8]))

    def change():
        variable.assign_add(tf.ones([8]))

    @tf.function(autograph=False)
    def update(pred, gradient):
        with update_order.updates_in_turn():
            tf.square(gradient)
            tf.cond(pred, change, lambda: None)

    graph = update.get_concrete_function(tf.TensorSpec([], tf.bool), tf.TensorSpec([8])).graph
    branch = next(operation for operation in graph.get_operations() if operation.type in ("If", "StatelessIf"))
    assert "Square" in [other.type for other in branch.control_inputs]
