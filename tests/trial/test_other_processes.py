"""A trial that failed because another process took memory is told apart from one that was too large."""

from __future__ import annotations

import subprocess
import sys

import pytest
from models import AtCall, MemoryHog, arrays, classifier

from autobatch.data import fit_data
from autobatch.memory import limits
from autobatch.records import Limit, Outcome, TrialRequest
from autobatch.trial import other_processes
from autobatch.trial.live_trials import LiveTrials

PLENTY = 1 << 50  # more than the 64 TiB that a MemoryHog asks for

_HOLD = """
import sys
held = b"x" * int(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def limits_of(*gibibytes):
    """A source of limits that gives these in turn, and the last for ever."""
    remaining = list(gibibytes)

    def now(*_):
        return Limit((remaining.pop(0) if len(remaining) > 1 else remaining[0]) << 30, "as told")

    return now


@pytest.mark.skipif(sys.platform != "linux", reason="MemAvailable is Linux's")
def test_a_real_process_is_seen_to_take_host_memory_and_to_give_it_back():
    """Whatever else runs here takes and gives back memory too: of five attempts one is not disturbed."""
    told = []
    while len(told) < 5 and (True, False, True) not in told:
        told.append(_seen_to_take_and_give_back())
    assert (True, False, True) in told


def _seen_to_take_and_give_back():
    start = limits.find_limit("CPU:0")
    held_bytes = start.limit_bytes // 8
    command = [sys.executable, "-c", _HOLD, str(held_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        # Half of it is left to what else goes on on this machine meanwhile.
        before = Limit(start.limit_bytes - held_bytes // 2, start.source)
        taken = other_processes.taken_since(before, lambda: limits.find_limit("CPU:0"))
        at_once = other_processes.wait_until_back(before, lambda: limits.find_limit("CPU:0"), patience_seconds=0.01)
        holder.stdin.close()
        at_last = other_processes.wait_until_back(before, lambda: limits.find_limit("CPU:0"))
    return "another process took" in (taken or ""), at_once, at_last


def test_too_little_or_too_large_a_request_is_no_intruder():
    before = Limit(1000 << 30, "as told")
    assert other_processes.taken_since(before, limits_of(995)) is None
    assert other_processes.taken_since(before, limits_of(900), requested_bytes=1001 << 30) is None
    taken = other_processes.taken_since(before, limits_of(900), requested_bytes=999 << 30)
    assert taken == "meanwhile another process took 100 GiB"
    assert other_processes.taken_since(Limit(None, "none"), limits_of(900)) is None


def open_trials(too_many, find_limit):
    model = classifier(extra=[MemoryHog(too_many)])
    x, y = arrays()
    batches, _ = fit_data.prepare_data(model, x, y, target_batch=32, options={"shuffle": False}, only_look=True)
    return LiveTrials(
        model,
        batches,
        target_batch=None,
        user_limit_bytes=None,
        headroom=0.0,
        find_limit=find_limit,
        patience_seconds=0.05,
    )


def test_what_failed_beside_an_intruder_is_tried_once_more():
    whole = PLENTY >> 30
    trials = open_trials(AtCall(0), limits_of(whole, whole, whole // 2, whole))
    result = trials.run(TrialRequest(8))
    assert result.fits
    assert result.retried
    again = trials.run(TrialRequest(8))
    assert (again.outcome, again.retried) == (Outcome.FITS, False)
    trials.close()


def test_memory_that_stays_away_is_said_and_not_waited_for_for_ever():
    whole = PLENTY >> 30
    trials = open_trials(lambda _: True, limits_of(whole, whole, whole // 2))
    result = trials.run(TrialRequest(8))
    assert (result.outcome, result.retried) == (Outcome.OUT_OF_MEMORY, False)
    assert result.detail.endswith("and did not give it back)")
    trials.close()


def test_a_second_failure_is_the_sizes_own():
    whole = PLENTY >> 30
    calls = AtCall(*range(100))
    trials = open_trials(calls, limits_of(whole, whole, whole // 2, whole))
    result = trials.run(TrialRequest(8))
    assert (result.outcome, result.retried) == (Outcome.OUT_OF_MEMORY, True)
    assert calls.count == 1  # ran twice, not for ever
    trials.close()
