"""No recording, however damaged, ends a search: it costs the hint and nothing else."""

from __future__ import annotations

import random

import pytest

from autobatch.memory.allocations import Recording, trace_of
from autobatch.memory.profile_reader import Event
from autobatch.records import Outcome, TrialResult
from autobatch.search import Goal, Room, replay, search
from search.damaged import damaged, whole

MIB = 2**20


@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_damaged_recordings_end_no_search(part):
    rng = random.Random(part)
    believed = 0
    for _ in range(1000):
        micro_batch = rng.choice((1, 2, 7, 13, 16, 64))
        held, events = damaged(rng, *whole(rng, micro_batch))
        told = trace_of(Recording(held, events), micro_batch, {(16, 10)})
        believed += told is not None
        largest = rng.randrange(1, 400)
        run = []

        def run_trial(request, largest=largest, told=told, run=run):
            run.append(request.micro_batch)
            fits = request.micro_batch <= largest
            peak = 10 * MIB + request.micro_batch * MIB
            return TrialResult(
                request.micro_batch,
                Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
                peak_bytes=peak if fits else None,
                allocations=told if fits else None,
            )

        found = search(run_trial, Goal(target_batch=512, objective="largest"), Room(10 * MIB + largest * MIB))
        assert found.largest_fit in run
        assert found.largest_fit <= largest
    assert 0 < believed < 900, "some faults leave a recording that may be true; most do not"


def test_a_whole_recording_is_believed_and_played_through():
    rng = random.Random(1)
    for _ in range(1000):
        held, events = whole(rng, 13)
        told = trace_of(Recording(held, events), 13, ())
        assert told is not None
        assert replay.replayed_peak_bytes(told, 1) is None or replay.replayed_peak_bytes(told, 1) > 0
        replay.largest_that_fits(told, 2**40, at_most=1000)


@pytest.mark.parametrize("between", [0, 1, 10 * MIB, 44 * MIB, 200 * MIB, 2**40])
def test_an_arena_that_grows_makes_no_regions_over_each_other(between):
    # Two regions of 16 and 8 MiB, of a limit of 128: of the rest nothing is taken yet.
    rng = random.Random(0)
    base = 0x7F0000000000
    other = base + 16 * MIB + between
    held = {base: MIB, other: MIB}
    events, live, in_use = [], [], 2 * MIB

    def note(allocated, address, size):
        nonlocal in_use
        in_use += size if allocated else -size
        shape = f"[8,{size // 32}]"
        events.append(Event(allocated, address, size, size, shape, "op", True, in_use, 128 * MIB - in_use, 0.2))

    for address, size in ((base + MIB, 10 * MIB), (other + MIB, 6 * MIB), (base + 11 * MIB, 4 * MIB)):
        note(True, address, size)
        live.append((address, size))
    rng.shuffle(live)
    for address, size in live:
        note(False, address, size)
    told = trace_of(Recording(held, events), 8, ())
    assert told is not None
    assert sum(taken for _, taken in told.regions) <= 128 * MIB
    assert 22 * MIB <= (replay.replayed_peak_bytes(told, 8) or 0) <= 28 * MIB  # a chunk may be larger than its block
    assert replay.replayed_peak_bytes(told, 1000) is None
