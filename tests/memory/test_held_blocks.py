"""What lay in the allocator's memory before a recording: where it is known, and what stands for the rest."""

import json
from pathlib import Path

import pytest
import tensorflow as tf

from autobatch.memory import held_blocks
from autobatch.memory.allocations import Recording, trace_of
from autobatch.memory.profile_reader import Event
from autobatch.search.replay import replayed_peak_bytes

MIB = 2**20
START = 0x7F0000000000
REGION = (START, 100 * MIB)
KNOWN = [(START, MIB), (START + 3 * MIB, MIB)]  # a hole of 2 MiB between them, and 96 MiB behind


def unaccounted(rest, touched=(), largest_free=None, held=KNOWN):
    return held_blocks.unaccounted([REGION], list(held), dict(touched), rest, largest_free)


def test_the_smallest_holes_are_taken_first():
    assert unaccounted(MIB) == [(START + MIB, MIB)]
    assert unaccounted(3 * MIB) == [(START + MIB, 2 * MIB), (START + 4 * MIB, MIB)]
    assert unaccounted(0) == unaccounted(-MIB) == []


def test_a_hole_too_small_for_any_block_does_not_end_the_search_for_others():
    held = [(START, MIB), (START + MIB + 64, MIB - 64), (START + 3 * MIB, MIB)]
    assert unaccounted(MIB, held=held) == [(START + 2 * MIB, MIB)]


def test_what_is_known_to_be_free_in_one_piece_stays_so():
    # Something moved in the large hole, so that a small one seems to lie before it.
    touched = {START + 5 * MIB: 10 * MIB}
    assert unaccounted(3 * MIB, touched) == [(START + 4 * MIB, MIB), (START + MIB, 2 * MIB)]
    assert unaccounted(3 * MIB, touched, largest_free=96 * MIB) == [(START + MIB, 2 * MIB)]
    # "fragmentation" has six digits, so that the piece may be told a little too large.
    assert unaccounted(3 * MIB, touched, largest_free=96 * MIB + 500) == [(START + MIB, 2 * MIB)]
    # The large hole is half a MiB larger than the free piece: that much may lie in it.
    assert unaccounted(3 * MIB, touched, largest_free=95 * MIB + MIB // 2) == [
        (START + 4 * MIB, MIB // 2),
        (START + MIB, 2 * MIB),
    ]


def test_the_rest_of_a_chunk_is_taken_before_smaller_holes():
    # A chunk of 3 MiB is not split for a block of 2, so that the MiB behind the block is most likely its own.
    held = [(START, 2 * MIB), (START + 3 * MIB, MIB // 4), (START + 3 * MIB + MIB // 2, MIB)]
    assert unaccounted(MIB, held=held)[0] == (START + 2 * MIB, MIB)


def test_what_something_larger_took_later_was_free():
    touched = {START: 2 * MIB}  # the block of 1 MiB that was held there went, and one of 2 MiB came
    assert unaccounted(MIB, touched) == [(START + 2 * MIB, MIB)]


def test_a_trial_that_ran_finds_room_when_it_is_played_again():
    """A convolutional network at 148 samples in an arena of 256 MiB, which it nearly filled."""
    recording = json.loads(Path(__file__).with_name("recordings").joinpath("nearly_full.json").read_text())
    limit = recording["limit_bytes"]
    events = [
        Event(bool(made), START + address, asked, chunk, "", "op", True, in_use, limit - in_use, share)
        for made, address, asked, chunk, in_use, share in recording["events"]
    ]
    trace = trace_of(Recording({START + address: size for address, size in recording["held"]}, events), 148, ())
    assert trace is not None
    assert replayed_peak_bytes(trace, 148) == pytest.approx(228.6 * MIB, rel=0.001)


def test_a_variable_whose_reading_is_a_copy_has_no_known_address():
    plain, scattered = tf.Variable(tf.ones([64, 8])), tf.Variable(tf.ones([64, 8]))
    scattered.scatter_add(tf.IndexedSlices(tf.ones([1, 8]), [3]))
    found = held_blocks.addresses_of([plain, scattered, tf.ones([16])], "CPU:0")
    assert sorted(found.values()) == [64, 64 * 8 * 4]
