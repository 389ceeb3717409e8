"""The model of the allocator, and what replaying a trial's allocations on it tells of other sizes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.allocation_trace import AllocationTrace
from autobatch.search import replay
from autobatch.search.replay import Allocator, FullError

KIB = 1024


def trace(sizes, order, *, total=1 << 20, held=(), micro_batch=10):
    return AllocationTrace(micro_batch, ((0, total),), tuple(held), tuple(sizes), tuple(order))


def test_a_block_is_rounded_up_and_takes_the_smallest_chunk_that_is_large_enough() -> None:
    allocator = Allocator(((0, 64 * KIB),), ())
    blocks = [allocator.allocate(wanted) for wanted in (1, 8 * KIB, 256, 2 * KIB, 256)]
    assert blocks == [0, 256, 256 + 8 * KIB, 512 + 8 * KIB, 512 + 10 * KIB]
    allocator.release(blocks[1])
    allocator.release(blocks[3])
    assert allocator.allocate(2 * KIB) == blocks[3]  # the smaller of the two holes, though it is higher
    assert allocator.in_use_bytes == 3 * 256 + 2 * KIB


def test_a_chunk_is_split_only_where_it_is_twice_as_large_as_the_block() -> None:
    for wanted, taken in ((512, 512), (513, 1024)):
        allocator = Allocator(((0, 8 * KIB),), ())
        first = allocator.allocate(1024)
        allocator.allocate(256)
        allocator.release(first)
        before = allocator.in_use_bytes
        allocator.allocate(wanted)
        assert allocator.in_use_bytes - before == taken


def test_what_would_be_wasted_is_split_off_where_it_is_large() -> None:
    mib = 1 << 20
    allocator = Allocator(((0, 400 * mib),), ())
    allocator.allocate(250 * mib)
    assert allocator.in_use_bytes == 250 * mib


def test_neighbours_are_joined_within_a_region_and_not_across() -> None:
    allocator = Allocator(((0, 4 * KIB), (4 * KIB, 4 * KIB)), ())
    blocks = [allocator.allocate(2 * KIB) for _ in range(4)]
    assert sorted(blocks) == [0, 2 * KIB, 4 * KIB, 6 * KIB]
    for block in blocks:
        allocator.release(block)
    with pytest.raises(FullError):
        allocator.allocate(8 * KIB)
    assert {allocator.allocate(4 * KIB), allocator.allocate(4 * KIB)} == {0, 4 * KIB}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_blocks_never_overlap_and_nothing_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    regions = ((0, 256 * KIB), (1 << 30, 64 * KIB))
    held = ((1024, 512), (8192, 2048), (1 << 30, 256))
    allocator = Allocator(regions, held)
    live = dict(held)
    for _ in range(300):
        if live and rng.random() < 0.5:
            address = rng.choice(list(live))
            allocator.release(address)
            del live[address]
        else:
            wanted = rng.choice((1, 100, 300, 5000, 20000))
            try:
                address = allocator.allocate(wanted)
            except FullError:
                continue
            end = address + wanted
            assert any(start <= address and end <= start + size for start, size in regions)
            assert all(end <= other or address >= other + size for other, size in live.items())
            live[address] = wanted
    assert allocator.in_use_bytes >= sum(live.values())
    assert allocator.peak_bytes >= allocator.in_use_bytes
    for address in live:
        allocator.release(address)
    assert allocator.in_use_bytes == 0
    assert {allocator.allocate(size) for _, size in regions} == {0, 1 << 30}


def test_a_size_is_replayed_with_what_grows_and_what_does_not() -> None:
    # Weights of 4 KiB; a workspace of 1 KiB; two activations of 256 bytes a sample, the first kept for the second.
    told = trace([(1024, 0), (0, 256), (0, 256)], [1, ~1, 2, 3, ~3, ~2], held=[(0, 4096)])
    assert replay.replayed_peak_bytes(told, 10) == 4096 + 2 * 2560
    assert replay.replayed_peak_bytes(told, 1) == 4096 + 1024
    assert replay.largest_that_fits(told, 1 << 20, at_most=10**6) == pytest.approx((2**20 - 4096) / 512, rel=0.006)
    assert replay.largest_that_fits(told, 100_000, at_most=10**6) == pytest.approx((100_000 - 4096) / 512, rel=0.006)
    assert replay.largest_that_fits(told, 1 << 20, at_most=100) == 100
    assert replay.largest_that_fits(told, 4096, at_most=100) == 0


def test_free_memory_in_pieces_is_no_room_although_the_bytes_would_do() -> None:
    # Something small lies in the middle: of 1 MiB, only half can be had in one piece.
    told = trace([(0, 1024)], [1, ~1], held=[(512 * KIB, 256)])
    assert replay.replayed_peak_bytes(told, 512) == 256 + 512 * KIB
    assert replay.replayed_peak_bytes(told, 513) is None
    assert replay.largest_that_fits(told, 1 << 20, at_most=1000) == 512


def test_a_size_is_not_believed_above_one_that_finds_no_room(monkeypatch) -> None:
    def no_room_here_and_there(_: AllocationTrace, size: int) -> int | None:
        return None if 150 <= size <= 161 or size > 170 else 1

    monkeypatch.setattr(replay, "replayed_peak_bytes", no_room_here_and_there)
    assert replay.largest_that_fits(trace([], []), 10, at_most=1000) == pytest.approx(149, abs=2)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), total=st.integers(50, 4000))
def test_the_largest_fits_and_a_little_more_does_not(seed: int, total: int) -> None:
    rng = random.Random(seed)
    sizes = [(rng.choice((0, 700, 5000)), rng.choice((0, 40, 300, 1000)) + (number == 0)) for number in range(12)]
    order: list[int] = []
    live: list[int] = []
    for block in range(12):
        order.append(block)
        live.append(block)
        while live and rng.random() < 0.4:
            order.append(~live.pop(rng.randrange(len(live))))
    told = trace(sizes, order, total=total * KIB)
    found = replay.largest_that_fits(told, total * KIB, at_most=5000)
    assert found == 0 or replay.replayed_peak_bytes(told, found) is not None
    if found < 5000:
        beyond = range(found + 1, found + 2 + found // 5)
        assert any(replay.replayed_peak_bytes(told, size) is None for size in beyond) or found < 20


def test_two_trials_tell_what_grows_better_than_one() -> None:
    # A workspace of 16 * 1024 bytes looked as if it grew, for 16 samples were run.
    one = trace([(0, 1024), (0, 100)], [0, 1, ~1, ~0], micro_batch=16)
    other = trace([(16 * 1024, 0), (0, 100)], [0, 1, ~1, ~0], micro_batch=40)
    assert replay.trace_between(one, other).sizes == ((16 * 1024, 0), (0, 100))
    assert replay.trace_between(one, other).micro_batch == 40


def test_trials_that_did_not_do_the_same_are_not_compared() -> None:
    one = trace([(0, 1024), (0, 100)], [0, 1, ~1, ~0], micro_batch=16)
    assert replay.trace_between(one, trace([(0, 1024)], [0, ~0], micro_batch=40)).sizes == ((0, 1024),)
    other_order = trace([(0, 64), (0, 100)], [0, 1, ~0, ~1], micro_batch=40)
    assert replay.trace_between(one, other_order) is other_order
    assert replay.trace_between(one, one) is one


def test_what_was_held_may_differ_between_the_two() -> None:
    one = trace([(0, 1000)], [1, ~1, ~0], held=[(0, 256)], micro_batch=10)
    other = trace([(20_500, 0)], [0, ~0], micro_batch=20)
    # 10,000 bytes with 10 samples and 20,500 with 20.
    assert replay.trace_between(one, other).sizes == ((-500, 1050),)
    assert replay.replayed_peak_bytes(replay.trace_between(one, other), 30) == 31_232


def test_a_block_waits_for_room_only_where_operations_run_side_by_side() -> None:
    # The second block finds no room until the first is given back, an event later.
    alone = trace([(0, 600), (0, 600)], [0, 1, ~0, ~1], total=1024)
    assert replay.replayed_peak_bytes(alone, 1) is None
    assert replay.replayed_peak_bytes(replace(alone, in_parallel=True), 1) == 768


def test_a_block_does_not_wait_for_ever() -> None:
    rest = [(0, 1)] * 10
    order = [0, 1, *range(2, 12), ~0, ~1]
    assert (
        replay.replayed_peak_bytes(replace(trace([(0, 600), (0, 600), *rest], order, total=4096), in_parallel=True), 5)
        is None
    )


@pytest.mark.parametrize("seed", range(4))
def test_only_a_size_that_finds_room_in_every_order_is_proposed(seed: int) -> None:
    rng = random.Random(seed)
    order: list[int] = []
    live: list[int] = []
    for block in range(60):
        order.append(block)
        live.append(block)
        while live and rng.random() < 0.45:
            order.append(~live.pop(rng.randrange(len(live))))
    told = trace([(rng.choice((0, 3000)), rng.choice((40, 300, 1000))) for _ in range(60)], order, total=300 * KIB)
    told = replace(told, in_parallel=True)
    found = replay.largest_in_any_order(told, 300 * KIB, at_most=1000)
    orders = list(replay._other_orders(told))
    assert len({other.order for other in orders} | {told.order}) == 6
    assert all(sorted(other.order) == sorted(told.order) for other in orders)
    peaks = [replay.replayed_peak_bytes(other, found) for other in (told, *orders)]
    assert all(peak is not None and peak <= 300 * KIB for peak in peaks)
    assert list(replay._other_orders(replace(told, in_parallel=False))) == []


def test_what_is_asked_for_counts_and_not_the_chunk() -> None:
    # 600 bytes are given the whole kibibyte that is free, for it is not twice as large.
    allocator = Allocator(((0, KIB),), ())
    allocator.allocate(600)
    assert (allocator.peak_bytes, allocator.asked_peak_bytes) == (KIB, 768)
