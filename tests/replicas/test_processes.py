"""What processes give each other beside updates: in pieces, whole, and the same on all."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from autobatch.replicas import processes
from autobatch.replicas.agreement import SingleProcess


class Twins(SingleProcess):
    """An agreement with another worker that does the same."""

    count = 2

    def gather(self, numbers, what):
        return np.asarray([numbers, numbers], "float64")


@pytest.fixture
def several(monkeypatch):
    monkeypatch.setattr(processes, "SMALLEST_PIECE", 8)
    monkeypatch.setattr(processes, "LARGEST_PIECE", 32)
    return processes.SeveralProcesses(tf.distribute.MirroredStrategy(["CPU:0"]), Twins())


@pytest.mark.parametrize("size", [0, 1, 8, 9, 32, 33, 100])
def test_bytes_arrive_as_they_were_sent(several, size):
    data = bytes(range(size))
    assert several.from_chief(data, "bytes") == data
    pieces = processes._pieces(data, size)
    assert b"".join(pieces)[:size] == data
    assert len({len(piece) for piece in pieces}) <= 1
    assert all(len(piece) in (8, 16, 32) for piece in pieces)


def test_one_process_gives_itself_what_it_has():
    one = processes.OneProcess(3)
    assert (one.index, one.count, one.replicas) == (0, 1, 3)
    assert one.together(lambda: 5, "work") == 5
    assert one.gather([1.0], "numbers").tolist() == [[1.0]]
    assert one.of_each(b"own", "bytes") == [one.from_chief(b"own", "bytes")] == [b"own"]


def test_an_error_of_this_process_is_raised_as_it_is(several):
    with pytest.raises(ZeroDivisionError):
        several.together(lambda: 1 / 0, "work")
    assert several.together(lambda: 5, "work") == 5
