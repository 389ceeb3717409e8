"""What a search makes of what is remembered, with trials that follow a memory curve."""

from __future__ import annotations

import sqlite3

import pytest

from autobatch.cache.folder import cache_folder
from autobatch.cache.store import ResultStore
from autobatch.errors import NoFeasibleBatchError
from autobatch.records import Environment, Outcome, Plan, TrialResult
from autobatch.sizing.search_trials import search_with

MIB = 2**20


class Curve:
    """Trials of ``per_sample_mib`` a sample within a limit; a step takes ``seconds(size)``."""

    largest_useful = 1000
    fixed_bytes_hint = None
    model_name = "curve"
    warnings = notes = ()
    host_uses = ()
    replicas = 1

    def __init__(self, per_sample_mib=10, *, limit_mib=1000, content="content", seconds=lambda size: 0.01 * size):
        budget = None if limit_mib is None else limit_mib * MIB
        self.environment = Environment("CPU:0", budget, "given", budget, 0.0, "float32", False)
        self.per_sample_mib = per_sample_mib
        self.content = content
        self.seconds = seconds
        self.asked = []

    def estimate_sample(self):
        return None

    def run(self, request):
        size = request.micro_batch
        self.asked.append(size)
        peak = self.per_sample_mib * size * MIB
        outcome = Outcome.FITS if peak <= self.environment.budget_bytes else Outcome.OUT_OF_MEMORY
        return TrialResult(size, outcome, peak, self.seconds(size), 0.001)

    def close(self):
        pass


def search(trials, target_batch=256, **options):
    return search_with(trials, target_batch=target_batch, cache=True, **options)


def entries():
    return ResultStore(cache_folder()).entries()


def test_without_a_target_the_largest_is_confirmed():
    first = search(Curve(), None)
    again = search(trials := Curve(), None)
    assert trials.asked == [first.largest_fit]
    assert (again.plan, again.largest_fit, again.smallest_failure) == (None, first.largest_fit, None)


def test_a_fast_small_size_is_confirmed_and_the_largest_not_claimed():
    def slow_above_32(size):
        return 0.01 * size * (1 if size <= 32 else 3)

    first = search(Curve(seconds=slow_above_32))
    assert first.plan.micro_batch < first.largest_fit
    again = search(trials := Curve(seconds=slow_above_32))
    assert trials.asked == [first.plan.micro_batch]
    assert again.plan == first.plan
    assert again.largest_fit == first.plan.micro_batch
    assert f"up to {first.largest_fit} fitted then" in again.stopped_because

    proven = search(Curve(seconds=slow_above_32), exact=True)
    assert proven.smallest_failure is not None
    again = search(trials := Curve(seconds=slow_above_32), exact=True)
    assert sorted(trials.asked) == [proven.plan.micro_batch, proven.largest_fit]
    assert (again.plan, again.largest_fit) == (proven.plan, proven.largest_fit)
    assert again.smallest_failure == proven.smallest_failure


def test_a_model_that_needs_much_less_than_it_did_is_searched_anew():
    first = search(Curve(10))
    told = []
    # The same content, as far as the digest can tell.
    trials = Curve(5)
    again = search(trials, on_trial=told.append)
    assert again.largest_fit > first.largest_fit
    assert trials.asked[0] == first.plan.micro_batch
    assert len(set(trials.asked)) == len(trials.asked)
    assert [trial.micro_batch for trial in told] == trials.asked
    assert {trial.micro_batch for trial in again.trials} == set(trials.asked)
    assert [found.micro_batch for found in entries()] == [again.plan.micro_batch]


def test_a_few_bytes_less_are_no_reason():
    search(Curve(10))
    search(trials := Curve(9.5))
    assert len(trials.asked) == 1


def test_what_fits_whole_is_confirmed_however_little_it_needs():
    search(Curve(1), 64)
    search(trials := Curve(0.1, limit_mib=3000), 64)
    assert trials.asked == [64]


def test_a_smaller_limit_is_for_the_trial_to_tell():
    first = search(Curve())
    search(trials := Curve(limit_mib=990), on_trial=None)
    fits = 10 * first.plan.micro_batch <= 990
    assert (len(trials.asked) == 1) == fits
    search(trials := Curve(limit_mib=600))
    assert len(trials.asked) > 1
    assert len(entries()) == 2


def test_nothing_fits_is_not_remembered():
    with pytest.raises(NoFeasibleBatchError):
        search(Curve(2000))
    assert entries() == ()


def test_a_trial_that_timed_out_tells_of_the_machine_and_is_not_remembered():
    class Late(Curve):
        def run(self, request):
            if request.micro_batch > 60:
                return TrialResult(request.micro_batch, Outcome.TIMED_OUT)
            return super().run(request)

    assert search(Late()).largest_fit <= 60
    assert entries() == ()


def test_a_row_that_was_tampered_with_is_no_answer():
    search(Curve())
    connection = sqlite3.connect(ResultStore(cache_folder()).path)
    connection.execute("UPDATE results SET micro_batch = 200, largest_fit = 200, peak_bytes = NULL")
    connection.commit()
    connection.close()
    again = search(trials := Curve())
    assert trials.asked[0] == 200
    assert again.plan.micro_batch <= 100
    assert again.trials[0].micro_batch == 200
    assert not again.trials[0].fits


def test_the_target_is_at_most_what_the_data_hold():
    trials = Curve(1)
    trials.largest_useful = 40
    first = search(trials, 64)
    assert first.plan == Plan(40, 1, 40)
    again = Curve(1)
    again.largest_useful = 40
    assert search(again, 64).plan == first.plan
    assert again.asked == [40]
