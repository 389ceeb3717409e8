"""Replay of a trial's allocations for another size, on a model of the allocator: its peak, and if every block has room.

An allocator that is nearly full fails although the bytes would do, because its free memory is in pieces. The number of
pieces depends on what is allocated and given back, and in what order. A trial's :class:`AllocationTrace` holds exactly
that, and how each block grows with the micro-batch. So the trace can be played again for another size.

The model is BFC, "best fit with coalescing", after ``xla/tsl/framework/bfc_allocator.cc``: TensorFlow's allocator on
GPUs and in limited CPU arenas. Its rules:

- A block is rounded up to 256 bytes, and gets the smallest free chunk that is large enough; of equals, the lowest.
  TensorFlow looks for it in bins of sizes that double, which finds the same chunk.
- A chunk is split where it is at least twice as large as the block, or 128 MiB larger; otherwise the block gets all.
- A chunk that is given back is joined with its free neighbours in the same region.

Where operations run side by side, no two steps ask for their blocks in quite the same order. A size that finds room in
one order may find none in another. So the order that was recorded is then played a few times more, with each event a
little later than it was, and only a size that finds room in all of them is proposed. A block that finds no room waits
then for a few events, because TensorFlow's allocator waits for other operations to give memory back.

This module knows bytes; it proposes nothing.
"""

from __future__ import annotations

import functools
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from autobatch.allocation_trace import AllocationTrace

UNIT_BYTES = 256
_SPLIT_BYTES = 128 * 2**20

_CLOSE = 0.005
"""Part of a size to which a search by replay is precise: a replay takes up to a second."""

_LOOK_BACK = (0.995, 0.99, 0.985, 0.98, 0.96, 0.93, 0.9)
"""Smaller sizes that must fit too for the largest that fits to be believed, as parts of it."""


_REACH = 2
"""Most places by which an event is moved in another order, as recordings of one step differ from run to run."""

_PATIENCE = 2 * _REACH + 1
"""Events for which a block waits: what it is waiting for may have been moved as far as itself. From two events on more
patience was seen to change nothing."""

_ORDERS = 5
"""Other orders that are played."""

_EVENTS_PLAYED = 40_000
"""Events of other orders that are played for each size, at most: some take half a second for all of them."""


class FullError(Exception):
    """No free chunk is large enough."""


class Allocator:
    """A BFC allocator on ``regions`` (start, bytes) in which the blocks ``held`` (address, bytes) are taken.

    ``in_use_bytes`` counts the chunks that were given, ``asked_bytes`` the blocks that were asked for, rounded up.
    """

    def __init__(self, regions: tuple[tuple[int, int], ...], held: tuple[tuple[int, int], ...]) -> None:
        self._free: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        self._used = dict(held)
        self._region_starts = {start for start, _ in regions}
        self._asked = dict(held)
        self.in_use_bytes = self.asked_bytes = sum(size for _, size in held)
        self.peak_bytes = self.asked_peak_bytes = self.in_use_bytes
        for start, size in regions:
            at, end = start, start + size
            for address, taken in sorted(held):
                if start <= address < end:
                    self._add(at, address - at)
                    at = address + taken
            self._add(at, end - at)

    def allocate(self, wanted_bytes: int) -> int:
        """Return the address of a new block.

        Raises:
            FullError: no free chunk is large enough.
        """
        rounded = max(UNIT_BYTES, -(-wanted_bytes // UNIT_BYTES) * UNIT_BYTES)
        index = bisect_left(self._free, (rounded, -1))
        if index == len(self._free):
            raise FullError
        size, address = self._free.pop(index)
        del self._size_at[address], self._start_of_end[address + size]
        if size >= 2 * rounded or size - rounded >= _SPLIT_BYTES:
            self._add(address + rounded, size - rounded)
            size = rounded
        self._used[address] = size
        self.in_use_bytes += size
        self._asked[address] = rounded
        self.asked_bytes += rounded
        if self.in_use_bytes > self.peak_bytes:
            self.peak_bytes = self.in_use_bytes
        if self.asked_bytes > self.asked_peak_bytes:
            self.asked_peak_bytes = self.asked_bytes
        return address

    def release(self, address: int) -> None:
        """Give a block back, and join it with free neighbours."""
        size = self._used.pop(address)
        self.in_use_bytes -= size
        self.asked_bytes -= self._asked.pop(address)
        before = None if address in self._region_starts else self._start_of_end.get(address)
        if before is not None:
            size += self._take(before)
            address = before
        behind = address + size
        if behind in self._size_at and behind not in self._region_starts:
            size += self._take(behind)
        self._add(address, size)

    def _add(self, address: int, size: int) -> None:
        if size > 0:
            insort(self._free, (size, address))
            self._size_at[address] = size
            self._start_of_end[address + size] = address

    def _take(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._start_of_end[address + size]
        del self._free[bisect_left(self._free, (size, address))]
        return size


def replayed_peak_bytes(trace: AllocationTrace, micro_batch: int) -> int | None:
    """Compute the peak of ``micro_batch`` samples that follow the trace; None where a block would find no room.

    Blocks count by what is asked for, as in a trial's peak.
    """
    patience = _PATIENCE if trace.in_parallel else 0
    allocator = Allocator(trace.regions, trace.held)
    addresses = [address for address, _ in trace.held] + [0] * len(trace.sizes)
    wanted = [int(fixed + per_sample * micro_batch) for fixed, per_sample in trace.sizes]
    known = len(trace.held)
    waiting: dict[int, int] = {}
    for place, step in enumerate(trace.order):
        if not waiting:
            if step < 0:
                allocator.release(addresses[~step])
                continue
            try:
                addresses[step] = allocator.allocate(wanted[step - known])
                continue
            except FullError:
                waiting[step] = place + patience
        elif step >= 0:
            waiting[step] = place + patience
        elif ~step in waiting:
            return None
        else:
            allocator.release(addresses[~step])
        _let_in(waiting, allocator, addresses, wanted, known)
        if any(until <= place for until in waiting.values()):
            return None
    return None if waiting else allocator.asked_peak_bytes


def _let_in(waiting: dict[int, int], allocator: Allocator, addresses: list[int], wanted: list[int], known: int) -> None:
    """Give room to the blocks that wait, as far as there is some."""
    for block in list(waiting):
        try:
            addresses[block] = allocator.allocate(wanted[block - known])
        except FullError:
            continue
        del waiting[block]


def _asked_peak(trace: AllocationTrace) -> Callable[[int], int]:
    """Return what gives the peak of the bytes that a size's blocks ask for in their order, wherever they may lie."""
    fixed, per_sample = np.array(trace.sizes, float).reshape(-1, 2).T
    held = np.array([taken for _, taken in trace.held], np.int64)
    order = np.array(trace.order, np.int64)
    signs, blocks = np.where(order < 0, -1, 1), np.where(order < 0, ~order, order)

    def peak_bytes(micro_batch: int) -> int:
        units = -(-(fixed + per_sample * micro_batch).astype(np.int64) // UNIT_BYTES)
        asked = np.concatenate([held, np.maximum(units, 1) * UNIT_BYTES])
        return int(held.sum() + (signs * asked[blocks]).cumsum().max(initial=0))

    return peak_bytes


def largest_that_fits(trace: AllocationTrace, budget_bytes: int, *, at_most: int) -> int:
    """Return the largest size up to ``at_most`` whose replay finds room within the budget; 0 if there is none.

    The sizes are bisected, to half a percent: first by what the blocks ask for, which takes no replay, and by replays
    if the size found that way finds no room. Near the edge a size may find room where a smaller one does not. So the
    result lies below the smallest size that was seen to find no room.
    """

    @functools.cache
    def fits(micro_batch: int) -> bool:
        peak = replayed_peak_bytes(trace, micro_batch)
        return peak is not None and peak <= budget_bytes

    asked_peak = _asked_peak(trace)
    low = _doubled_and_bisected(lambda size: asked_peak(size) <= budget_bytes, trace.micro_batch, at_most)
    if not low or not fits(low):
        low = _doubled_and_bisected(fits, trace.micro_batch, at_most)
    while low:
        smaller = sorted({int(part * low) for part in _LOOK_BACK} - {low, 0})
        failed = next((size for size in smaller if not fits(size)), None)
        if failed is None:
            break
        high = failed
        low = max((size for size in smaller if size < failed), default=failed - 1)
        if low < smaller[0]:
            while low and not fits(low):
                high, low = low, int(_LOOK_BACK[-1] * low)
        low = low and _bisected(fits, low, high)
    return low


def _doubled_and_bisected(fits: Callable[[int], bool], first: int, at_most: int) -> int:
    """Return the largest size that fits, by doubling ``first`` and bisecting then; 0 if ``first`` does not fit."""
    low, high = 0, min(first, at_most)
    while fits(high):
        low, high = high, min(2 * high, at_most)
        if low == at_most:
            return low
    return low and _bisected(fits, low, high)


def _bisected(fits: Callable[[int], bool], low: int, high: int) -> int:
    while high - low > max(1, _CLOSE * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_in_any_order(trace: AllocationTrace, budget_bytes: int, *, at_most: int) -> int:
    """Return the largest size whose replay finds room in the order recorded and in some orders near it; 0 if none."""
    largest = largest_that_fits(trace, budget_bytes, at_most=at_most)
    for other in _other_orders(trace):
        if not largest:
            break
        peak = replayed_peak_bytes(other, largest)
        if peak is None or peak > budget_bytes:
            largest = largest_that_fits(other, budget_bytes, at_most=largest)
    return largest


def _other_orders(trace: AllocationTrace) -> Iterator[AllocationTrace]:
    if not trace.in_parallel:
        return
    for seed in range(min(_ORDERS, _EVENTS_PLAYED // max(1, len(trace.order)))):
        yield replace(trace, order=_moved(trace.order, random.Random(seed), len(trace.held)))


def _moved(order: tuple[int, ...], drawn: random.Random, held: int) -> tuple[int, ...]:
    """Return ``order`` with each event up to :data:`_REACH` places later; no block is given back before it is there."""
    places = [place + drawn.random() * _REACH for place in range(len(order))]
    there = set(range(held))
    too_early: set[int] = set()
    moved: list[int] = []
    for place in sorted(range(len(order)), key=places.__getitem__):
        event = order[place]
        if event < 0 and ~event not in there:
            too_early.add(~event)
            continue
        moved.append(event)
        if event >= 0:
            there.add(event)
            if event in too_early:
                moved.append(~event)
    return tuple(moved)


def trace_between(one: AllocationTrace, other: AllocationTrace) -> AllocationTrace:
    """Return ``other`` with each block's growth measured between the two traces.

    ``other`` is returned unchanged if both have the same micro-batch, or allocate and release in a different order.
    """
    if (
        one.micro_batch == other.micro_batch
        or len(one.sizes) != len(other.sizes)
        or _without_held(one) != _without_held(other)
    ):
        return other
    sizes = []
    for first, second in zip(one.sizes, other.sizes, strict=True):
        at_one = first[0] + first[1] * one.micro_batch
        at_other = second[0] + second[1] * other.micro_batch
        per_sample = max(0.0, (at_other - at_one) / (other.micro_batch - one.micro_batch))
        sizes.append((at_other - per_sample * other.micro_batch, per_sample))
    return replace(other, sizes=tuple(sizes))


def _without_held(trace: AllocationTrace) -> list[int]:
    known = len(trace.held)
    steps = ((step, step - known) if step >= 0 else (~step, ~(~step - known)) for step in trace.order)
    return [shifted for block, shifted in steps if block >= known]
