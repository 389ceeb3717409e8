"""Tests of the steps of a proof: few failures, hardly more trials than halving takes."""

from __future__ import annotations

import math

import pytest

from autobatch.records import Outcome, TrialResult
from autobatch.search import proof
from autobatch.search.bracket import Bracket


def proved(largest: int, low: int, high: int, trials: list[TrialResult]) -> list[TrialResult]:
    """Close the bracket between ``low`` and ``high``; ``largest`` is the largest size that fits."""
    bracket = Bracket(range(1, high + 1), low, high)
    trials = list(trials)
    while not bracket.is_closed:
        size = proof.between(bracket, trials)
        trials.append(TrialResult(size, Outcome.FITS if size <= largest else Outcome.OUT_OF_MEMORY))
        bracket = bracket.observe(size, fits=size <= largest)
    assert bracket.largest_fit == largest
    return trials


@pytest.mark.parametrize(("trials", "failures", "sizes"), [(0, 2, 0), (3, 0, 0), (5, 1, 5), (4, 2, 10), (4, 4, 15)])
def test_with_one_failure_sizes_are_run_from_below_and_with_many_they_are_halved(
    trials: int, failures: int, sizes: int
) -> None:
    assert proof.decided(trials, failures) == sizes


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_behind_a_first_failure_only_one_more_comes_where_few_sizes_are_left(gap: int) -> None:
    failed = [TrialResult(50, Outcome.FITS), TrialResult(101 + gap, Outcome.OUT_OF_MEMORY)]
    for largest in range(100, 101 + gap):
        trials = proved(largest, 100, 101 + gap, failed)
        assert len(trials) - 2 <= gap
        assert sum(not trial.fits for trial in trials) <= 2


@pytest.mark.parametrize("high", [105, 111, 140, 300])
def test_fewer_failures_cost_two_trials_beyond_halving_at_most(high: int) -> None:
    most = math.ceil(math.log2(high - 100))
    counts = [proved(largest, 100, high, [TrialResult(100, Outcome.FITS)]) for largest in range(100, high)]
    assert max(len(trials) - 1 for trials in counts) <= most + 2
    assert max(sum(not trial.fits for trial in trials) for trials in counts) < max(most, 3)


def test_beyond_a_prediction_that_fits_steps_are_as_long_as_six_trials_allow_and_then_a_twentieth() -> None:
    trials = [TrialResult(size, Outcome.FITS) for size in (37, 126)]
    run = []
    for _ in range(7):
        size = proof.beyond(Bracket(range(1, 1000), trials[-1].micro_batch), trials[-1].micro_batch, trials)
        trials.append(TrialResult(size, Outcome.FITS))
        run.append(size)
    assert run == [127, 130, 132, 136, 142, 149, 156]


def test_steps_of_thousands_of_samples_are_longer() -> None:
    trials = [TrialResult(size, Outcome.FITS) for size in (500, 4000, 4001)]
    assert proof.beyond(Bracket(range(1, 9000), 4001), 4001, trials) == 4031
