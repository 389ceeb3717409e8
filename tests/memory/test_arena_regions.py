"""Regions of an allocator that grows, found from the events of an allocator whose regions are known."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from autobatch.memory import arena_regions
from autobatch.memory.profile_reader import Event
from autobatch.search.replay import Allocator, FullError

MIB = 2**20
PAGE = 4096
START = 1 << 44


def beside(*sizes_mib: int, far: int = 0) -> tuple[tuple[int, int], ...]:
    """Regions one above the other, a page apart, as the C library takes them; ``far`` more MiB lie between two."""
    regions = []
    at = START
    for size in sizes_mib:
        regions.append((at, size * MIB))
        at += size * MIB + PAGE + far * MIB
    return tuple(regions)


def events_of(regions, held, *, seed: int, sizes=(300, 5000, 40_000, 700_000, 3_000_000)) -> list[Event]:
    """Events of random requests, told as TensorFlow's profiler tells them."""
    drawn = random.Random(seed)
    allocator = Allocator(regions, held)
    total = sum(size for _, size in regions)
    live: dict[int, tuple[int, int]] = {}
    events = []
    for _ in range(400):
        release = bool(live) and drawn.random() < 0.45
        before = allocator.in_use_bytes
        if release:
            address = drawn.choice(sorted(live))
            wanted, taken = live.pop(address)
            allocator.release(address)
        else:
            wanted = drawn.choice(sizes)
            try:
                address = allocator.allocate(wanted)
            except FullError:
                continue
            taken = allocator.in_use_bytes - before
            live[address] = wanted, taken
        free = total - allocator.in_use_bytes
        largest = max((size for size, _ in allocator._free), default=0)
        share = 1 - largest / free if free else 0.0
        events.append(Event(not release, address, wanted, taken, "", "op", True, allocator.in_use_bytes, free, share))
    return events


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "regions",
    [
        beside(64),
        beside(46, 2),
        beside(46, 16, 2, far=300),
        beside(30, 16, 16, 2),
        beside(114, 16, 8, 4, 2),
    ],
    ids=str,
)
def test_regions_in_which_everything_moves_are_found(regions, seed):
    held = ((regions[-1][0], 256), (regions[-1][0] + 1024, 512))
    events = events_of(regions, held, seed=seed)
    found = arena_regions.find_regions(events, dict(held))
    touched = [
        (start, size) for start, size in regions if sum(start <= event.address < start + size for event in events) > 20
    ]
    # No block may be put over the end of a region, and what is found adds up to no more than there is.
    for start, size in touched:
        inside = [each for each in found if start <= each[0] < start + size]
        assert inside, "each region that was used is known"
        assert all(other + taken <= start + size + PAGE for other, taken in inside)
    assert sum(size for _, size in found) <= sum(size for _, size in regions)
    for (one, size), (other, _) in itertools.pairwise(found):
        assert one + size <= other


def test_the_last_region_has_what_the_others_left():
    regions = beside(30, 16, 2, far=300)
    events = events_of(regions, (), seed=3)
    assert arena_regions.find_regions(events, {}) == list(regions)


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_that_begin_differently_behind_their_pages_start_are_told_apart(seed):
    far = START + 400 * MIB
    regions = ((START, 58 * MIB), (far + 320, 4 * MIB), (far + 4 * MIB + PAGE + 64, 2 * MIB))
    events = events_of(regions, (), seed=seed, sizes=(300, 5000, 40_000, 70_000, 700_000))
    assert arena_regions.find_regions(events, {}) == list(regions)


def test_what_nobody_names_at_the_end_of_a_region_shortens_it():
    # 10 MiB at the end of the only region are held, and no event names them: the largest free piece tells.
    (region,) = regions = beside(64)
    unknown = (region[0] + 54 * MIB, 10 * MIB)
    events = events_of(regions, (unknown,), seed=1)
    found = arena_regions.find_regions(events, {})
    assert found[0][0] == region[0]
    assert found[0][1] == pytest.approx(54 * MIB, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_what_nobody_names_beneath_the_free_piece_is_neither_the_end_of_a_region_nor_a_region(seed):
    # 0.8 MiB above a known weight: the free piece above them could begin a region, if one of 6.8 MiB could be.
    regions = beside(46, 2, far=100)
    known = [(START, 6 * MIB)]
    unknown = (START + 6 * MIB, MIB * 4 // 5 // 256 * 256)
    events = events_of(regions, (*known, unknown), seed=seed)
    assert {event.address < START + 46 * MIB for event in events} == {True, False}
    assert arena_regions.find_regions(events, dict(known)) == list(regions)


def test_a_region_that_is_not_taken_yet_is_added():
    # Two regions of 2 and 4 MiB were taken of a limit of 64 MiB; the events know what is free in all.
    regions = beside(2, 4, far=100)
    told = [
        Event(
            event.allocated,
            event.address,
            event.requested_bytes,
            event.chunk_bytes,
            event.shape,
            event.operation,
            event.is_output,
            event.in_use_bytes,
            event.free_bytes + 58 * MIB,
            event.fragmentation,
        )
        for event in events_of(regions, (), seed=2, sizes=(300, 5000, 40_000, 700_000))
    ]
    found = arena_regions.find_regions(told, {})
    assert sum(size for _, size in found) == pytest.approx(64 * MIB, rel=0.01)


@pytest.mark.parametrize("recorded", ["wrong_seam", "unnamed_beginning"])
def test_regions_of_a_real_arena_are_found(recorded):
    """Recorded in arenas of 144 MiB, whose regions TensorFlow's own dump told: 114, 16, 8, 4 and 2 MiB.

    The last three lie one above the other. An untouched block in the first region looks like the end of a region; or no
    event names the first blocks of the last one.
    """
    recording = json.loads(Path(__file__).with_name("recordings").joinpath(f"{recorded}.json").read_text())
    limit = recording["limit_bytes"]
    events = [
        Event(bool(made), START + address, chunk, chunk, "", "op", True, in_use, limit - in_use, share)
        for made, address, chunk, in_use, share in recording["events"]
    ]
    found = arena_regions.find_regions(events, {START + address: size for address, size in recording["held"]})
    assert [round(size / MIB) for _, size in found] == [114, 16, 8, 2]  # nothing moves in that of 4 MiB
    for (one, size), (other, _) in itertools.pairwise(found):
        assert one + size <= other
