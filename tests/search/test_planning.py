from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.records import Outcome, Plan, TrialResult
from autobatch.search import candidate_sizes, make_plan
from autobatch.search.planning import update_seconds, worth_one_shape


def timed(micro_batch: int, step_seconds: float | None, apply_seconds: float | None = 0.0) -> TrialResult:
    return TrialResult(micro_batch, Outcome.FITS, step_seconds=step_seconds, apply_seconds=apply_seconds)


def test_candidates_equal_brute_force() -> None:
    for target in range(1, 200):
        brute = sorted({math.ceil(target / k) for k in range(1, target + 1)})
        assert list(candidate_sizes(target)) == brute
        for most in range(1, target + 3):
            assert list(candidate_sizes(target, most)) == [size for size in brute if size <= most]


def test_a_target_of_256_has_31_candidates() -> None:
    assert len(candidate_sizes(256)) == 31
    assert candidate_sizes(256)[-4:] == (64, 86, 128, 256)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (8, 0)])
def test_candidates_refuse_sizes_below_one(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Received:"):
        candidate_sizes(*arguments)


def test_the_shortest_whole_update_wins() -> None:
    trials = [timed(16, 0.010), timed(64, 0.060), timed(32, 0.030)]
    assert make_plan(trials, target_batch=64) == Plan(16, 4, 64)
    assert make_plan(trials, target_batch=64, objective="largest") == Plan(64, 1, 64)


def test_the_ragged_last_micro_batch_counts_at_its_fraction() -> None:
    # 100 samples by 40 are 2.5 micro-batches, not 3.
    assert update_seconds(timed(40, 0.4, 0.1), 100) == pytest.approx(2.5 * 0.4 + 0.1)
    assert update_seconds(timed(40, None), 100) is None


def test_among_nearly_equal_sizes_one_that_divides_the_target_wins() -> None:
    trials = [timed(86, 0.0850), timed(64, 0.0640), timed(32, 0.0330)]
    assert make_plan(trials, target_batch=256) == Plan(64, 4, 256)
    slower = [timed(86, 0.0850), timed(64, 0.0660)]
    assert make_plan(slower, target_batch=256) == Plan(86, 3, 256)


def test_only_sizes_that_fit_and_were_run_are_planned() -> None:
    trials = [
        timed(8, 0.1),
        TrialResult(64, Outcome.OUT_OF_MEMORY, step_seconds=0.001),
        TrialResult(32, Outcome.TIMED_OUT),
    ]
    assert make_plan(trials, target_batch=64) == Plan(8, 8, 64)


def test_without_times_the_largest_is_taken() -> None:
    assert make_plan([timed(8, None), timed(16, None)], target_batch=64) == Plan(16, 4, 64)


@pytest.mark.parametrize("trials", [[], [TrialResult(8, Outcome.OUT_OF_MEMORY)], [timed(65, 0.1)]])
def test_there_is_no_plan_without_a_size_that_fits(trials: list[TrialResult]) -> None:
    with pytest.raises(ValueError, match="Received:"):
        make_plan(trials, target_batch=64)


@pytest.mark.parametrize("arguments", [{"target_batch": 0}, {"target_batch": 8, "objective": "fastest"}])
def test_arguments_out_of_range_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Received:"):
        make_plan([timed(8, 0.1)], **arguments)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 1.0), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 300),
)
def test_a_plan_is_within_two_percent_of_the_best(rows: list[tuple[int, float, bool]], target: int) -> None:
    trials = [
        TrialResult(size, Outcome.FITS if ok else Outcome.OUT_OF_MEMORY, step_seconds=seconds, apply_seconds=0.01)
        for size, seconds, ok in rows
    ]
    usable = [trial for trial in trials if trial.fits and trial.micro_batch <= target]
    if not usable:
        return
    plan = make_plan(trials, target_batch=target)
    times = [(update_seconds(trial, target) or 0.0, trial.micro_batch) for trial in usable]
    best = min(times)[0]
    assert min(seconds for seconds, size in times if size == plan.micro_batch) <= 1.02 * best


def test_where_each_shape_is_compiled_a_size_that_divides_the_target_may_take_5_percent_longer() -> None:
    trials = [timed(86, 0.0850), timed(64, 0.0660), timed(32, 0.0400)]  # 64 takes 4 % longer, 32 takes 26 %
    assert make_plan(trials, target_batch=256, one_shape=True) == Plan(64, 4, 256)
    slower = [timed(86, 0.0850), timed(64, 0.0670)]  # 5.9 %
    assert make_plan(slower, target_batch=256, one_shape=True) == Plan(86, 3, 256)
    assert make_plan(trials, target_batch=256, objective="largest", one_shape=True) == Plan(86, 3, 256)


def test_where_each_shape_is_compiled_sizes_just_above_one_that_divides_the_target_are_no_candidates() -> None:
    for target in range(1, 400):
        every = candidate_sizes(target)
        kept = candidate_sizes(target, one_shape=True)
        dividing = [size for size in every if target % size == 0]
        assert set(dividing) <= set(kept) <= set(every)
        for left_out in set(every) - set(kept):
            below = max(size for size in dividing if size < left_out)
            # The steps that it saves are at most a tenth, of which at most half is no work on samples.
            assert -(-target // below) <= 1.1 * target / left_out + 1e-9
    assert candidate_sizes(480, 52)[-3:] == (40, 44, 48)
    assert candidate_sizes(480, 52, one_shape=True)[-2:] == (40, 48)


def test_a_size_that_divides_the_target_is_worth_a_trial_if_it_is_likely_to_be_planned() -> None:
    # By the line through both, 32 samples take 0.0335 s: 2 % longer for each than 47.
    line = [timed(13, 0.0145), timed(47, 0.0485)]
    assert worth_one_shape(line, target_batch=512) == 32
    assert worth_one_shape([*line, timed(32, 0.05)], target_batch=512) is None  # it has been run
    assert worth_one_shape([timed(13, 0.0300), timed(47, 0.0500)], target_batch=512) is None  # 21 % longer
    assert worth_one_shape([timed(13, 0.0145), timed(64, 0.0655)], target_batch=512) is None  # divides it already
    assert worth_one_shape([timed(47, None)], target_batch=512) is None
