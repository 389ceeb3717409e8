"""Statistical test for steady growth of memory. Pure: no TensorFlow, no I/O, no clock.

Memory in use also moves in a healthy training: white noise, the random walk of a host allocator, one jump (a first
validation), a rise that levels off. The statistic must not take that for growth. It looks at the *increments* between
levels ``y_0 .. y_m``. If nothing but chance moves the level, their mean is zero. So a one-sided Student t test of
``mean / (deviation / sqrt(m))`` is exact for a Gaussian random walk. For white noise around one level it is
conservative, because increments then undo each other.

The test is made again after every epoch. So the significance level of the j-th test of a view is the view's share of
FALSE_ALARM_RATE, divided by ``j (j + 1)``. These levels sum to that share, however long the training is. The views are:

* The whole series, cut into up to 16 equal intervals (half of the rate). As the intervals become longer, a slow growth
  stands out of the noise.
* Its last 8 intervals of 1, 2, 4, ... steps (an eighth, a sixteenth, ... of the rate), for a growth that starts late.
* Its last 4 steps (a quarter), for an even growth after an odd beginning.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

FALSE_ALARM_RATE = 0.01
"""Largest share of endless series of noise, of any level, in which a growth is reported; see the bound above."""

MINIMUM_BYTES = 16 * 2**20
"""Least growth since the warm-up to report. A host's allocator drifts by a few MiB in a healthy training."""

MINIMUM_STEPS = 3
"""Least number of epochs after the warm-up in which growth can be reported."""
_MOST_INTERVALS = 16
_FEWEST_INTERVALS = 8
_CLEAN_INTERVALS = 4


def steady_growth(
    levels: Sequence[float], *, minimum_bytes: float = MINIMUM_BYTES, minimum_steps: int = MINIMUM_STEPS
) -> float | None:
    """Return the bytes a step by which the levels grow steadily; None if they do not, or if it is too early to say.

    The slope returned is Theil and Sen's, the median of all slopes between two levels. So one odd epoch counts little.

    Args:
        levels: bytes in use after each step, without the warm-up; growth is counted from the first.
        minimum_bytes: least growth to report.
        minimum_steps: least number of steps; fewer than :data:`MINIMUM_STEPS` count as that.
    """
    steps = len(levels) - 1
    if steps < max(minimum_steps, MINIMUM_STEPS):
        return None
    for stride, first, false_alarm_rate in _views(steps):
        slope = _slope(levels[first::stride], false_alarm_rate, minimum_bytes)
        if slope is not None:
            return slope / stride
    return None


def _slope(levels: Sequence[float], false_alarm_rate: float, minimum_bytes: float) -> float | None:
    """Return the slope a step if the growth is significant at this rate, goes on, and is large enough; else None."""
    increments = [after - before for before, after in itertools.pairwise(levels)]
    count = len(increments)
    mean = statistics.fmean(increments)
    if mean * count < minimum_bytes:
        return None
    # A rise that levels off has stopped in its last third.
    if statistics.fmean(increments[-(count // 3 or 1) :]) < mean / 2:
        return None
    deviation = statistics.stdev(increments, mean)
    if deviation > 0 and _student_tail(mean / deviation * math.sqrt(count), count - 1) > false_alarm_rate:
        return None
    slopes = [(levels[j] - levels[i]) / (j - i) for i in range(count) for j in range(i + 1, count + 1)]
    slope = statistics.median(slopes)
    return slope if slope > 0 else None


def _student_tail(t: float, degrees: int) -> float:
    """Return P(T > t) of Student's distribution for whole degrees and t >= 0: Abramowitz and Stegun 26.7.3-4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max((1 - inside) / 2, 0.0)


def _views(steps: int) -> Iterator[tuple[int, int, float]]:
    """Yield the stride, the first level and the false-alarm rate of each test that is due after ``steps`` steps.

    A view with intervals of several steps is due only when a whole interval has been added to it.
    """
    octave = max(math.ceil(math.log2(steps / _MOST_INTERVALS)), 0)
    stride = 2**octave
    if steps % stride == 0:
        if octave == 0:
            test = steps - MINIMUM_STEPS + 1
        else:
            before = _MOST_INTERVALS - MINIMUM_STEPS + 1 + (octave - 1) * _FEWEST_INTERVALS
            test = before + steps // stride - _FEWEST_INTERVALS
        yield stride, 0, FALSE_ALARM_RATE / 2 / (test * (test + 1))
    if steps > _CLEAN_INTERVALS:
        test = steps - _CLEAN_INTERVALS
        yield 1, steps - _CLEAN_INTERVALS, FALSE_ALARM_RATE / 4 / (test * (test + 1))
    stride = 1
    while steps > stride * _FEWEST_INTERVALS:
        if steps % stride == 0:
            test = steps // stride - _FEWEST_INTERVALS + 1
            yield stride, steps - stride * _FEWEST_INTERVALS, FALSE_ALARM_RATE / 8 / stride / (test * (test + 1))
        stride *= 2
