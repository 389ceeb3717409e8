"""Which micro-batch is next: few failures, the best size that fits in the end, and back to the ceiling where it fits.

What fits at each step is played; the sizes are the policy's own. How long a failure takes is not: every one counts.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from autobatch.recovery.micro_batch_policy import CALM, PATIENCE, RARER, MicroBatchPolicy, evened

CEILING = 256
UPDATES = 5000


def play(fits_at, *, samples=CEILING, updates=UPDATES, by_model=False):
    """Train where sizes up to ``fits_at(update)`` fit; return the (update, size) that failed and each update's size."""
    policy = MicroBatchPolicy(CEILING)
    failures, sizes = [], []
    for update in range(updates):
        most = fits_at(update)
        while policy.micro_batch > most:
            tried = policy.micro_batch
            failures.append((update, tried))
            after = policy.failed(tried, samples=samples, fitting_now=most if by_model else None)
            assert 1 <= after == policy.micro_batch < tried
        sizes.append(policy.micro_batch)
        policy.succeeded(samples)
    times = Counter(size for _, size in failures)
    assert max(times.values(), default=0) <= (2 if updates <= 8000 else 3)
    for twice in (size for size, count in times.items() if count >= 2):
        second = [update for update, size in failures if size == twice][1]
        later = sizes[second : second + CALM * RARER * PATIENCE]
        assert max(later) < twice
        assert all(size < twice for update, size in failures if second < update < second + len(later))
    return failures, sizes


def dip(begin, length, most):
    return lambda update: most if begin <= update < begin + length else CEILING


@pytest.mark.parametrize(
    ("samples", "most_failures"), [(256, 3), (255, 3), (512, 4), (1000, 4), (1024, 5), (2048, 6), (4096, 7)]
)
def test_a_lasting_limit_is_found_with_few_failures_whatever_it_is(samples, most_failures):
    for most in range(101, CEILING, 6):
        failures, sizes = play(lambda update, most=most: most, samples=samples)
        assert sizes[-1] == evened(most, samples), most
        assert len(failures) <= most_failures, (most, failures)


@pytest.mark.parametrize(("samples", "settles"), [(256, 128), (255, 128), (1024, 171), (4096, 179), (65536, 180)])
def test_what_lies_between_what_fits_and_what_failed_is_tried(samples, settles):
    failures, sizes = play(lambda update: 180, samples=samples)
    assert sizes[-1] == settles
    assert len(failures) <= (3 if samples <= 4096 else 6)


def test_with_a_memory_model_it_is_at_the_best_size_at_once_and_in_the_end():
    for most in range(1, CEILING, 6):
        failures, sizes = play(lambda update, most=most: most, samples=1024, by_model=True)
        assert len(failures) <= 7
        assert sizes[0] == sizes[-1] == evened(most, 1024)


@pytest.mark.parametrize("samples", [256, 1024, 4096])
@pytest.mark.parametrize("length", [1, 100, 200])
@pytest.mark.parametrize("most", [60, 100, 200])
def test_memory_that_comes_back_is_used_again(samples, length, most):
    failures, sizes = play(dip(50, length, most), samples=samples)
    assert sizes[-1] == CEILING
    assert len(failures) <= (1 if length == 1 and most >= 187 else 6)
    assert sum(size < CEILING for size in sizes) < 4000


def test_a_single_failure_is_recovered_from_after_a_while():
    failures, sizes = play(dip(50, 1, 200))
    assert failures == [(50, 256)]
    assert sizes == [256] * 50 + [128] * (CALM * PATIENCE) + [256] * (UPDATES - 50 - CALM * PATIENCE)


def test_sizes_that_have_not_failed_are_tried_first_and_sooner():
    _, sizes = play(dip(0, 1, 100), samples=1024)
    steps_of = [sizes.index(size) for size in sorted(set(sizes))]
    assert steps_of == sorted(steps_of)  # it only ever grows
    assert steps_of[1] <= 2 * PATIENCE


def test_several_dips():
    def fits_at(update):
        return next((60 for begin in (500, 2000, 4000) if begin <= update < begin + 50), CEILING)

    failures, sizes = play(fits_at, updates=8000)
    assert len(failures) <= 6
    assert sizes[1999] == CEILING
    # 256 failed in two of them, 128 in two.
    assert sizes[-1] == 86


def test_memory_that_comes_back_for_the_second_time_is_used_again_after_a_long_while():
    def fits_at(update):
        return 60 if 500 <= update < 550 or 2000 <= update < 2050 else CEILING

    failures, sizes = play(fits_at, updates=60_000)
    assert sizes[-1] == CEILING
    assert len(failures) <= 6
    assert sum(size < CEILING for size in sizes) < 40_000


def test_a_limit_that_lasts_is_met_ever_more_rarely():
    failures, sizes = play(lambda update: 200, updates=200_000)
    assert [size for _, size in failures] == [CEILING] * 3
    waits = [later - sooner for (sooner, _), (later, _) in itertools.pairwise(failures)]
    assert waits == [CALM * PATIENCE, CALM * RARER * 2 * PATIENCE]
    assert sizes[-1] == 128


@pytest.mark.parametrize(("samples", "settles", "most_failures"), [(256, 128, 2), (1024, 147, 4), (4096, 164, 4)])
def test_a_limit_that_is_never_twice_the_same(samples, settles, most_failures):
    chance = random.Random(0)
    failures, sizes = play(lambda update: chance.randint(170, 190), samples=samples)
    assert sizes[-1] == settles
    assert len(failures) <= most_failures


def test_every_size_grown_to_saves_an_accumulation_step():
    for samples in (255, 256, 1000):
        _, sizes = play(dip(0, 1, 30), samples=samples)
        grown = list(dict.fromkeys(sizes))
        steps = [-(-samples // size) for size in grown]
        assert steps == sorted(set(steps), reverse=True)
        assert all(size == evened(size, samples) for size in grown)


def test_a_size_that_had_just_been_grown_to_gives_way_to_the_one_before():
    policy = MicroBatchPolicy(CEILING)
    assert policy.failed(256, samples=1024, fitting_now=None) == 171
    for _ in range(PATIENCE):
        policy.succeeded(1024)
    assert policy.micro_batch == 205
    assert policy.failed(205, samples=1024, fitting_now=100) == 171


def test_three_quarters_then_half_then_one_sample_is_the_last():
    policy = MicroBatchPolicy(16)
    sizes = [16]
    while (after := policy.failed(sizes[-1], samples=10**6, fitting_now=None)) is not None:
        sizes.append(after)
    assert sizes == [16, 12, 6, 3, 1]


@pytest.mark.parametrize(("fitting_now", "after"), [(5, 5), (15, 15), (16, 12), (99, 12), (0, 12), (-3, 12)])
def test_the_memory_model_is_believed_where_it_explains_the_failure(fitting_now, after):
    assert MicroBatchPolicy(16).failed(16, samples=10**6, fitting_now=fitting_now) == after


def test_an_epochs_last_and_smaller_batch_proves_nothing():
    policy = MicroBatchPolicy(32)
    policy.failed(32, samples=64, fitting_now=None)
    assert policy.micro_batch == 22
    for _ in range(10 * CALM * PATIENCE):
        policy.succeeded(5)
    assert policy.micro_batch == 22
    # What fails in it shows that what is larger would have failed too; sizes are evened for the whole.
    assert policy.failed(5, samples=5, fitting_now=None) == 3


def test_a_ceiling_must_be_at_least_1():
    with pytest.raises(ValueError, match="ceiling must be at least 1. Received: 0"):
        MicroBatchPolicy(0)


@pytest.mark.parametrize("samples", [96, 256, 480, 512, 1000])
def test_where_each_size_is_compiled_sizes_after_a_failure_cut_the_batch_into_equal_parts(samples):
    for ceiling in (16, 37, 47, 90):
        for fitting_now in (None, 35, 13):
            policy = MicroBatchPolicy(ceiling, one_shape=True)
            tried = policy.micro_batch
            after = policy.failed(tried, samples=samples, fitting_now=fitting_now)
            most = fitting_now if fitting_now is not None and fitting_now < tried else tried * 3 // 4
            assert after is not None
            divisors = [size for size in range(most // 2 + 1, most + 1) if samples % size == 0]
            assert after == (max(divisors) if divisors else evened(most, samples))


def test_where_each_size_is_compiled_a_lasting_limit_is_found_too():
    for most in range(20, 250, 11):
        policy = MicroBatchPolicy(250, one_shape=True)
        failures = []
        for _ in range(2000):
            while policy.micro_batch > most:
                failures.append(policy.micro_batch)
                policy.failed(policy.micro_batch, samples=1000, fitting_now=None)
            policy.succeeded(1000)
        assert len(failures) <= 8, (most, failures)
        assert policy.micro_batch >= most / 2


def test_a_size_that_a_process_died_at_is_a_failure_like_others():
    died, failed = MicroBatchPolicy(64), MicroBatchPolicy(64)
    assert died.below(64, samples=256) == 43
    assert died.as_plain() == MicroBatchPolicy(64).as_plain(), "nothing is changed by asking"
    assert died.begin_below(64, samples=256) == failed.failed(64, samples=256, fitting_now=None) == 43
    assert died.as_plain() == failed.as_plain()


def test_a_death_never_makes_a_smaller_size_larger():
    policy = MicroBatchPolicy(64, begin_at=8)
    assert policy.begin_below(64, samples=256) == 8
    assert MicroBatchPolicy(64).begin_below(1, samples=256) == 1
