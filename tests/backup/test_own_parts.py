"""Parts that a process has of its own: as bytes, and as the chief keeps them, with the other process made by hand."""

from __future__ import annotations

import types

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import autobatch
from autobatch.backup import own_parts, packing
from autobatch.replicas.processes import OneProcess


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"text": "ü", "none": None, "list": [1, 2.5, float("-inf")], "deep": {"array": np.arange(6).reshape(2, 3)}},
        {"half": np.ones((2, 2), ml_dtypes.bfloat16), "empty": np.zeros((0, 3)), "scalar": np.float32(0.1)},
        {"zero": np.array(-0.0), "nan": np.array([np.nan], "float32")},
    ],
)
def test_a_state_comes_back_from_bytes_as_it_was(state):
    found = packing.from_bytes(packing.to_bytes(state))
    assert packing.to_bytes(found) == packing.to_bytes(state)
    assert list(found) == list(state)


class Other(OneProcess):
    """The chief beside a process that has the same marks but for those of ``differing``, and gives ``sent``."""

    count = 2

    def __init__(self, differing, sent):
        super().__init__(2)
        self.differing, self.sent, self.asked = differing, sent, 0

    def gather(self, numbers, what):
        other = [number + (place in self.differing) for place, number in enumerate(numbers)]
        return np.asarray([numbers, other])

    def of_each(self, data, what):
        self.asked += 1
        return [data, packing.to_bytes(self.sent)]


def training(*callbacks):
    return types.SimpleNamespace(
        callbacks=list(callbacks), batches=types.SimpleNamespace(loader=None), variables=[tf.Variable(1.0)], alike=[]
    )


def test_what_is_as_the_chiefs_is_not_sent():
    same = Other((), {})
    assert own_parts.gathered(same, training()) == [{}]
    assert same.asked == 0
    apart = Other((1,), {"random": {"python": 3}})
    assert own_parts.gathered(apart, training()) == [{"random": {"python": 3}}]
    assert own_parts.gathered(OneProcess(), training()) == []


def test_a_state_that_cannot_be_kept_is_named_and_ends_nothing():
    class Odd(keras.callbacks.Callback):
        def get_state(self):
            return {"file": object()}

        def set_state(self, state):
            pass

    with pytest.warns(autobatch.errors.AutobatchWarning, match="This worker's callbacks are in no backup"):
        assert own_parts.gathered(Other((), {}), training(Odd())) == [{}]
