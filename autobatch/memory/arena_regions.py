"""Regions of address space that TensorFlow's BFC allocator has taken from its device, told by recorded events.

The allocator asks its device for regions of 1 MiB, 2 MiB, 4 MiB and so on, each a power of two, and the last takes what
is left of the limit. A block lies within one region, so that the ends of regions decide if there is room. The events do
not say where regions end. They do give the addresses of blocks, the bytes in use and free, and the largest free piece
(by ``fragmentation``, which counts what has been taken so far, whereas "free" counts the whole limit). So several
guesses are made, and the one taken in which the largest free piece is nearest to what the events say. The model is
``xla/tsl/framework/bfc_allocator.cc``.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autobatch.memory.profile_reader import Event

_MIB = 2**20

_PAGE = 4096
"""Bytes between two regions that the C library took from the system one after the other."""

_SHIFT = 256
"""Bytes by which regions differ in how far they begin behind a page's start: 64 and 320 were seen."""

_UNNAMED = 64 * 2**10
"""Most bytes of small blocks, at the beginning of a region, that no event names."""

ROUND_BYTES = 256
"""Unit to which the allocator rounds a block up."""

_MOMENTS = 40
"""Number of events after which the largest free piece is compared."""

_LEAST_CHANGE = 2e-5
"""Least change of ``fragmentation``, of which six digits are told, that tells the bytes taken to a tenth of a MiB."""

_AGREE = 0.5
"""Share of the changes that must tell the same bytes taken; others are those of the largest free piece."""

_CANNOT_BE = 2**60
"""Bytes that count as missed for a region that is smaller than the allocator takes any but the last."""

_MOST_SEAMS = 8
"""Number of seams, and of wide gaps, that are looked at; each costs some milliseconds for each region."""

Region = tuple[int, int]
"""A region as (start, bytes)."""

Blocks = list[tuple[int, int]]
"""Blocks as (address, bytes), lowest first."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """Blocks that were held after an event, and the largest free piece then."""

    blocks: Blocks
    largest_free: int


@dataclass(frozen=True, slots=True)
class _Told:
    """Facts that the events tell: the bytes taken from the device, those in use before, blocks, and some moments.

    ``touched`` are the addresses of the blocks that moved.
    """

    total: int
    in_use_before: int
    held: Blocks
    blocks: Blocks
    touched: frozenset[int]
    moments: tuple[_Moment, ...]


def find_regions(events: Sequence[Event], held: dict[int, int]) -> list[Region]:
    """Return the regions in which ``events`` took and gave back blocks, lowest first; none overlaps another.

    ``held`` gives bytes by address of blocks that lay there before. Memory that is neither held nor in these regions is
    added as a region of its own, above the others: the allocator has not taken it yet, or has not used it.
    """
    limit = events[0].in_use_bytes + events[0].free_bytes
    taken = _taken(events, limit)
    told = _told_by(events, held, taken)
    pages = _seams(told)
    gaps = [address for address in _behind_gaps(told) if address not in pages]
    seams = gaps + pages  # what is less likely is tried without first
    missed, regions = _best(seams, told)
    # A block may end where a seam could be. So a seam is believed if the free pieces are told worse without it, or as
    # well while the regions add up to the limit.
    for seam in seams[:]:
        fewer = [other for other in seams if other != seam]
        missed_without, without = _best(fewer, told)
        adds_up = sum(size for _, size in regions) == told.total
        if missed_without < missed or (missed_without == missed and not adds_up):
            seams, regions, missed = fewer, without, missed_without
    # As long as a wrong one was among them, a right one may have seemed to make no difference.
    for seam in gaps + pages:
        if seam not in seams:
            missed_with, beside = _best([*seams, seam], told)
            if missed_with < missed:
                seams, regions, missed = [*seams, seam], beside, missed_with
    regions = _with_the_rest(regions, told)
    if limit - taken >= _MIB:
        regions.append((max(start + size for start, size in regions) + _PAGE, limit - taken))
    return regions


def _with_the_rest(regions: list[Region], told: _Told) -> list[Region]:
    """Return the regions, the last one with what they lack of all that was taken and no others can make up.

    A block that no event names may lie beneath the free piece that has shown how far the last region reaches. What
    nobody has used are whole regions, each of another power of two.
    """
    used = [
        (start, size) for start, size in regions if any(start <= address < start + size for address, _ in told.blocks)
    ]
    partial = [number for number, (_, size) in enumerate(used) if _power_of_two(size) - size > _UNNAMED]
    if len(partial) != 1:
        return regions
    number = partial[0]
    start, size = used[number]
    whole = [_power_of_two(other) // _MIB for _, other in used[:number] + used[number + 1 :]]
    lacking = told.total - sum(taken for _, taken in used)
    unused_mib = (lacking + _SHIFT) // _MIB
    if any(unused_mib & other for other in whole):
        unused_mib = 0
    longer = size + (lacking - unused_mib * _MIB) // ROUND_BYTES * ROUND_BYTES
    if longer <= size or any(start < above < start + longer for above, _ in used):
        return regions
    used[number] = (start, longer)
    return used + _unused(used, told)


def largest_free_before(events: Sequence[Event]) -> int | None:
    """Return the bytes of the largest free piece before the ``events``, by what the first tells; None if unknown."""
    first = events[0]
    limit = first.in_use_bytes + first.free_bytes
    # Where some memory is not taken yet, still less may have been taken then.
    return int(first.free_bytes * (1 - first.fragmentation)) if _taken(events, limit) == limit else None


def _taken(events: Sequence[Event], limit: int) -> int:
    """Return the bytes that the allocator has taken from its device by the end of the events, of at most ``limit``.

    Between two events that leave the largest free piece as it is, ``fragmentation`` changes by what is in use alone. So
    the two tell the bytes taken. Regions are whole MiB, as the limit is, or the limit itself is returned.
    """
    found: list[int] = []
    for one, other in itertools.pairwise(events[len(events) // 2 :]):
        before, after = 1 - one.fragmentation, 1 - other.fragmentation
        if abs(before - after) >= _LEAST_CHANGE:
            taken = (one.in_use_bytes * before - other.in_use_bytes * after) / (before - after)
            found.append(round(taken / _MIB) * _MIB)
    if not found:
        return limit
    taken, times = Counter(found).most_common(1)[0]
    most_in_use = max(event.in_use_bytes for event in events)
    return taken if times >= max(3, _AGREE * len(found)) and most_in_use <= taken < limit else limit


def _told_by(events: Sequence[Event], held: dict[int, int], taken: int) -> _Told:
    first = events[0]
    missing = first.in_use_bytes + first.free_bytes - taken
    touched = {event.address: event.chunk_bytes for event in events}
    live = dict(held)
    every = max(1, len(events) // _MOMENTS)
    moments = []
    for number, event in enumerate(events):
        if event.allocated:
            live[event.address] = event.chunk_bytes
        else:
            live.pop(event.address, None)
        # Where some memory is not taken yet, less of it may have been taken at first.
        if number % every == 0 and (not missing or number >= len(events) // 2):
            free_bytes = event.free_bytes - missing
            moments.append(_Moment(sorted(live.items()), int(free_bytes * (1 - event.fragmentation))))
    return _Told(
        total=taken,
        in_use_before=first.in_use_bytes - (first.chunk_bytes if first.allocated else -first.chunk_bytes),
        held=sorted(held.items()),
        blocks=sorted({**held, **touched}.items()),
        touched=frozenset(touched),
        moments=tuple(moments),
    )


def _best(seams: list[int], told: _Told) -> tuple[int, list[Region]]:
    """Return the regions between ``seams`` that tell the largest free pieces best, behind the bytes that they miss."""
    guesses = ((_missed(regions, told) + short * _CANNOT_BE, regions) for regions, short in _guesses(seams, told))
    return min(guesses, key=lambda guess: guess[0])


def _guesses(seams: list[int], told: _Told) -> Iterator[tuple[list[Region], int]]:
    """Yield the regions for each region that may have been taken last; the largest extents first.

    Beside them is the number of other regions for whose whole size the next one leaves no room.
    """
    extents = [
        (start, end) for start, end in _extents(told, seams) if any(start <= address < end for address in told.touched)
    ]
    ends = [start for start, _ in extents[1:]] + [extents[-1][0] + told.total]
    for last in sorted(range(len(extents)), key=lambda number: extents[number][0] - extents[number][1]):
        regions = []
        short = 0
        for number, (start, end) in enumerate(extents):
            if number != last:
                whole, room = _power_of_two(end - start), ends[number] - start
                short += whole > room + _UNNAMED
                regions.append((start, min(whole, room)))
        start, end = extents[last]
        most = min(told.total - sum(size for _, size in regions), _end_by_free_pieces(told, start, ends[last]) - start)
        regions.append((start, max(end - start, most)))
        yield sorted(regions + _unused(regions, told)), short


def _unused(regions: list[Region], told: _Told) -> list[Region]:
    """Return a region above the others for memory that was taken, and is neither in them nor held; else none."""
    known = sum(size for address, size in told.held if any(start <= address < start + n for start, n in regions))
    unused = told.total - sum(size for _, size in regions) - max(0, told.in_use_before - known)
    if unused < _MIB:
        return []
    return [(max(start + size for start, size in regions) + _PAGE, unused // ROUND_BYTES * ROUND_BYTES)]


def _seams(told: _Told) -> list[int]:
    """Return the addresses of blocks at which a region may begin next to another one."""
    seams: list[int] = []
    starts = [told.blocks[0][0]]
    end = told.blocks[0][0]
    for address, taken in told.blocks:
        # The last region takes what the others, whole MiB each, have left.
        behind = end <= address - _PAGE + _SHIFT
        if behind and any(_may_end(end - start, address - start - _PAGE, told.total) for start in starts):
            seams.append(address)
        if address in seams or address - end >= _MIB:
            starts.append(address)
        end = max(end, address + taken)
    return seams[:_MOST_SEAMS]


def _may_end(covered: int, size: int, total: int) -> bool:
    """Return True if the allocator may have taken a region that blocks cover so far, for up to ``size`` bytes.

    It may be a little smaller, where blocks that nobody names lie at the beginning of the next one.
    """
    power = _power_of_two(max(covered, size - _UNNAMED) - _SHIFT)
    may_be_whole = (total - size + _SHIFT) % _MIB <= 2 * _SHIFT
    return _MIB - _SHIFT <= size < total and (power <= size + _SHIFT or may_be_whole)


def _behind_gaps(told: _Told) -> list[int]:
    """Return the addresses of blocks behind a wide gap, where another region may begin; the widest gaps only."""
    gaps = []
    end = told.blocks[0][0]
    for address, taken in told.blocks:
        if address - end >= _MIB:
            gaps.append((address - end, address))
        end = max(end, address + taken)
    return [address for _, address in sorted(gaps)[-_MOST_SEAMS:]]


def _extents(told: _Told, seams: list[int]) -> list[tuple[int, int]]:
    """Return (start, end) of what blocks cover in each region."""
    extents: list[tuple[int, int]] = []
    for address, taken in told.blocks:
        beyond = bool(extents) and address + taken - extents[-1][0] > told.total
        if not extents or beyond or address in seams:
            extents.append((address, address + taken))
        else:
            extents[-1] = (extents[-1][0], max(extents[-1][1], address + taken))
    return extents


def _power_of_two(size: int) -> int:
    return int(max(_MIB, 1 << (size - 1).bit_length()))


def _end_by_free_pieces(told: _Told, start: int, ends: int) -> int:
    """Return a bound on the end of the region at ``start``: no free piece at its end is larger than the largest."""
    bound = ends
    for moment in told.moments:
        top = max((address + taken for address, taken in moment.blocks if start <= address < ends), default=start)
        bound = min(bound, -(-(top + moment.largest_free) // ROUND_BYTES) * ROUND_BYTES)
    return bound


def _missed(regions: list[Region], told: _Told) -> int:
    """Return by how many bytes in all the largest free piece in ``regions`` differs from what the moments tell.

    Bytes of ``regions`` beyond the limit count each time as well.
    """
    too_many = max(0, sum(size for _, size in regions) - told.total)
    return sum(too_many + abs(_largest_free(regions, moment.blocks) - moment.largest_free) for moment in told.moments)


def _largest_free(regions: list[Region], blocks: Blocks) -> int:
    largest = 0
    for start, size in regions:
        free_from, end = start, start + size
        for address, taken in blocks[bisect_left(blocks, (start, 0)) : bisect_left(blocks, (end, 0))]:
            largest = max(largest, address - free_from)
            free_from = max(free_from, address + taken)
        largest = max(largest, end - free_from)
    return largest
