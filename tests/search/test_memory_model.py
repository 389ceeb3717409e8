from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.records import MemoryModel, Outcome, TrialResult
from autobatch.search.memory_model import fit_memory_model, largest_within, least_peak_bytes, measured_points


def fits(micro_batch: int, peak_bytes: int | None) -> TrialResult:
    return TrialResult(micro_batch, Outcome.FITS, peak_bytes=peak_bytes)


def fails(micro_batch: int, peak_bytes: int | None = None, requested_bytes: int | None = None) -> TrialResult:
    return TrialResult(micro_batch, Outcome.OUT_OF_MEMORY, peak_bytes=peak_bytes, requested_bytes=requested_bytes)


def test_the_inverse_equals_brute_force() -> None:
    for fixed in (0, 1, 7, 40):
        for per_sample in (0.0, 0.1, 1 / 3, 1.0, 2.7, 10.0):
            model = MemoryModel(fixed, per_sample)
            for budget in range(0, 60):
                brute = max((b for b in range(1, 41) if model.peak_bytes(b) <= budget), default=0)
                assert largest_within(model, budget, at_most=40) == brute


@given(
    fixed=st.floats(0, 1e12),
    per_sample=st.floats(1e-3, 1e10),
    budget=st.integers(1, 10**13),
    at_most=st.integers(1, 2**40),
)
def test_the_inverse_agrees_with_the_prediction_to_the_last_byte(
    fixed: float, per_sample: float, budget: int, at_most: int
) -> None:
    model = MemoryModel(fixed, per_sample)
    found = largest_within(model, budget, at_most=at_most)
    assert 0 <= found <= at_most
    assert found == 0 or model.peak_bytes(found) <= budget
    assert found == at_most or model.peak_bytes(found + 1) > budget


def test_a_failed_trial_counts_as_measured_only_above_the_budget() -> None:
    trials = [fits(8, 80), fails(16, 95), fails(32, 320), fits(4, None)]
    assert [point.micro_batch for point in measured_points(trials, 100)] == [8, 32]
    assert [point.micro_batch for point in measured_points(trials, None)] == [8]


def test_one_probe_and_the_hint_make_a_chord() -> None:
    fit = fit_memory_model([fits(8, 180)], budget_bytes=1000, fixed_bytes_hint=100)
    assert fit is not None
    assert fit.is_chord
    assert fit.model == MemoryModel(100, 10)


def test_a_hint_above_the_peak_is_dropped() -> None:
    fit = fit_memory_model([fits(8, 80)], budget_bytes=1000, fixed_bytes_hint=100)
    assert fit is not None
    assert fit.model == MemoryModel(0, 10)


def test_the_slope_is_that_of_the_two_largest_not_of_all() -> None:
    # What an inverted-bottleneck CNN took, in MB: the first slope is half of the next.
    trials = [fits(2, 108), fits(8, 146), fits(16, 247)]
    fit = fit_memory_model(trials, budget_bytes=400, fixed_bytes_hint=20)
    assert fit is not None
    assert fit.model.per_sample_bytes == pytest.approx((247 - 146) / 8)
    assert fit.model.peak_bytes(16) == 247


def test_a_measurement_too_near_gives_no_slope() -> None:
    trials = [fits(50, 500), fits(98, 1000), fits(100, 1100)]
    fit = fit_memory_model(trials, budget_bytes=2000)
    assert fit is not None
    assert fit.other.micro_batch == 50


def test_a_falling_curve_counts_as_flat() -> None:
    fit = fit_memory_model([fits(8, 300), fits(16, 200)], budget_bytes=1000)
    assert fit is not None
    assert fit.model == MemoryModel(200, 0)
    assert largest_within(fit.model, 1000, at_most=77) == 77


def test_a_flat_start_is_told_from_a_straight_line() -> None:
    bent = fit_memory_model([fits(8, 700), fits(24, 700), fits(72, 760)], budget_bytes=1000, fixed_bytes_hint=300)
    assert bent is not None
    assert bent.bends_between
    straight = fit_memory_model([fits(8, 340), fits(24, 420), fits(72, 660)], budget_bytes=1000, fixed_bytes_hint=300)
    assert straight is not None
    assert not straight.bends_between


def test_a_measured_failure_is_interpolated() -> None:
    fit = fit_memory_model([fits(8, 80), fits(16, 160), fails(64, 1120)], budget_bytes=1000, fixed_bytes_hint=1)
    assert fit is not None
    assert fit.is_interpolation
    assert fit.model.per_sample_bytes == 20


@pytest.mark.parametrize("trials", [[], [fits(8, None)], [fails(8)], [fails(8, peak_bytes=500)]])
def test_without_a_fitting_peak_there_is_no_line(trials: list[TrialResult]) -> None:
    assert fit_memory_model(trials, budget_bytes=100) is None


def test_the_least_that_a_failure_needs() -> None:
    assert least_peak_bytes(fails(8), 100, 30) == 101
    assert least_peak_bytes(fails(8, requested_bytes=60), 100, 30) == 101
    assert least_peak_bytes(fails(8, requested_bytes=90), 100, 30) == 120
    assert least_peak_bytes(fails(8, peak_bytes=300), 100, 30) == 300
    assert least_peak_bytes(TrialResult(8, Outcome.TIMED_OUT), 100, 30) is None


def test_peaks_that_stand_still_near_the_budget_are_only_an_upper_bound() -> None:
    # A small CNN in TensorFlow's allocator, limited to 104 MiB: 222 samples fitted and 223 did not.
    rigid = [fits(26, 370), fits(78, 543)]
    elastic = fit_memory_model([*rigid, fits(172, 978), fits(185, 974)], budget_bytes=1040, fixed_bytes_hint=39)
    assert elastic is not None
    assert elastic.anchor.micro_batch == 185
    assert largest_within(elastic.model, 1040, at_most=1000) == 228
    # Far below the budget, or on the way up, a peak is believed.
    for trials, budget in (([*rigid, fits(172, 978), fits(185, 974)], 2000), ([*rigid, fits(172, 978)], 1040)):
        believed = fit_memory_model(trials, budget_bytes=budget, fixed_bytes_hint=39)
        assert believed is not None
        assert believed.anchor.peak_bytes in (974, 978)
