"""Model of memory from the trials: ``peak_bytes(b) = fixed + per_sample * b``, near the size that matters.

``peak_bytes`` is the peak of the forward and backward passes alone, where a trial measured it apart from the peak of
the optimizer's update. The update's peak is the same for every size, so with it small sizes would look flat.

Real curves bend. Small probes may be ruled by workspaces (a flat start), and slopes differ by a factor of two between
neighbouring probes. So there is no least-squares line over all trials. The line passes through the largest size that
fits, and its slope is as local as the measurements allow:

1. Through the largest fit and the failure above it, where that failure's peak was measured: interpolation.
2. Else through the largest fit and the next smaller measurement that is far enough away for a slope.
3. Else ("chord") through the largest fit and ``fixed_bytes_hint`` at zero samples. The hint is a lower bound on every
   peak. So this slope is never too small for a straight line, for one with a flat start, or for one that bends
   downwards: the prediction errs on the side that fits.

Peaks near the budget may be elastic: TensorFlow's allocator hands out whole pieces of up to twice what was asked for.
There the peak stands still or falls while the size grows, seen up to sizes of a third more. Such peaks are only an
upper bound of what is needed, and the line goes on from the peaks below.

This module knows bytes and sizes; it proposes nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.records import MemoryModel, Outcome, TrialResult

_FAR_ENOUGH = 0.9
"""Largest fraction of the anchor's size at which a measurement gives a slope with it. Over a shorter distance the
allocator's rounding is a large part of the difference; it is used only where there is no other measurement."""

_NOISE = 0.02
"""Fraction of the peak below which a rise says nothing about the slope."""

_STRAIGHT = 0.02
"""Part of the slope by which that between the two smaller of three measurements may differ for them to be a line."""

_ELASTIC_FROM = 0.85
"""Part of the budget from which on a peak may be elastic."""

_ELASTIC_GROWTH = 1.02
"""Least factor by which the largest measured size exceeds that of a peak which is judged elastic."""

_ELASTIC_RISE = 0.5
"""Part of the rise predicted by the line through the peaks below; a peak is elastic if less than that follows it."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measured peak. ``micro_batch`` 0 stands for what is held before any sample."""

    micro_batch: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Fit:
    """A line, and the two points that it goes through.

    ``anchor`` is the largest fit; ``chord_bytes`` is the slope of the chord to it, per sample. ``bends_between`` is
    True if the curve was flat up to ``other`` and rises after it. The bend then lies between the two points, and the
    line is not steep enough. ``is_straight`` is True if the next smaller measurement lies on the line too.
    """

    model: MemoryModel
    anchor: Point
    other: Point
    chord_bytes: float
    bends_between: bool = False
    is_straight: bool = False

    @property
    def is_chord(self) -> bool:
        """True if the slope comes from one measurement and the hint alone."""
        return self.other.micro_batch == 0

    @property
    def is_interpolation(self) -> bool:
        """True if the budget lies between the two points: the second one failed, with a measured peak."""
        return self.other.micro_batch > self.anchor.micro_batch


def measured_points(trials: Sequence[TrialResult], budget_bytes: int | None) -> tuple[Point, ...]:
    """Return the peaks of trials that ran to their end, ascending by size.

    A trial that ended out of memory counts only if its peak is above the budget: then it did run to its end, and was
    refused for its peak. A peak below the budget is only what had been held when an allocation failed.
    """
    points = []
    for trial in trials:
        peak = trial.peak_bytes
        if peak is None:
            continue
        if trial.fits:
            points.append(Point(trial.micro_batch, sample_peak(trial, peak)))
        elif trial.outcome is Outcome.OUT_OF_MEMORY and budget_bytes is not None and peak > budget_bytes:
            points.append(Point(trial.micro_batch, peak))
    return tuple(sorted(points, key=lambda point: point.micro_batch))


def sample_peak(trial: TrialResult, peak_bytes: int) -> int:
    """Return the peak before the update, which grows with the samples; ``peak_bytes`` if it was not measured apart."""
    return peak_bytes if trial.sample_peak_bytes is None else trial.sample_peak_bytes


def least_peak_bytes(trial: TrialResult, budget_bytes: int, fixed_bytes_hint: int) -> int | None:
    """Return the least bytes that a trial which ran out of memory needs; None for any other outcome.

    It needs more than the budget, and the allocation that failed would have stood beside what is always held.
    """
    if trial.outcome is not Outcome.OUT_OF_MEMORY:
        return None
    return max(budget_bytes + 1, trial.peak_bytes or 0, fixed_bytes_hint + (trial.requested_bytes or 0))


def fit_memory_model(
    trials: Sequence[TrialResult], *, budget_bytes: int | None = None, fixed_bytes_hint: int | None = None
) -> Fit | None:
    """Return the line near the budget (see the top of this file); None where no trial that fits has a peak."""
    points = measured_points(trials, budget_bytes)
    fitting = {trial.micro_batch for trial in trials if trial.fits}
    anchors = [point for point in points if point.micro_batch in fitting]
    if not anchors:
        return None
    anchor = anchors[-1]
    hint = max(fixed_bytes_hint or 0, *(trial.held_bytes or 0 for trial in trials if trial.fits))
    if budget_bytes is not None and points[-1] == anchor:
        points = _without_elastic(points, budget_bytes)
        anchor = points[-1]
    # A hint that is not below a measured peak is wrong, for whatever reason: nothing is then known about zero samples.
    origin = Point(0, hint if hint < anchor.peak_bytes else 0)
    other = origin
    below = [point for point in points if point.micro_batch < anchor.micro_batch]
    above = [point for point in points if point.micro_batch > anchor.micro_batch]
    if above:
        other = above[0]
    elif below:
        near = bisect_right([point.micro_batch for point in below], anchor.micro_batch * _FAR_ENOUGH)
        other = below[max(0, near - 1)]
        if anchor.peak_bytes - other.peak_bytes < anchor.peak_bytes * _NOISE:
            other = below[0]
    # A peak that falls as the size grows comes from workspaces, not from samples: no line is believed to fall.
    per_sample = max(0.0, _slope(other, anchor))
    model = MemoryModel(anchor.peak_bytes - per_sample * anchor.micro_batch, per_sample)
    rises = anchor.peak_bytes - other.peak_bytes >= anchor.peak_bytes * _NOISE
    was_flat = any(
        point.micro_batch < other.micro_batch and other.peak_bytes - point.peak_bytes < other.peak_bytes * _NOISE
        for point in below
    )
    smaller = [point for point in below if point.micro_batch <= _FAR_ENOUGH * other.micro_batch]
    is_straight = rises and bool(smaller) and abs(_slope(smaller[-1], other) - per_sample) <= _STRAIGHT * per_sample
    return Fit(model, anchor, other, _slope(origin, anchor), bends_between=rises and was_flat, is_straight=is_straight)


def _without_elastic(points: tuple[Point, ...], budget_bytes: int) -> tuple[Point, ...]:
    """Return the points without the elastic ones; the last one's peak is what the line through the others predicts."""
    last = points[-1]
    for index in range(2, len(points) - 1):
        point, rigid = points[index], points[:index]
        if point.peak_bytes < _ELASTIC_FROM * budget_bytes or last.micro_batch < _ELASTIC_GROWTH * point.micro_batch:
            continue
        slope = _slope(rigid[-2], rigid[-1])
        if last.peak_bytes - point.peak_bytes < _ELASTIC_RISE * slope * (last.micro_batch - point.micro_batch):
            needed = rigid[-1].peak_bytes + slope * (last.micro_batch - rigid[-1].micro_batch)
            return (*rigid, Point(last.micro_batch, min(last.peak_bytes, int(needed))))
    return points


def largest_within(model: MemoryModel, budget_bytes: int, *, at_most: int) -> int:
    """Return the largest size up to ``at_most`` whose predicted peak is within the budget; 0 if there is none.

    The sizes are bisected through ``model.peak_bytes`` itself, which never falls as the size grows. So the inverse
    agrees with the prediction to the last byte; a division would be off by one now and then.
    """
    fits, fails = 0, at_most + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if model.peak_bytes(middle) <= budget_bytes:
            fits = middle
        else:
            fails = middle
    return fits


def _slope(one: Point, other: Point) -> float:
    return (other.peak_bytes - one.peak_bytes) / (other.micro_batch - one.micro_batch)
