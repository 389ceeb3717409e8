"""When growth is steady: the false-alarm rate on noise of every kind and level, and what is found when."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.watch import findings
from autobatch.watch.evidence import Evidence
from autobatch.watch.findings import Cause, Census, explain
from autobatch.watch.steady_growth import FALSE_ALARM_RATE, _student_tail, steady_growth

MIB = 2**20
EPOCHS = 40


def white(random):
    return random.normal(size=EPOCHS)


def heavy_tailed(random):
    return random.standard_cauchy(EPOCHS)


def walk(random):
    """A Gaussian random walk, for which the test is exact: the hardest there is."""
    return random.normal(size=EPOCHS).cumsum()


def rough_walk(random):
    return random.standard_t(2, EPOCHS).cumsum()


def sluggish(random):
    return np.array(list(itertools.accumulate(random.normal(size=EPOCHS), lambda before, step: 0.9 * before + step)))


def spikes(random):
    return (random.random(EPOCHS) < 0.1) * random.lognormal(size=EPOCHS)


def one_jump(random):
    return (np.arange(EPOCHS) >= random.integers(1, EPOCHS)) + 0.05 * random.normal(size=EPOCHS)


def levels_off(random):
    return 1 - np.exp(-np.arange(EPOCHS) / random.uniform(0.3, 1.5)) + 0.02 * random.normal(size=EPOCHS)


NOISES = [white, heavy_tailed, walk, rough_walk, sluggish, spikes, one_jump, levels_off]


def first_found(levels, **options):
    """How many steps had been made when growth was first seen, tested after each; None if it never was."""
    levels = [float(level) for level in levels]
    return next(
        (count - 1 for count in range(2, len(levels) + 1) if steady_growth(levels[:count], **options) is not None),
        None,
    )


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
def test_noise_of_any_level_raises_fewer_alarms_than_stated(noise):
    series = 250  # 2,000 in all; the seeds are fixed, so that the outcome is too
    alarms = sum(
        first_found(noise(np.random.default_rng(seed)) * 10.0 ** (seed % 12), minimum_bytes=0) is not None
        for seed in range(series)
    )
    # Two and a third deviations above the bound: the bound is nearly reached only by a random walk.
    assert alarms <= FALSE_ALARM_RATE * series + 2.33 * (FALSE_ALARM_RATE * series) ** 0.5


@pytest.mark.parametrize(("noise_mib", "within"), [(0, 3), (1, 5), (2, 7), (5, 12), (10, 30)])
def test_a_leak_of_20_mib_an_epoch_is_found_in_noise(noise_mib, within):
    for seed in range(30):
        random = np.random.default_rng(seed)
        levels = 700 * MIB + 20 * MIB * np.arange(60) + noise_mib * MIB * random.normal(size=60)
        assert (first_found(levels) or 99) <= within


@settings(deadline=None)
@given(
    slope=st.floats(6 * MIB, 2**40),
    base=st.floats(0, 2**45),
    flat=st.integers(0, 40),
    jitter=st.lists(st.floats(-0.02, 0.02), min_size=20, max_size=20),
)
def test_a_growth_is_found_whenever_it_starts_and_its_slope_told(slope, base, flat, jitter):
    # One level ahead of the growth, so that its first step is a full one.
    levels = [base] * (flat + 1) + [base + slope * (k + 1 + jitter[k]) for k in range(20)]
    found = steady_growth(levels[flat : flat + 5])
    assert found == pytest.approx(slope, rel=0.05)
    assert (first_found(levels) or 99) <= flat + 16


@given(levels=st.lists(st.floats(0, 2**50), max_size=40), minimum=st.floats(1, 2**50))
def test_what_did_not_grow_enough_is_no_growth(levels, minimum):
    highest = max(levels, default=0.0) - min(levels, default=0.0)
    if steady_growth(levels, minimum_bytes=minimum) is not None:
        assert highest >= minimum * 0.999
    falling = sorted(levels, reverse=True)
    assert steady_growth(falling, minimum_bytes=minimum) is None


def test_an_even_growth_is_found_after_an_odd_beginning():
    levels = np.cumsum([700, 8, 50, 34, 34, 34, 35, 34]) * MIB
    assert first_found(levels) == 5


def test_a_slow_leak_is_found_once_it_has_come_to_something():
    exact = [10**9 + MIB * epoch for epoch in range(200)]
    assert first_found(exact) == 16
    noisy = np.array(exact) + 2 * MIB * np.random.default_rng(0).normal(size=200)
    assert (first_found(noisy) or 999) <= 120


@pytest.mark.parametrize(("t", "degrees", "tail"), [(31.821, 1, 0.01), (6.965, 2, 0.01), (4.541, 3, 0.01)])
def test_the_tail_of_students_distribution_against_its_table(t, degrees, tail):
    assert _student_tail(t, degrees) == pytest.approx(tail, rel=1e-3)


@pytest.mark.parametrize(("t", "degrees", "tail"), [(4.144, 10, 0.001), (2.947, 15, 0.005), (0.0, 7, 0.5)])
def test_the_tail_of_students_distribution_with_many_degrees(t, degrees, tail):
    assert _student_tail(t, degrees) == pytest.approx(tail, rel=1e-3)


def test_evidence_looks_once_and_asks_for_twice_as_much_after_a_finding():
    looks = []
    evidence = Evidence()
    found = [evidence.add(20 * MIB * step, lambda: looks.append(1) or "mark") for step in range(4)]
    assert found == [None, None, None, 20 * MIB]
    assert looks == [1]
    assert evidence.since_mark == (2, 40 * MIB)
    evidence.restart(60 * MIB)
    found = [evidence.add(60 * MIB + 20 * MIB * step, lambda: "mark") for step in range(1, 7)]
    assert found == [None] * 5 + [20 * MIB]


def test_evidence_that_marks_late_looks_only_once_the_growth_is_steady():
    looks = []
    evidence = Evidence(marks_late=True)
    found = []
    for step in range(6):
        found.append(evidence.add(20 * MIB * step, lambda: looks.append(1) or "mark"))
        assert len(looks) == (step >= 3)
        assert evidence.unreported == (20 * MIB if step >= 3 else None)
    assert found == [None] * 5 + [20 * MIB]
    assert evidence.since_mark == (2, 40 * MIB)
    evidence.restart(100 * MIB)
    assert evidence.unreported is None


def test_evidence_that_marks_late_reports_no_growth_that_has_stopped():
    evidence = Evidence(marks_late=True)
    found = [evidence.add(20 * MIB * min(step, 3), lambda: "mark") for step in range(12)]
    assert found == [None] * 12
    assert evidence.unreported is None


def census(**counts):
    none = dict.fromkeys(Census.__dataclass_fields__, 0)
    return Census(**{**none, **counts})


@pytest.mark.parametrize(
    ("where", "mark", "now", "collected", "cause"),
    [
        ("host", {}, {}, {}, Cause.UNKNOWN),
        ("host", {}, {"host_tensor_bytes": 60}, {"host_tensor_bytes": 60}, Cause.TENSORS),
        ("device", {}, {"device_tensor_bytes": 60}, {"device_tensor_bytes": 60}, Cause.TENSORS),
        ("device", {}, {"host_tensor_bytes": 60}, {"host_tensor_bytes": 60}, Cause.UNKNOWN),
        ("host", {}, {"host_tensor_bytes": 60}, {}, Cause.GARBAGE),
        ("host", {"host_tensor_bytes": 60}, {"host_tensor_bytes": 60}, {}, Cause.UNKNOWN),  # old garbage
        ("host", {}, {"array_bytes": 60}, {"array_bytes": 60}, Cause.DATA),
        ("device", {}, {"array_bytes": 60}, {"array_bytes": 60}, Cause.UNKNOWN),
        ("host", {}, {"layers": 9, "functions": 3}, {"layers": 9, "functions": 3}, Cause.MODELS),
        ("host", {"layers": 5}, {"layers": 9}, {"layers": 2}, Cause.MODELS),
        ("host", {"layers": 9}, {"layers": 9}, {"layers": 2}, Cause.UNKNOWN),  # old garbage
        ("host", {"functions": 50}, {"functions": 80}, {"functions": 80}, Cause.RETRACING),
        ("host", {"functions": 50}, {"functions": 52}, {"functions": 52}, Cause.UNKNOWN),
        ("host", {"functions": None}, {"functions": None}, {"functions": None}, Cause.UNKNOWN),
        ("host", {"memory_caches": 1}, {"memory_caches": 1}, {"memory_caches": 1}, Cause.DATA),
        ("device", {"memory_caches": 1}, {"memory_caches": 1}, {"memory_caches": 1}, Cause.UNKNOWN),
    ],
)
def test_the_cause_follows_from_what_was_counted(where, mark, now, collected, cause):
    assert explain(census(**mark), census(**now), census(**collected), 100, where=where, steps=3) is cause


def describe(**changed):
    values = {
        "where": "device",
        "per": "epoch",
        "step": 10,
        "last_step": 50,
        "bytes_per_step": 34 * MIB,
        "available_bytes": 1500 * MIB,
        "limit_bytes": 8192 * MIB,
        "cause": Cause.RETRACING,
        "detail": "new traces: 3 an epoch",
    }
    return findings.describe(**{**values, **changed})


def test_the_message_tells_what_is_left_and_when_it_ends():
    finding = describe()
    assert finding.message.startswith(
        "Device memory grows by 34 MiB an epoch; at this rate 140 MiB of 8 GiB are left after epoch 50; out of memory "
        "at about epoch 55. Likely cause: retracing (new traces: 3 an epoch). Pass tensors of one shape"
    )
    assert (finding.bytes_per_epoch, finding.epochs_left, finding.left_bytes) == (34 * MIB, 44, 140 * MIB)


def test_the_message_without_what_is_not_known():
    short = describe(available_bytes=1000 * MIB)
    assert "left after" not in short.message
    assert short.left_bytes < 0
    assert "out of memory at about epoch 40." in short.message
    unknown = describe(last_step=None, available_bytes=None, limit_bytes=None, cause=Cause.UNKNOWN, detail="")
    assert unknown.message.startswith("Device memory grows by 34 MiB an epoch. The cause was not found. Train")
    assert (unknown.epochs_left, unknown.left_bytes) == (None, None)
