"""Values of variables by names: which of several of one name is which does not depend on a trace's order."""

import itertools

import numpy as np
import tensorflow as tf

from autobatch.backup import variables


def test_variables_of_one_name_are_told_by_their_creation_in_whatever_order_they_come():
    states = [tf.random.Generator.from_seed(seed).state for seed in range(3)]
    kept = variables.values_of(states, copies=True)
    assert len(kept) == 3
    before = [state.numpy() for state in states]
    for order in itertools.permutations(states):
        for state in states:
            state.assign(tf.zeros_like(state))
        variables.assign(order, kept)
        assert all(np.array_equal(state.numpy(), value) for state, value in zip(states, before, strict=True))
