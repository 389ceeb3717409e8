"""Searches over every curve small enough to enumerate, and over drawn ones for the rest."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.allocation_trace import AllocationTrace
from autobatch.records import Outcome, SampleEstimate, SearchResult, TrialRequest, TrialResult
from autobatch.search import Goal, Limits, Room, candidate_sizes, make_plan, search
from autobatch.search.driver import TIMED_STEPS

from .curves import CompiledDevice, Device, RecordingDevice

FAILURES = ("silent", "names_bytes", "measured")


def failures(result: SearchResult) -> int:
    return sum(not trial.fits for trial in result.trials)


def ran(result: SearchResult) -> list[int]:
    return [trial.micro_batch for trial in result.trials]


def check_invariants(result: SearchResult, candidates: Sequence[int]) -> None:
    outcomes = {trial.micro_batch: trial.fits for trial in result.trials}
    assert len(outcomes) == len(result.trials), "no size is run twice"
    assert all(size in candidates for size in outcomes)
    assert result.largest_fit is None or outcomes[result.largest_fit]
    assert result.smallest_failure is None or not outcomes[result.smallest_failure]
    assert result.stopped_because


def check_proof(result: SearchResult, candidates: Sequence[int]) -> None:
    """What fits is the top, or the very next candidate was run and failed."""
    if result.largest_fit is None:
        assert result.smallest_failure == 1
    elif result.largest_fit != candidates[-1]:
        assert result.smallest_failure == candidates[bisect_right(candidates, result.largest_fit)]


# Every sequence of up to five rises, each one of three: 363 monotone curves, with bends up and down and flats.
SMALL_CURVES = [rises for count in range(1, 6) for rises in itertools.product((0, 3, 10), repeat=count)]


def curve_of(rises: Sequence[int]) -> Callable[[int], int]:
    peaks = [10 + sum(rises[:count]) for count in range(len(rises) + 1)]
    return lambda micro_batch: 1000 * peaks[min(micro_batch, len(rises))]


@pytest.mark.parametrize("exact", [True, False])
def test_every_small_monotone_curve_at_every_limit(exact: bool) -> None:
    for rises in SMALL_CURVES:
        candidates = range(1, len(rises) + 1)
        device_curve = curve_of(rises)
        # Exactly at every peak, and a byte below it.
        for budget in {device_curve(b) + d for b in range(len(rises) + 1) for d in (-1, 0)}:
            for hint, failure in ((None, "silent"), (10_000, "silent"), (5_000, "measured")):
                device = Device(device_curve, budget, failure)
                result = search(
                    device, Goal(max_micro_batch=len(rises), exact=exact), Room(budget, fixed_bytes_hint=hint)
                )
                check_invariants(result, candidates)
                true = device.largest(candidates)
                if exact:
                    assert result.largest_fit == true
                    check_proof(result, candidates)
                else:
                    assert (result.largest_fit is None) == (true is None)
                    assert (result.largest_fit or 0) <= (true or 0)
                assert len(result.trials) <= len(rises)


@pytest.mark.parametrize("keeps_peaks", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_every_set_of_sizes_that_fit_monotone_or_not(exact: bool, keeps_peaks: bool) -> None:
    for target in (None, 10):
        candidates = range(1, 8) if target is None else candidate_sizes(target)
        for fitting in itertools.product((True, False), repeat=len(candidates)):
            fits = dict(zip(candidates, fitting, strict=True))
            device = Device(lambda b, fits=fits: (10 if fits[b] else 30) * b + 100, 0, keeps_peaks=keeps_peaks)

            def run(request: TrialRequest, device: Device = device, fits: dict[int, bool] = fits) -> TrialResult:
                peak = device.curve(request.micro_batch)
                device.budget_bytes = peak if fits[request.micro_batch] else peak - 1
                return device(request)

            result = search(
                run, Goal(target_batch=target, max_micro_batch=None if target else 7, exact=exact), Room(200)
            )
            check_invariants(result, candidates)
            if exact:
                check_proof(result, candidates)
            if fits[1]:
                assert result.largest_fit is not None


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("target", [None, 100, 256])
@pytest.mark.parametrize("exact", [False, True])
def test_straight_lines_stay_within_the_stated_counts(exact: bool, target: int | None, failure: str) -> None:
    candidates = range(1, 4001) if target is None else candidate_sizes(target)
    for fixed, slope in itertools.product((0, 10, 200), (1, 3, 10)):
        for budget in (*range(fixed + 1, fixed + 120, 4), *range(fixed + 120, fixed + 2000, 97)):
            device = Device(lambda b, f=fixed, s=slope: 1000 * (f + s * b), 1000 * budget, failure)
            result = search(
                device,
                Goal(target_batch=target, max_micro_batch=4000 if target is None else None, exact=exact),
                Room(device.budget_bytes, fixed_bytes_hint=1000 * fixed),
            )
            check_invariants(result, candidates)
            true = device.largest(candidates)
            if true is None:
                assert result.largest_fit is None
            elif exact:
                assert result.largest_fit == true
                check_proof(result, candidates)
                assert len(result.trials) <= 6
                assert failures(result) <= (2 if true > 1 else 3)
            else:
                assert result.largest_fit is not None
                assert 0.97 * true <= result.largest_fit <= true
                assert len(result.trials) <= 4
                assert failures(result) == 0 or not result.trials[0].fits


@given(
    peaks=st.lists(st.integers(1, 1000), min_size=1, max_size=300),
    monotone=st.booleans(),
    budget=st.integers(1, 1000),
    hint=st.none() | st.integers(0, 1200),
    target=st.none() | st.integers(1, 300),
    exact=st.booleans(),
    keeps_peaks=st.booleans(),
    knows_budget=st.booleans(),
    failure=st.sampled_from(FAILURES),
    objective=st.sampled_from(["throughput", "largest"]),
    estimate=st.none() | st.builds(SampleEstimate, st.floats(1e-3, 1e3), st.floats(0, 500)),
)
def test_any_curve_ends_within_the_stated_bound_on_a_size_that_fits(
    peaks: list[int],
    monotone: bool,
    budget: int,
    hint: int | None,
    target: int | None,
    exact: bool,
    keeps_peaks: bool,
    knows_budget: bool,
    failure: str,
    objective: str,
    estimate: SampleEstimate | None,
) -> None:
    if monotone:
        peaks = sorted(peaks)
    device = Device(lambda b: peaks[min(b, len(peaks)) - 1], budget, failure, keeps_peaks)
    candidates = range(1, len(peaks) + 1) if target is None else candidate_sizes(target)
    result = search(
        device,
        Goal(
            target_batch=target,
            max_micro_batch=len(peaks) if target is None else None,
            objective=objective,
            exact=exact,
        ),
        Room(budget if knows_budget else None, fixed_bytes_hint=hint),
        estimate_sample=lambda: estimate,
    )
    check_invariants(result, candidates)
    if exact:
        check_proof(result, candidates)
        if monotone:
            assert result.largest_fit == device.largest(candidates)
    elif monotone:
        assert (result.largest_fit or 0) <= (device.largest(candidates) or 0)
    doublings = math.log2(len(candidates))
    if knows_budget and keeps_peaks:
        assert len(result.trials) <= (10 + 2 * doublings if exact else 19)
    else:
        assert len(result.trials) <= 2 * math.log2(candidates[-1]) + 2


def fragmented(largest: int, share: float, piece: float, lost: float) -> tuple[Device, int, float]:
    """A straight line to ``largest``, in an allocator that loses a part of the largest tensor; fixed bytes and slope.

    ``piece`` is the largest tensor as a part of what a sample needs.
    """
    budget = 10**9
    fixed = int(share * budget)
    slope = (budget - fixed) / (largest + 0.5)
    return Device(lambda b: int(fixed + slope * b * (1 + lost * piece)), budget), fixed, slope


@pytest.mark.parametrize("wrong", [0.6, 1.0, 1.7, 2.5])
@pytest.mark.parametrize("exact", [False, True])
def test_an_estimate_that_is_wrong_by_a_factor_leads_there_in_two_or_three(exact: bool, wrong: float) -> None:
    for largest, share, piece in itertools.product((9, 20, 64, 173, 900), (0.01, 0.3, 0.6), (0.0, 0.02, 0.1)):
        line, fixed, slope = fragmented(largest, share, piece, lost=0.0)
        frayed, _, _ = fragmented(largest, share, piece, lost=0.5)

        def run(request: TrialRequest, line: Device = line, frayed: Device = frayed) -> TrialResult:
            told, needed = line(request), frayed(request)
            return told if needed.fits else needed  # the peak is the line's: what is lost is free, in pieces

        result = search(
            run,
            Goal(max_micro_batch=1024, exact=exact),
            Room(line.budget_bytes, fixed_bytes_hint=fixed),
            estimate_sample=lambda wrong=wrong, slope=slope, piece=piece: SampleEstimate(wrong * slope, piece * slope),
        )
        check_invariants(result, range(1, 1025))
        true = frayed.largest(range(1, 1025))
        assert true is not None
        assert result.largest_fit is not None
        if exact:
            assert result.largest_fit == true
            check_proof(result, range(1, 1025))
            assert len(result.trials) <= (6 if largest < 200 else 7)
            assert failures(result) <= (2 if largest < 200 else 4)
        else:
            assert 0.97 * true <= result.largest_fit <= true
            assert len(result.trials) <= 3
            assert failures(result) == 0


def test_an_estimate_chooses_the_first_trial() -> None:
    device = Device(lambda b: 100 + 10 * b, 1100)
    room = Room(1100, fixed_bytes_hint=100)
    right = search(device, Goal(), room, estimate_sample=lambda: SampleEstimate(10.0, 0.0))
    assert ran(right) == [37, 100]  # a prime below 0.4 of what is estimated to fit
    # Half of what is estimated to fit is the whole target: no probe is needed.
    sure = search(device, Goal(target_batch=50), room, estimate_sample=lambda: SampleEstimate(10.0, 0.0))
    assert ran(sure) == [50]


def test_an_estimate_is_asked_for_only_where_it_helps() -> None:
    def never() -> SampleEstimate:
        raise AssertionError("asked for")

    device = Device(lambda b: b, 10**6)
    assert ran(search(device, Goal(target_batch=32), Room(10**6), estimate_sample=never)) == [32]
    assert ran(search(device, Goal(target_batch=100), Room(None), estimate_sample=never))[0] == 8
    assert ran(search(device, Goal(target_batch=100), Room(10, fixed_bytes_hint=20), estimate_sample=never))[0] == 1


def test_room_for_the_largest_tensor_costs_no_whole_candidate() -> None:
    # 128 of a target of 256 is predicted to fit with less room to spare than wanted; the next below it is 86.
    device = Device(lambda b: 100 + 7 * b, 1000)
    result = search(
        device,
        Goal(target_batch=256),
        Room(1000, fixed_bytes_hint=100),
        estimate_sample=lambda: SampleEstimate(7.0, 1.0),
    )
    assert result.largest_fit == 128
    assert failures(result) == 0


def test_the_room_for_the_largest_tensor_may_lie_in_the_headroom() -> None:
    device = Device(lambda b: 100 + 10 * b, 950)
    room = Room(950, fixed_bytes_hint=100)
    estimate = SampleEstimate(10.0, 2.0)
    tight = search(device, Goal(), room, estimate_sample=lambda: estimate)
    roomy = search(device, Goal(), replace(room, headroom_bytes=85), estimate_sample=lambda: estimate)
    assert (tight.largest_fit, roomy.largest_fit) == (77, 85)


def test_only_where_speed_counts_are_steps_timed() -> None:
    asked: list[int] = []

    def run(request: TrialRequest) -> TrialResult:
        asked.append(request.timed_steps)
        return TrialResult(request.micro_batch, Outcome.FITS, peak_bytes=request.micro_batch)

    search(run, Goal(target_batch=64), Room(1000))
    assert set(asked) == {TIMED_STEPS}
    asked.clear()
    search(run, Goal(target_batch=64, objective="largest"), Room(1000))
    search(run, Goal(), Room(1000))
    assert set(asked) == {0}


@pytest.mark.parametrize("target", [1, 8, 32, 256])
def test_a_target_that_fits_takes_one_trial_if_small_and_two_if_not(target: int) -> None:
    device = Device(lambda b: 100 + b, 1000)
    result = search(device, Goal(target_batch=target), Room(1000, fixed_bytes_hint=100))
    assert ran(result) == ([target] if target <= 32 else [8, target])
    assert result.stopped_because == "the target itself fits"


def test_heavy_weights_make_even_a_small_target_start_with_a_probe() -> None:
    device = Device(lambda b: 600 + 20 * b, 1000)
    result = search(device, Goal(target_batch=32), Room(1000, fixed_bytes_hint=600))
    assert ran(result)[0] == 8
    assert result.largest_fit == 16
    assert failures(result) == 0


def test_weights_alone_above_the_budget_are_found_out_by_one_sample() -> None:
    device = Device(lambda b: 2000 + b, 1000)
    result = search(device, Goal(target_batch=256), Room(1000, fixed_bytes_hint=2000))
    assert ran(result) == [1]
    assert result.largest_fit is None
    assert result.stopped_because == "not even a micro-batch of 1 fits"


def test_default_mode_says_what_the_next_useful_size_would_need() -> None:
    device = Device(lambda b: (100 + 10 * b) << 20, 1000 << 20)
    result = search(device, Goal(target_batch=256), Room(1000 << 20, fixed_bytes_hint=100 << 20))
    assert ran(result) == [8, 86]
    assert result.stopped_because == "the next useful size, 128, is predicted to need 1.3 GiB of 1000 MiB"


def test_exact_mode_says_what_is_proven() -> None:
    device = Device(lambda b: 100 + 10 * b, 1060)
    result = search(device, Goal(exact=True), Room(1060, fixed_bytes_hint=100))
    assert (result.largest_fit, result.smallest_failure) == (96, 97)
    assert result.stopped_because == "proven: 96 fits, 97 does not"


def test_a_far_prediction_goes_through_a_trial_half_way() -> None:
    # Twice as steep from 1000 samples on: eight of them predict 10 000, which would fail.
    device = Device(lambda b: 1000 + b + max(0, b - 1000), 11_000)
    result = search(device, Goal(), Room(11_000, fixed_bytes_hint=1000))
    assert ran(result)[1] < 5000
    assert failures(result) <= 1
    assert result.largest_fit is not None
    assert 0.97 * 5500 <= result.largest_fit <= 5500


def test_a_flat_start_does_not_mislead() -> None:
    # The optimizer's update rules the peak up to 60 samples.
    device = Device(lambda b: max(700, 400 + 5 * b), 1000)
    result = search(device, Goal(), Room(1000, fixed_bytes_hint=300))
    assert failures(result) <= 1
    assert result.largest_fit is not None
    assert 0.97 * 120 <= result.largest_fit <= 120


def test_the_bytes_that_a_failure_names_shorten_the_way_down() -> None:
    def run(request: TrialRequest) -> TrialResult:
        needed = 100 + 300 * request.micro_batch
        if needed <= 1000:
            return TrialResult(request.micro_batch, Outcome.FITS, peak_bytes=needed)
        return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY, requested_bytes=needed - 100)

    result = search(run, Goal(target_batch=32), Room(1000, fixed_bytes_hint=100))
    # One allocation of 9600 bytes for 32 samples allows 3 at the most.
    assert ran(result)[:2] == [32, 1]
    assert failures(result) == 1


def test_without_peaks_it_doubles_and_bisects() -> None:
    device = Device(lambda b: b, 100, keeps_peaks=False)
    result = search(device, Goal(exact=True), Room(100))
    assert ran(result)[:5] == [8, 16, 32, 64, 128]
    assert (result.largest_fit, result.smallest_failure) == (100, 101)
    assert result.memory_model is None
    rough = search(device, Goal(), Room(100))
    assert rough.largest_fit is not None
    assert 97 <= rough.largest_fit <= 100
    assert len(rough.trials) < len(result.trials)


def test_without_a_budget_it_doubles_up_to_the_target() -> None:
    device = Device(lambda b: b, 10**9)
    result = search(device, Goal(target_batch=100), Room(None))
    assert ran(result) == [8, 15, 25, 50, 100]
    assert result.stopped_because == "the target itself fits"
    assert result.memory_model is not None


def test_without_any_limit_it_stops_where_size_makes_no_more_speed() -> None:
    def run(request: TrialRequest) -> TrialResult:
        return TrialResult(request.micro_batch, Outcome.FITS, step_seconds=max(32, request.micro_batch) / 1000)

    result = search(run, Goal(), Room(None))
    assert ran(result) == [8, 16, 32, 64, 128]
    assert "less than 5 % faster" in result.stopped_because


def test_a_trial_that_times_out_does_not_fit() -> None:
    def run(request: TrialRequest) -> TrialResult:
        if request.micro_batch > 40:
            return TrialResult(request.micro_batch, Outcome.TIMED_OUT)
        return TrialResult(request.micro_batch, Outcome.FITS, peak_bytes=10 * request.micro_batch)

    result = search(run, Goal(max_micro_batch=200, exact=True), Room(10**6))
    assert (result.largest_fit, result.smallest_failure) == (40, 41)
    never = search(
        lambda request: TrialResult(request.micro_batch, Outcome.TIMED_OUT), Goal(target_batch=8), Room(None)
    )
    assert never.largest_fit is None
    assert never.stopped_because == "not even a micro-batch of 1 ended in time"


def test_the_limit_on_trials_returns_the_best_so_far() -> None:
    device = Device(lambda b: 100 + b, 1000, keeps_peaks=False)
    for most in range(1, 12):
        result = search(device, Goal(), Room(1000), limits=Limits(max_trials=most))
        assert len(result.trials) <= most
        assert result.largest_fit == max(trial.micro_batch for trial in result.trials if trial.fits)
        if len(result.trials) == most:
            assert result.stopped_because == f"limit of {most} trial{'s' * (most > 1)} reached"


def test_the_limit_on_seconds_lets_the_first_trial_run() -> None:
    now = [100.0]
    device = Device(lambda b: b, 10**9, keeps_peaks=False)

    def run(request: TrialRequest) -> TrialResult:
        now[0] += 25.0
        return device(request)

    result = search(run, Goal(), Room(10**9), limits=Limits(max_seconds=60.0, clock=lambda: now[0]))
    assert ran(result) == [8, 16, 32]
    assert result.stopped_because == "limit of 60 s reached"
    assert ran(search(run, Goal(), Room(10**9), limits=Limits(max_seconds=1.0, clock=lambda: now[0]))) == [8]


def test_every_trial_is_told_as_it_comes() -> None:
    seen: list[TrialResult] = []
    result = search(Device(lambda b: b, 100), Goal(), Room(100), on_trial=seen.append)
    assert tuple(seen) == result.trials


def falling(request: TrialRequest) -> TrialResult:
    seconds = request.micro_batch * (0.001 if request.micro_batch <= 64 else 0.002)
    return TrialResult(request.micro_batch, Outcome.FITS, peak_bytes=10 * request.micro_batch, step_seconds=seconds)


def test_falling_throughput_is_met_with_one_smaller_candidate() -> None:
    result = search(falling, Goal(target_batch=256), Room(10**6))
    assert ran(result) == [8, 256, 43]
    assert result.largest_fit == 256
    assert ran(search(falling, Goal(target_batch=256, objective="largest"), Room(10**6))) == [8, 256]
    assert ran(search(falling, Goal(target_batch=256), Room(10**6), limits=Limits(max_trials=2))) == [8, 256]


def test_what_the_trial_raises_is_passed_on() -> None:
    def run(request: TrialRequest) -> TrialResult:
        raise LookupError("the user's own")

    with pytest.raises(LookupError, match="the user's own"):
        search(run, Goal(target_batch=8), Room(100))


def test_another_size_than_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match="asked for 8"):
        search(lambda request: TrialResult(9, Outcome.FITS), Goal(target_batch=8), Room(100))


@pytest.mark.parametrize(
    "part",
    [
        lambda: Goal(target_batch=0),
        lambda: Goal(max_micro_batch=-1),
        lambda: Goal(objective="smallest"),
        lambda: Room(0),
        lambda: Room(100, fixed_bytes_hint=-1),
        lambda: Room(100, headroom_bytes=-1),
        lambda: Limits(max_trials=0),
        lambda: Limits(max_seconds=0.0, clock=lambda: 0.0),
        lambda: Limits(max_seconds=1.0),
    ],
)
def test_arguments_out_of_range_are_refused(part: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="Received:"):
        part()


def search_recording(device: RecordingDevice, rng: random.Random, goal: Goal) -> SearchResult:
    estimate = SampleEstimate(device.per_sample_bytes * rng.uniform(0.6, 1.7), 0.0)
    return search(
        device,
        goal,
        Room(device.total_bytes, fixed_bytes_hint=device.held_bytes),
        estimate_sample=lambda: estimate,
    )


def largest_of(device: RecordingDevice, most: int) -> int:
    """The largest size below the first, from half of ``most`` on, that finds no room."""
    return next(size for size in itertools.count(most // 2) if device.peak_bytes(size) is None) - 1


def recorded_searches(*, exact: bool, error: float) -> list[tuple[RecordingDevice, SearchResult]]:
    found = []
    for seed in range(40):
        rng = random.Random(seed)
        device = RecordingDevice(rng, largest=rng.uniform(40, 400), error=error)
        result = search_recording(device, rng, Goal(exact=exact))
        check_invariants(result, range(1, 1 << 20))
        assert all(trial.allocations is None for trial in result.trials), "what was recorded is not kept"
        found.append((device, result))
    return found


@pytest.mark.parametrize(
    ("error", "most_trials", "most_failures", "least", "tenth", "median"),
    [(0.0, 2, 0, 0.97, 0.98, 0.98), (0.01, 2, 0, 0.96, 0.97, 0.98), (0.1, 3, 2, 0.84, 0.9, 0.97)],
)
def test_where_allocations_are_recorded_two_trials_are_all(
    error: float, most_trials: int, most_failures: int, least: float, tenth: float, median: float
) -> None:
    """``least`` is found of the largest in every search, ``tenth`` in nine of ten, ``median`` in half of them."""
    found = recorded_searches(exact=False, error=error)
    assert len(found) == 40
    trials = [len(result.trials) for _, result in found]
    assert max(trials) <= most_trials
    assert statistics.median(trials) == 2
    assert sum(failures(result) for _, result in found) <= most_failures, "one in 20 searches"
    ratios = sorted((result.largest_fit or 0) / largest_of(device, result.largest_fit or 0) for device, result in found)
    assert ratios[0] >= least
    assert ratios[4] >= tenth
    assert ratios[20] >= median


@pytest.mark.parametrize(
    ("error", "median", "most_trials", "beyond"),
    [(0.0, 3, 5, 0), (0.005, 5, 6, 0), (0.01, 5, 8, 3), (0.1, 7, 12, 16)],
)
def test_exact_mode_where_allocations_are_recorded(error: float, median: int, most_trials: int, beyond: int) -> None:
    """``beyond`` is the number of searches, of 40, that take more than 6 trials or 2 failures."""
    found = recorded_searches(exact=True, error=error)
    for _, result in found:
        check_proof(result, range(1, 1 << 20))
    trials = sorted(len(result.trials) for _, result in found)
    assert trials[20] <= median
    assert trials[-1] <= most_trials
    assert sum(len(result.trials) > 6 or failures(result) > 2 for _, result in found) <= beyond
    assert sorted(failures(result) for _, result in found)[20] <= 2


def test_what_a_compiler_allocates_in_one_piece_is_not_replayed() -> None:
    # One buffer, of which nothing tells that it grows, and the data: every size would seem to fit.
    def run(request: TrialRequest) -> TrialResult:
        peak = 1000 + 100 * request.micro_batch
        if peak > 50_000:
            return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY)
        sizes = ((100.0 * request.micro_batch, 0.0), (0.0, 4.0))
        order = (1, 2, ~2, ~1)
        told = AllocationTrace(request.micro_batch, ((0, 50_000),), ((0, 1000),), sizes, order)
        return TrialResult(request.micro_batch, Outcome.FITS, peak_bytes=peak, allocations=told)

    result = search(run, Goal(), Room(50_000, fixed_bytes_hint=1000))
    assert result.largest_fit is not None
    assert 475 <= result.largest_fit <= 490
    assert failures(result) == 0
    assert len(result.trials) <= 3


@pytest.mark.parametrize(
    ("in_parallel", "within_operations", "then"), [(False, False, 0.975), (True, True, 0.975), (True, False, 0.92)]
)
def test_behind_a_failure_near_the_prediction_it_steps_down_further_only_where_operations_run_side_by_side(
    in_parallel: bool, within_operations: bool, then: float
) -> None:
    def run(request: TrialRequest) -> TrialResult:
        peak = 1000 + 100 * request.micro_batch
        if peak > 94_500:
            return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY)
        told = AllocationTrace(
            request.micro_batch,
            ((0, 100_000),),
            ((0, 1000),),
            ((0.0, 100.0),),
            (1, ~1),
            in_parallel,
            within_operations=within_operations,
        )
        return TrialResult(request.micro_batch, Outcome.FITS, peak_bytes=peak, allocations=told)

    result = search(run, Goal(), Room(100_000, fixed_bytes_hint=1000))
    first, failed, second = (trial.micro_batch for trial in result.trials[:3])
    assert first < 945 < failed < 989
    assert second == math.ceil(then * (failed - 1))


def test_no_recording_is_asked_for_where_no_budget_is_known() -> None:
    asked = []
    search(
        lambda request: (asked.append(request), Device(lambda b: b, 100)(request))[1], Goal(target_batch=64), Room(None)
    )
    assert asked
    assert not any(request.record_allocations for request in asked)


@pytest.mark.parametrize("launch_seconds", [0.0, 0.0005, 0.02])
@pytest.mark.parametrize("target", [96, 120, 200, 256, 500, 509, 512, 1000, 4096])
def test_where_each_shape_is_compiled_one_that_divides_the_target_is_planned_unless_it_is_slow(
    target: int, launch_seconds: float
) -> None:
    for most in (11, 37, 50, 90, 130):

        def run_trial(request: TrialRequest, most: int = most) -> TrialResult:
            fits, samples = request.micro_batch <= most, request.micro_batch
            seconds = launch_seconds + 0.001 * samples
            outcome = Outcome.FITS if fits else Outcome.OUT_OF_MEMORY
            return TrialResult(
                samples, outcome, peak_bytes=1000 + 100 * samples if fits else None, step_seconds=seconds
            )

        result = search(run_trial, Goal(target_batch=target, one_shape=True), Room(1000 + 100 * most))
        plan = make_plan(result.trials, target_batch=target, one_shape=True)

        def update_seconds(size: int) -> float:
            return -(-target // size) * launch_seconds + 0.001 * target

        fitting = [size for size in candidate_sizes(target) if size <= most]
        shortest = min(map(update_seconds, fitting))
        assert update_seconds(plan.micro_batch) <= 1.12 * shortest
        dividing = [size for size in fitting if target % size == 0 and update_seconds(size) <= 1.03 * shortest]
        if dividing:
            assert target % plan.micro_batch == 0, (most, plan)


def test_where_a_program_is_compiled_its_plan_leads_however_wrong_the_estimate_is() -> None:
    trials, ratios, failed = [], [], 0
    for seed in range(60):
        rng = random.Random(seed)
        largest = int(math.exp(rng.uniform(math.log(20), math.log(2000))))
        device = CompiledDevice(rng, largest=largest)
        estimate = SampleEstimate(device.per_sample_bytes * math.exp(rng.uniform(-2.1, 1.5)), 0.0, is_compiled=True)
        result = search(
            device,
            Goal(),
            Room(device.total_bytes, fixed_bytes_hint=device.held_bytes),
            estimate_sample=lambda estimate=estimate: estimate,
        )
        check_invariants(result, range(1, 1 << 20))
        trials.append(len(result.trials))
        failed += failures(result)
        ratios.append(
            (result.largest_fit or 0) / next(n for n in itertools.count(largest) if not device_fits(device, n + 1))
        )
    assert sorted(trials)[30] == 2
    assert max(trials) <= 4
    assert failed <= 3
    assert min(ratios) > 0.95
    assert sorted(ratios)[6] > 0.97


def device_fits(device: CompiledDevice, micro_batch: int) -> bool:
    return device(TrialRequest(micro_batch)).fits
