"""Record of what a trial asked of the device's allocator."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AllocationTrace:
    """Requests of one trial's steps to the device's allocator, block by block, and the blocks from before.

    ``regions`` are the pieces of address space that the allocator has, as (start, bytes). The first ``len(held)``
    blocks were there before, as (start, bytes). Block ``len(held) + i`` was allocated in the trial, and ``sizes[i]`` is
    what it takes, as (bytes whatever the size, bytes per sample). ``order`` lists the events: ``n`` allocates block n,
    ``~n`` gives it back. ``in_parallel`` is True if operations ran side by side, or pieces of one, so that the order
    differs from run to run; ``within_operations`` is True if it was pieces alone. ``is_compiled`` is True if the
    largest block is that of a program compiled by XLA, whose growth its own plan tells. A trace that no allocator can
    have left is refused when it is made.
    """

    micro_batch: int
    regions: tuple[tuple[int, int], ...]
    held: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[float, float], ...]
    order: tuple[int, ...]
    in_parallel: bool = False
    is_compiled: bool = False
    within_operations: bool = False

    def __post_init__(self) -> None:
        _require(self.micro_batch >= 1, f"micro_batch must be at least 1. Received: {self.micro_batch!r}")
        _require(bool(self.regions), f"regions must not be empty. Received: {self.regions!r}")
        blocks = len(self.held) + len(self.sizes)
        strange = [step for step in self.order if not -blocks <= step < blocks]
        _require(not strange, f"order must name blocks from 0 to {blocks - 1}. Received: {strange[:3]!r}")
        _require_apart("regions", self.regions)
        _require_apart("held", self.held)
        ordered = sorted(self.regions)
        for start, taken in self.held:
            inside = ordered[max(bisect_right(ordered, (start, math.inf)) - 1, 0)]
            fits = inside[0] <= start and start + taken <= inside[0] + inside[1]
            _require(fits, f"held must lie in regions. Received: {(start, taken)!r}")
        _require(all(map(math.isfinite, itertools.chain(*self.sizes))), f"sizes must be finite. Received: {self.sizes}")
        live = set(range(len(self.held)))
        for step in self.order:
            block = step if step >= 0 else ~step
            fits = (block in live) == (step < 0)
            _require(fits, f"order must take what is free, and give back what is taken. Received: {step!r}")
            live ^= {block}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_apart(name: str, pieces: tuple[tuple[int, int], ...]) -> None:
    ordered = sorted(pieces)
    for start, taken in ordered:
        _require(start >= 0 and taken > 0, f"{name} must have bytes at an address. Received: {(start, taken)!r}")
    for (start, taken), (following, _) in itertools.pairwise(ordered):
        _require(
            start + taken <= following, f"{name} must not overlap. Received: {(start, taken)!r} before {following!r}"
        )
