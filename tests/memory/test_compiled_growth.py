"""The growth of a compiled program's block with the number of samples, from the plan of one size."""

from __future__ import annotations

import random

import pytest

from autobatch.memory.allocations import Recording, trace_of
from autobatch.memory.compiled_growth import growth
from autobatch.memory.profile_reader import Event
from autobatch.seams.compiled_programs import Block, Buffer
from autobatch.search import replay

FAR = 1 << 40


def block(*buffers):
    return Block(max(offset + size for offset, size, _ in buffers), tuple(Buffer(*each) for each in buffers))


def test_what_grows_in_the_pile_grows_and_the_rest_does_not():
    piled = block((0, 1300, (13, 25)), (1300, 400, (100,)), (1700, 2600, (26, 25)), (0, 900, (225,)))
    assert growth(piled, 13, (), at_most=FAR) == (400, 300)


def test_the_shapes_of_weights_do_not_grow():
    piled = block((0, 4 * 26 * 10, (26, 10)), (1040, 1300, (13, 25)))
    assert growth(piled, 13, {(26, 10)}, at_most=FAR) == (1040, 100)
    assert growth(piled, 13, (), at_most=FAR) == (0, 180)


def test_one_sample_shows_no_growth():
    assert growth(block((0, 100, (1, 25))), 1, (), at_most=FAR) == (100, 0)


def test_the_pile_counts_that_will_be_the_highest_where_memory_ends():
    # Two piles side by side: the fixed one is higher now, the growing one as soon as there are twice the samples.
    piled = block((0, 5000, (1250,)), (0, 4900, (13, 94)), (5000, 130, (13, 2)))
    fixed, per_sample = growth(piled, 13, (), at_most=FAR)
    assert fixed + 13 * per_sample == piled.size_bytes
    assert 13 * per_sample == 4900 + 130
    fixed, per_sample = growth(piled, 13, (), at_most=piled.size_bytes)
    assert (fixed, 13 * per_sample) == (5000, 130)


@pytest.mark.parametrize("seed", range(30))
def test_no_larger_size_needs_more_than_is_predicted(seed):
    """Values are piled in random columns, side by side in time: each column is a pile, the highest is the block."""
    drawn = random.Random(seed)
    micro_batch = 13
    columns = [
        [(drawn.choice((0, 1)), drawn.randrange(1, 40)) for _ in range(drawn.randrange(1, 8))]
        for _ in range(drawn.randrange(1, 5))
    ]

    def height(samples):
        return max(sum(64 * units * (samples if grows else 13) for grows, units in column) for column in columns)

    buffers = []
    for column in columns:
        at = 0
        for grows, units in column:
            size = 64 * units * micro_batch
            buffers.append((at, size, (micro_batch, units) if grows else (units, 17)))
            at += size
    fixed, per_sample = growth(block(*buffers), micro_batch, (), at_most=height(400))
    assert fixed + per_sample * micro_batch == pytest.approx(height(micro_batch))
    assert fixed + per_sample * 400 >= 0.999 * height(400)


def event(allocated, address, size, in_use, shape="", free=1 << 22):
    return Event(allocated, address, size, size, shape, "op", True, in_use, free - in_use, 0.0)


def recorded(blocks):
    """A trial of 13 samples: a variable that stays, a batch, and a program's block of 1 MiB."""
    start, big = 1 << 30, 1 << 20
    return Recording(
        events=[
            event(True, start, 4096, 4096, "[1024]"),
            event(True, start + 4096, 13 * 256, 4096 + 13 * 256, "[13,64]"),
            event(True, start + 8192, big, 4096 + 13 * 256 + big),
            event(False, start + 8192, big, 4096 + 13 * 256),
            event(False, start + 4096, 13 * 256, 4096),
        ],
        compiled=blocks,
    )


def test_a_block_of_the_program_that_ran_is_replayed_at_other_sizes():
    big = 1 << 20
    blocks = [Block(big, (Buffer(0, big // 2, (13, 7)), Buffer(big // 2, big // 2, (11,)))), Block(big // 2, ())]
    trace = trace_of(recorded(blocks), 13, ())
    assert trace.is_compiled
    assert trace.held == ((1 << 30, 4096),)  # what the first trial made is there when the next one begins
    peaks = [replay.replayed_peak_bytes(trace, samples) for samples in (13, 26)]
    assert peaks[0] == 4096 + 13 * 256 + big
    assert peaks[1] == pytest.approx(4096 + 26 * 256 + 1.5 * big, abs=512)


def test_blocks_of_other_programs_change_nothing():
    trace = trace_of(recorded([Block(12345, (Buffer(0, 12345, (13,)),))]), 13, ())
    assert not trace.is_compiled
    assert trace == trace_of(recorded([]), 13, ())


def test_whatever_a_damaged_plan_says_no_error_leaves():
    drawn = random.Random(0)

    def number():
        return drawn.choice((0, 1, -1, 13, 1 << 20, 1 << 62, -(1 << 40), drawn.randrange(1 << 21)))

    believed = 0
    for _ in range(3000):
        buffers = tuple(
            Buffer(number(), number(), tuple(number() for _ in range(drawn.randrange(3))))
            for _ in range(drawn.randrange(5))
        )
        trace = trace_of(recorded([Block(drawn.choice((1 << 20, number())), buffers)]), drawn.choice((1, 13)), ())
        believed += trace is not None
    assert believed
