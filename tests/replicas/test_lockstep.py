"""Work that all workers do, and what each of them learns of the others, with the other worker made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from autobatch.errors import WorkerLostError, WorkersDisagreeError
from autobatch.memory import oom
from autobatch.replicas.agreement import MOST_NUMBERS, SingleProcess
from autobatch.replicas.lockstep import ELSEWHERE, PLACE, Phase, Status, WorkerMessage, run_in_lockstep


class Two(SingleProcess):
    """An agreement with another worker, which sends what this one does but for what ``change`` does to the row."""

    count = 2

    def __init__(self, change=lambda other: None):
        self.change = change

    def gather(self, numbers, what):
        other = list(numbers)
        self.change(other)
        return np.asarray([numbers, other], "float64")


def run_out():
    """Really run out of memory: TensorFlow is asked for 64 TiB."""
    tf.fill([1 << 44], 0.0)
    return []


@pytest.mark.parametrize(
    "message",
    [
        WorkerMessage({}),
        WorkerMessage({PLACE: 1.0, "micro-batch": 4.0}, numbers=(2.0, -3.5, 0.0)),
        WorkerMessage({PLACE: 2.0}, Status.OUT_OF_MEMORY, fitting_now=7, requested_bytes=2**40),
        WorkerMessage({PLACE: 2.0}, Status.OUT_OF_MEMORY, fitting_now=0),
        WorkerMessage({PLACE: 3.0, "first sample": float(2**32 - 1)}, Status.FAILED),
    ],
)
@pytest.mark.parametrize("length", [None, MOST_NUMBERS])
def test_a_message_is_read_as_it_was_sent(message, length):
    row = message.to_row()
    padded = row if length is None else [*row, *[0.0] * (length - len(row))]
    sent = np.asarray(padded, "float64")
    assert WorkerMessage.from_row(sent, list(message.same), len(message.numbers)) == message


def test_one_process_agrees_with_itself():
    outcome = run_in_lockstep(SingleProcess(), lambda: [2.0, 3.0], Phase.COUNT, "update 1", {})
    assert outcome.rows.tolist() == [[2.0, 3.0]]
    outcome = run_in_lockstep(SingleProcess(), run_out, Phase.UPDATE, "update 1", {}, fitting_now=lambda: 3)
    assert outcome.diagnosis.is_memory
    assert outcome.fitting_now == 3


def test_agreeing_adds_up_what_the_workers_gave():
    outcome = run_in_lockstep(Two(), lambda: [2.0, 3.0], Phase.COUNT, "update 1", {"micro-batch": 4.0})
    assert outcome.diagnosis is None
    assert outcome.rows.sum(axis=0).tolist() == [4.0, 6.0]


def test_work_without_numbers_adds_up_to_none():
    assert run_in_lockstep(Two(), lambda: [], Phase.UPDATE, "update 1", {}).rows.sum(axis=0).tolist() == []


def test_the_smallest_size_that_any_worker_holds_to_fit_wins():
    def ran_out(other):
        other[2], other[3], other[4] = 1.0, 7.0, 4096.0

    outcome = run_in_lockstep(Two(ran_out), lambda: [], Phase.UPDATE, "update 1", {"micro-batch": 9.0})
    assert outcome.diagnosis.kind is oom.FailureKind.DEVICE
    assert outcome.diagnosis.is_memory
    assert outcome.diagnosis.requested_bytes == 4096
    assert outcome.diagnosis.detail == ELSEWHERE
    assert outcome.fitting_now == 7


def test_memory_that_ran_out_here_is_known_to_all():
    sent = []
    two = Two(lambda other: sent.append(WorkerMessage.from_row(other, [PLACE], 0)))
    outcome = run_in_lockstep(two, run_out, Phase.UPDATE, "update 1", {}, fitting_now=lambda: 5)
    assert [message.status for message in sent] == [Status.OUT_OF_MEMORY]
    assert (outcome.fitting_now, outcome.rows.shape) == (5, (2, 0))
    assert "OOM when allocating" in outcome.diagnosis.detail


def test_what_must_be_the_same_is_compared_by_name():
    def differ(other):
        other[1] = 5.0

    with pytest.raises(WorkersDisagreeError, match=r"differ in the micro-batch at update 1.*worker 0: 4, worker 1: 5"):
        run_in_lockstep(Two(differ), lambda: [], Phase.UPDATE, "update 1", {"micro-batch": 4.0})


def test_a_worker_at_another_place_sends_another_row():
    def in_a_trial(other):
        other[:] = [float(Phase.TRIAL), 8.0, 0.0, -1.0, -1.0, 0.125, *[0.0] * (len(other) - 6)]

    same = {"number of samples": 16.0, "first sample": 0.0, "micro-batch": 4.0, "number of updates": 0.0}
    with pytest.raises(WorkersDisagreeError, match=r"differ in the place in the training.*worker 0: 1, worker 1: 4"):
        run_in_lockstep(Two(in_a_trial), lambda: [1.0], Phase.COUNT, "update 0", same)


def test_an_error_of_a_workers_own_ends_the_others():
    def fail(other):
        other[1] = float(Status.FAILED)

    with pytest.raises(WorkerLostError, match=r"ended worker 1 in update 1; .* Received: failure on worker 1"):
        run_in_lockstep(Two(fail), lambda: [], Phase.UPDATE, "update 1", {})


def test_an_error_of_this_worker_is_sent_and_then_raised():
    sent = []
    two = Two(lambda other: sent.append(WorkerMessage.from_row(other, [PLACE], 0).status))
    with pytest.raises(ZeroDivisionError):
        run_in_lockstep(two, lambda: [1 / 0], Phase.UPDATE, "update 1", {})
    assert sent == [Status.FAILED]
