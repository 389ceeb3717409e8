"""What of a traced step runs in which pass over the micro-batches, and what between two of them."""

from __future__ import annotations

import pytest
import tensorflow as tf

from autobatch.graphs.accesses import OUTSIDE, Accesses
from autobatch.graphs.levels import Interlude, Levels


class Trace:
    """A traced function of a batch, in which ``update`` marks an update of a variable by a gradient."""

    def __init__(self, step, by_micro_batch=()):
        self.named = {}
        self._marks = []
        self.graph = (
            tf.function(lambda x: step(self, x), autograph=False)
            .get_concrete_function(tf.TensorSpec([None, 2], tf.float32))
            .graph
        )
        interludes = [
            Interlude(position, [gradient], (id(variable.handle),), after_pass=True)
            for position, gradient, variable in self._marks
        ]
        self.levels = Levels(
            self.graph, interludes, by_micro_batch=[id(variable.handle) for variable in by_micro_batch]
        )
        self.interludes = [each.level for each in interludes]

    def update(self, variable, gradient):
        self._marks.append((len(tf.compat.v1.get_default_graph().get_operations()), gradient, variable))

    def name(self, name, tensor):
        self.named[name] = tensor
        return tensor

    def level(self, name):
        return self.levels.of(self.named[name])


@pytest.fixture
def weights():
    return [tf.Variable([1.0, 2.0]) for _ in range(3)]


def test_a_pass_begins_where_an_updated_variable_is_read(weights):
    one, other, _ = weights

    def step(trace, x):
        first = trace.name("first", tf.reduce_mean(x * one, 0))
        apart = trace.name("apart", tf.reduce_mean(x * other, 0))
        trace.update(one, first)
        trace.name("behind", tf.reduce_mean(x * other, 0) + apart)
        second = trace.name("second", tf.reduce_mean(x * one, 0))
        trace.update(other, second)
        trace.name("weight", other + 0.0)
        return trace.name("old", first + 1.0)

    trace = Trace(step)
    assert trace.interludes == [2, 4]
    levels = {name: trace.level(name) for name in trace.named}
    assert levels == {"first": 1, "apart": 1, "behind": 1, "second": 3, "weight": 4, "old": 1}


def test_updates_of_what_nobody_reads_follow_one_pass(weights):
    def step(trace, x):
        gradients = [tf.reduce_mean(x * weight, 0) for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            trace.update(weight, gradient)
        return x

    assert Trace(step).interludes == [2, 2, 2]


def test_assignments_that_do_not_look_at_the_data_are_made_once_at_their_place(weights):
    one, slow, counted = weights

    def step(trace, x):
        trace.update(one, tf.reduce_mean(x * one, 0))
        one.assign(tf.clip_by_value(one, -1.0, 1.0))
        slow.assign(0.9 * slow + 0.1 * one)
        counted.assign_add(tf.reduce_sum(x, 0))
        return x

    trace = Trace(step)
    writes = [each for each in trace.levels.operations if trace.levels.access(each).writes]
    assert [trace.levels.level_of(each) for each in writes] == [2, 2, 1]
    assert [trace.levels.is_of_micro_batch(each) for each in writes] == [False, False, True]
    assert id(counted.handle) in trace.levels.by_micro_batch


def test_what_starts_a_draw_moves_with_every_micro_batch():
    seed, kept = tf.Variable([1, 2]), tf.Variable([0.0])

    def step(trace, x):
        drawn = tf.random.stateless_normal(tf.shape(x), seed.read_value())
        seed.assign_add([1, 0])
        kept.assign(kept * 0.5)
        return trace.name("drawn", drawn * x)

    trace = Trace(step)
    assert id(seed.handle) in trace.levels.by_micro_batch
    assert id(kept.handle) not in trace.levels.by_micro_batch


def test_accesses_of_operations_and_of_what_they_call(weights):
    read, written, _ = weights

    @tf.function(autograph=False)
    def called(x):
        written.assign_add([1.0, 1.0])
        return x * read

    def step(x):
        tf.print(x)
        tf.numpy_function(lambda: None, [], [])
        drawn = tf.random.normal([2])
        return called(x) + drawn + tf.cond(read[0] > 0, lambda: read * 2.0, lambda: read * 3.0)

    graph = tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec([None, 2], tf.float32)).graph
    accesses = Accesses(graph)
    found = {each.type: accesses.of(each) for each in graph.get_operations()}
    call = found["StatefulPartitionedCall"]
    assert (call.reads, call.writes, call.must_run) == ((id(read.handle),), (id(written.handle),), True)
    assert found["If"].reads == (id(read.handle),)
    assert not found["If"].must_run
    assert found["RandomStandardNormal"].draws
    assert not found["RandomStandardNormal"].must_run
    assert found["PrintV2"].must_run
    assert not found["PrintV2"].writes
    acting = next(access for kind, access in found.items() if kind.endswith("PyFunc"))
    assert acting.writes == (OUTSIDE,)
