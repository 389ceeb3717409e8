"""Curves of peak memory over micro-batch size, shaped as real ones are, and a device that follows them."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from autobatch.allocation_trace import AllocationTrace
from autobatch.records import Outcome, TrialRequest, TrialResult
from autobatch.search import replay

Curve = Callable[[int], int]

# Several tests search on the same devices, and look for the largest size that truly fits.
_replayed_peak_bytes = functools.cache(replay.replayed_peak_bytes)


@dataclass
class Device:
    """Runs trials on a curve.

    ``failure`` says what a trial that does not fit tells: "silent" nothing, "names_bytes" the allocation that failed,
    "measured" its whole peak (a budget that the allocator itself does not enforce).
    """

    curve: Curve
    budget_bytes: int
    failure: str = "silent"
    keeps_peaks: bool = True

    def __call__(self, request: TrialRequest) -> TrialResult:
        peak = self.curve(request.micro_batch)
        seconds = 0.001 + 0.0001 * request.micro_batch
        if peak <= self.budget_bytes:
            return TrialResult(
                request.micro_batch,
                Outcome.FITS,
                peak_bytes=peak if self.keeps_peaks else None,
                step_seconds=seconds,
                apply_seconds=0.001,
            )
        return TrialResult(
            request.micro_batch,
            Outcome.OUT_OF_MEMORY,
            peak_bytes=peak if self.failure == "measured" else None,
            requested_bytes=max(0, peak - self.curve(0)) // 3 if self.failure == "names_bytes" else None,
        )

    def largest(self, candidates: list[int] | tuple[int, ...] | range) -> int | None:
        """The largest candidate that fits, by bisection: curves here are monotone, or nearly so."""
        low, high = -1, len(candidates)
        while high - low > 1:
            middle = (low + high) // 2
            if self.curve(candidates[middle]) <= self.budget_bytes:
                low = middle
            else:
                high = middle
        return None if low < 0 else candidates[low]


def _pieces(fixed: float, slope: float, bends: list[tuple[float, float]]) -> Callable[[float], float]:
    def curve(b: float) -> float:
        total, at, s = fixed, 0.0, slope
        for knee, factor in bends:
            if b <= knee:
                break
            total += s * (knee - at)
            at, s = knee, slope * factor
        return total + s * (b - at)

    return curve


def _noise(seed: int, b: int) -> float:
    # Deterministic for a size, as a compiled program's peak is: the same trial gives the same peak.
    return random.Random(seed * 1_000_003 + b).uniform(-1.0, 1.0)


SHAPES = (
    "line",
    "line_with_extra",
    "update_first",
    "bends_up",
    "bends_down",
    "wavy",
    "rounded",
    "jump",
    "noisy",
    "saw",
)


def make_device(shape: str, rng: random.Random, *, largest: float, failure: str) -> tuple[Device, int]:
    """A device whose largest fit is about ``largest``, and the bytes held before any sample."""
    budget = int(10 ** rng.uniform(8, 10.5))
    share = rng.choice((0.02, 0.05, 0.1, 0.2, 0.4, 0.6)) * rng.uniform(0.5, 1.2)
    fixed = budget * share
    held = fixed * rng.choice((1.0, 0.95, 0.8, 0.5))
    slope = (budget - fixed) / largest
    seed = rng.randrange(1 << 30)
    base: Callable[[float], float] = _pieces(fixed, slope, [])
    if shape == "line":
        held = fixed
    elif shape == "update_first":
        update = fixed * rng.uniform(1.0, 1.0 + min(1.5, 0.9 * budget / fixed - 1))
        line = base

        def base(b: float) -> float:
            return max(update, line(b))
    elif shape in ("bends_up", "bends_down", "wavy"):
        bends = []
        knee = 0.0
        for _ in range(1 if shape != "wavy" else 4):
            knee += largest * rng.uniform(0.05, 0.9 if shape != "wavy" else 0.3)
            factor = rng.uniform(1.1, 2.0)
            if shape == "bends_down" or (shape == "wavy" and rng.random() < 0.5):
                factor = 1 / factor
            bends.append((knee, factor))
        base = _pieces(fixed, slope, bends)
        # Stretched back, so that the largest fit stays about where it was asked for.
        scale = (budget - fixed) / (base(largest) - fixed)
        bent = base

        def base(b: float) -> float:
            return fixed + (bent(b) - fixed) * scale
    elif shape == "jump":
        at, by = largest * rng.uniform(0.1, 1.1), budget * rng.uniform(0.01, 0.15)
        line2 = base

        def base(b: float) -> float:
            return line2(b) + (by if b >= at else 0.0)

    def curve(b: int) -> int:
        peak = base(b)
        if shape == "rounded":
            peak = math.ceil(peak / (budget / 500)) * (budget / 500)
        elif shape == "noisy" and b:
            peak *= 1 + 0.01 * _noise(seed, b)
        elif shape == "saw" and b:
            peak *= 1 + 0.01 * ((b % 8) / 8)
        return int(peak)

    return Device(curve, budget, failure), int(held)


class RecordingDevice:
    """An allocator of ``total_bytes`` in which a made-up network runs; its trials record what they allocate.

    ``error`` is how far from where it lay when they were recorded a held block lies while trials run, as a part of the
    arena: replays mislead by about as much.
    """

    def __init__(self, rng: random.Random, *, largest: float, error: float = 0.0, records: bool = True) -> None:
        layers = rng.randint(8, 30)
        activations = [rng.choice((64, 100, 256, 1000)) * 16 for _ in range(layers)]
        workspaces = [rng.choice((0, 0, 50_000, 200_000)) for _ in range(layers)]
        held = ((0, 256 * rng.randint(1, 400)), (1 << 20, 256 * rng.randint(1, 100)))
        self.total_bytes = int((1 << 21) + sum(workspaces) + largest * 1.3 * sum(activations))
        self.held_bytes = sum(taken for _, taken in held)
        self.per_sample_bytes = 1.3 * sum(activations)
        sizes: list[tuple[float, float]] = []
        order: list[int] = []
        known = len(held)
        for activation, workspace in zip(activations, workspaces, strict=True):
            sizes += [(0, activation), (workspace, 0)]
            order += [known + len(sizes) - 2, known + len(sizes) - 1, ~(known + len(sizes) - 1)]
        for index in reversed(range(layers)):
            sizes.append((0, activations[index]))
            order += [known + len(sizes) - 1, ~(known + 2 * index), ~(known + len(sizes) - 1)]
        self._held = held
        self._arguments = {"sizes": tuple(sizes), "order": tuple(order)}
        self._error = error
        self._records = records

    def _trace(self, micro_batch: int, error: float = 0.0) -> AllocationTrace:
        (first, taken), (second, also_taken) = self._held
        moved = second + int(error * self.total_bytes) // 256 * 256
        held = ((first, taken), (moved, also_taken))
        return AllocationTrace(micro_batch, regions=((0, self.total_bytes),), held=held, **self._arguments)

    def peak_bytes(self, micro_batch: int) -> int | None:
        return _replayed_peak_bytes(self._trace(micro_batch), micro_batch)

    def __call__(self, request: TrialRequest) -> TrialResult:
        peak = self.peak_bytes(request.micro_batch)
        if peak is None:
            return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY)
        recorded = self._trace(request.micro_batch, self._error)
        return TrialResult(
            request.micro_batch,
            Outcome.FITS,
            peak_bytes=peak,
            step_seconds=0.001,
            apply_seconds=0.001,
            held_bytes=self.held_bytes,
            allocations=recorded if self._records and request.record_allocations else None,
        )


class CompiledDevice:
    """An allocator in which a compiled program runs: one block of ``fixed_bytes`` and ``per_sample_bytes`` a sample.

    ``told_at`` samples and more tell its growth; fewer tell a little too much, as where fixed values hide others.
    """

    def __init__(self, rng: random.Random, *, largest: int) -> None:
        self.total_bytes = 1 << 28
        self.held = ((0, 256 * rng.randint(1000, 40_000)), (3 << 26, 256 * rng.randint(1, 1000)))
        room = self.held[1][0] - self.held[0][1]
        self.fixed_bytes = int(rng.uniform(0, 0.3) * room)
        self.per_sample_bytes = (room - self.fixed_bytes) // largest
        self.told_at = rng.randint(1, 40)
        self.held_bytes = sum(taken for _, taken in self.held)

    def __call__(self, request: TrialRequest) -> TrialResult:
        samples = request.micro_batch
        slope = self.per_sample_bytes * (1.0 if samples >= self.told_at else 1.03)
        fixed = self.fixed_bytes + self.per_sample_bytes * samples - slope * samples
        trace = AllocationTrace(
            samples,
            regions=((0, self.total_bytes),),
            held=self.held,
            sizes=((fixed, slope),),
            order=(2, ~2),
            is_compiled=True,
        )
        peak = _replayed_peak_bytes(trace, samples)
        if peak is None:
            return TrialResult(samples, Outcome.OUT_OF_MEMORY)
        recorded = trace if request.record_allocations else None
        return TrialResult(samples, Outcome.FITS, peak_bytes=peak, step_seconds=0.001, allocations=recorded)
