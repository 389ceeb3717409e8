"""A search in which one sample runs within the limit, but not beside the headroom."""

from __future__ import annotations

import pytest

from autobatch.records import Outcome, SampleEstimate, TrialRequest, TrialResult
from autobatch.search import Goal, Room, search

LIMIT = 40_000_000
BUDGET = 38_000_000


def trials(workspace: int, per_sample: int):
    """A model that takes a constant workspace as soon as it runs; more than the limit ends a trial without a peak."""

    def run(request: TrialRequest) -> TrialResult:
        peak = workspace + per_sample * request.micro_batch
        if peak > LIMIT:
            return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY)
        outcome = Outcome.FITS if peak <= BUDGET else Outcome.OUT_OF_MEMORY
        return TrialResult(request.micro_batch, outcome, peak_bytes=peak, detail="" if peak <= BUDGET else "over")

    return run


@pytest.mark.parametrize("estimated", [True, False])
@pytest.mark.parametrize("target", [None, 64, 256])
def test_the_search_goes_on_to_what_the_limit_holds(target: int | None, estimated: bool) -> None:
    asked: list[int] = []
    run = trials(workspace=38_500_000, per_sample=40_000)  # 37 samples fit within the limit, none within the budget

    def counted(request: TrialRequest) -> TrialResult:
        asked.append(request.micro_batch)
        return run(request)

    estimate = SampleEstimate(50_000.0, 10_000.0)
    result = search(
        counted,
        Goal(target_batch=target),
        Room(BUDGET, headroom_bytes=LIMIT - BUDGET, fixed_bytes_hint=1_000_000),
        estimate_sample=(lambda: estimate) if estimated else None,
    )
    assert result.headroom_given_up
    assert result.largest_fit is not None
    assert 32 <= result.largest_fit <= 37
    assert len(set(asked)) == len(asked), "what has run within the limit is not run again"
    assert {trial.micro_batch for trial in result.trials if trial.fits} == {size for size in asked if size <= 37}
    assert all(trial.detail == "" for trial in result.trials if trial.fits)


def test_where_one_sample_does_not_run_at_all_nothing_is_given_up() -> None:
    result = search(
        trials(workspace=LIMIT, per_sample=1),
        Goal(),
        Room(BUDGET, headroom_bytes=LIMIT - BUDGET, fixed_bytes_hint=1_000_000),
    )
    assert result.largest_fit is None
    assert not result.headroom_given_up
    assert result.stopped_because == "not even a micro-batch of 1 fits"


def test_where_a_sample_fits_beside_it_the_headroom_is_kept() -> None:
    run = trials(workspace=30_000_000, per_sample=700_000)
    result = search(run, Goal(), Room(BUDGET, headroom_bytes=LIMIT - BUDGET, fixed_bytes_hint=30_000_000))
    assert not result.headroom_given_up
    assert result.largest_fit == 11
