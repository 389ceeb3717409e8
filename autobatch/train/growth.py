"""When does memory grow steadily, and what does that mean? Pure: no TensorFlow, no I/O, no clock.

The statistic must not be fooled by what memory in use does in a healthy training: white noise, the random walk of a
host allocator, one jump (a first validation), a rise that levels off. It looks at the *increments* between levels
``y_0 .. y_m``. Where nothing but chance moves the level, their mean is zero, so a one-sided Student t test of
``mean / (deviation / sqrt(m))`` is exact for a Gaussian random walk; for white noise around one level it is
conservative, because increments then undo each other.

The test is made again after every epoch, so the level of the j-th test of a view is its share of FALSE_ALARM_RATE over
``j (j + 1)``: these sum to that share, however long the training is. The views are: the whole series, cut into up to 16
equal intervals, in which a slow growth stands out of noise as they become longer (half of the rate); its last 8
intervals of 1, 2, 4, ... steps, for a growth that starts late (an eighth, a sixteenth, ... of the rate); and its last 4
steps, for an even growth after an odd beginning (a quarter).
"""

from __future__ import annotations

import enum
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autobatch.units import format_bytes

FALSE_ALARM_RATE = 0.01
"""The share of endless series of noise, of any level, in which a growth is seen: at the most, by the bound above."""

MINIMUM_BYTES = 16 * 2**20
"""Growth since the warm-up that is worth a word. A host's allocator drifts by a few MiB in a healthy training."""

MINIMUM_STEPS = 3
"""Epochs after the warm-up that must have grown."""

LATE_STEPS = 2
"""Epochs between a mark that is set late and the comparison with it: what is built once is then no growth."""

_MARK_BYTES = MINIMUM_BYTES // 4  # before a growth can prove to be steady, so that the two can be compared
_MOST_INTERVALS = 16
_FEWEST_INTERVALS = 8
_CLEAN_INTERVALS = 4
_EXPLAINS = 0.5  # what was counted accounts for the growth if it is at least this share of it


class Cause(enum.Enum):
    """Why memory grows from epoch to epoch."""

    RETRACING = "retracing"
    TENSORS = "tensors kept"
    MODELS = "models built again"
    DATA = "data held in host memory"
    GARBAGE = "reference cycles"
    UNKNOWN = "unknown"


REMEDIES = {
    Cause.RETRACING: "Pass tensors of one shape and dtype instead of new Python numbers or shapes, make each "
    "tf.function once, outside the loop, or give it an input_signature or reduce_retracing=True.",
    Cause.TENSORS: "Keep numbers, float(tensor), or a running keras.metrics.Mean instead of tensors, and empty what is "
    "kept at the end of each epoch.",
    Cause.MODELS: "Build the model once, outside the loop; or, before each new one, del the old one and call "
    "keras.backend.clear_session().",
    Cause.DATA: "Keep results as numbers or write them to disk; give cache() a file name, and shuffle() a smaller "
    "buffer. Growth by cache() ends once all data have been read.",
    Cause.GARBAGE: "Call gc.collect() at the end of each epoch, or break the cycle: an object that holds tensors "
    "refers to itself, so that Python frees it late.",
    Cause.UNKNOWN: "Train without your own callbacks, then without your own input pipeline, to see which one it is; "
    "training from a checkpoint in a new process starts from little again.",
}


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory at the end of one epoch.

    ``fit`` counts the trainings that the same watch has seen, ``epoch`` is Keras's, both from 0. ``device_bytes`` is
    what TensorFlow's allocator holds on a GPU or in a limited CPU arena, ``device_peak_bytes`` the most that it held;
    ``host_bytes`` what of the process is in the host's memory. ``traces`` is by how many the TensorFlow functions that
    this training has made and that are in memory grew over the epoch, 0 where they became fewer. Each is None where it
    is not known.
    """

    fit: int
    epoch: int
    device_bytes: int | None = None
    device_peak_bytes: int | None = None
    host_bytes: int | None = None
    traces: int | None = None


@dataclass(frozen=True, slots=True)
class Census:
    """What was alive in the process at one moment; bytes are of what could be sized.

    ``functions`` counts TensorFlow functions, one a trace, None where they cannot be counted; ``tensors`` the eager
    tensors with values, ``arrays`` the NumPy arrays in lists, ``memory_caches`` the ``tf.data`` caches without a file.
    """

    functions: int | None
    tensors: int
    host_tensor_bytes: int
    device_tensor_bytes: int
    layers: int
    arrays: int
    array_bytes: int
    memory_caches: int

    def tensor_bytes(self, where: str) -> int:
        """Bytes of the eager tensors on the "device" or the "host"."""
        return self.device_tensor_bytes if where == "device" else self.host_tensor_bytes


@dataclass(frozen=True, slots=True)
class MemoryFinding:
    """A steady growth, its likely cause and the remedy.

    ``where`` is "device" or "host". ``per`` is "epoch", or "fit" for a growth from one training to the next one that
    the same watch saw; ``bytes_per_epoch`` and ``epochs_left`` count in it. ``epochs_left`` is how many more fit into
    ``available_bytes``, None where these are not known; ``left_bytes`` what would be left of them after the last
    epoch, below zero if they do not suffice, None where the last epoch is not known.
    """

    where: str
    per: str
    bytes_per_epoch: int
    cause: Cause
    detail: str
    remedy: str
    available_bytes: int | None
    epochs_left: int | None
    left_bytes: int | None
    message: str


def steady_growth(
    levels: Sequence[float], *, minimum_bytes: float = MINIMUM_BYTES, minimum_steps: int = MINIMUM_STEPS
) -> float | None:
    """Return by how many bytes a step the levels grow steadily, None if they do not or if it cannot be told yet.

    ``levels`` are bytes in use after each step, the warm-up left out; the first is where growth is counted from. The
    slope returned is Theil and Sen's, the median of all slopes between two levels, so that one odd epoch counts
    little.
    """
    steps = len(levels) - 1
    if steps < max(minimum_steps, MINIMUM_STEPS):
        return None
    for stride, first, false_alarm_rate in _views(steps):
        slope = _slope(levels[first::stride], false_alarm_rate, minimum_bytes)
        if slope is not None:
            return slope / stride
    return None


class Evidence:
    """The levels of one kind of memory since the warm-up or the last finding, and what was alive when they first rose.

    After each finding twice as many grown steps are asked for, so that looking for causes stays rare.

    Args:
        marks_late: Set the mark only when the growth is steady, and compare a few steps later.
    """

    def __init__(self, *, marks_late: bool = False) -> None:
        self.levels: list[int] = []
        self.mark: Any = None
        self._marks_late = marks_late
        self._marked_at = 0
        self._slope_at_mark: float | None = None
        self._minimum_steps = MINIMUM_STEPS

    @property
    def since_mark(self) -> tuple[int, int]:
        """How many steps ago the mark was set, and by how many bytes the level has grown since."""
        return len(self.levels) - 1 - self._marked_at, self.levels[-1] - self.levels[self._marked_at]

    def add(self, level: int, look: Callable[[], Any]) -> float | None:
        """Add a level; return the slope once it is steady and has gone on since the mark, else None.

        The mark is what ``look`` returns, called once when the level has first risen: looking costs time.
        """
        self.levels.append(level)
        if self.mark is None and not self._marks_late:
            if level - self.levels[0] >= _MARK_BYTES:
                self._set_mark(look, None)
            return None
        slope = steady_growth(self.levels, minimum_steps=self._minimum_steps)
        if self.mark is None:
            if slope is not None:
                self._set_mark(look, slope)
            return None
        if self._marks_late and self.since_mark[0] < LATE_STEPS:
            return None
        return slope if self._has_gone_on(slope) else None

    def _set_mark(self, look: Callable[[], Any], slope: float | None) -> None:
        self.mark, self._marked_at, self._slope_at_mark = look(), len(self.levels) - 1, slope

    def _has_gone_on(self, slope: float | None) -> bool:
        if slope is None:
            return False
        steps, grown = self.since_mark
        # Half of what is usual: the mark may have been set at a high level.
        return grown >= slope * steps / 2

    @property
    def unreported(self) -> float | None:
        """The slope that was steady when the mark was set late, where it has gone on and nothing was returned yet."""
        return self._slope_at_mark if self._has_gone_on(self._slope_at_mark) else None

    def restart(self, level: int | None) -> None:
        """Begin again from this level, after a finding."""
        self.levels, self.mark = self.levels[-1:] if level is None else [level], None
        self._slope_at_mark = None
        self._minimum_steps *= 2


def explain(mark: Census, now: Census, collected: Census, grown_bytes: int, *, where: str, steps: int) -> Cause:
    """Return the likely cause of a growth by ``grown_bytes`` over ``steps`` epochs, from what was alive around it.

    ``mark`` is from its beginning, ``now`` from its end, ``collected`` from after a garbage collection then. Garbage
    counts as growth only where there is more of it than at the mark. What is counted in bytes comes first, then what
    brings the next one with it: a model built again is traced again.
    """
    enough = _EXPLAINS * grown_bytes
    for cause, sizes in (
        (Cause.TENSORS, [each.tensor_bytes(where) for each in (mark, now, collected)]),
        (Cause.DATA, [each.array_bytes if where == "host" else 0 for each in (mark, now, collected)]),
    ):
        at_mark, at_end, left = sizes
        if left - at_mark >= enough > 0:
            return cause
        if at_end - at_mark >= enough > 0:
            return Cause.GARBAGE
    if now.layers - mark.layers >= steps:
        return Cause.MODELS
    if (now.functions or 0) - (mark.functions or 0) >= steps:
        return Cause.RETRACING
    if where == "host" and collected.memory_caches > 0:
        return Cause.DATA
    return Cause.UNKNOWN


def describe(
    *,
    where: str,
    per: str,
    step: int,
    last_step: int | None,
    bytes_per_step: float,
    available_bytes: int | None,
    limit_bytes: int | None,
    cause: Cause,
    detail: str,
) -> MemoryFinding:
    """Make the finding and its text. ``step`` and ``last_step`` count from 1, as Keras prints epochs."""
    name = "Device" if where == "device" else "Host"
    article = "an" if per == "epoch" else "a"
    parts = [f"{name} memory grows by {format_bytes(bytes_per_step)} {article} {per}"]
    steps_left = left = None
    if available_bytes is not None:
        steps_left = int(max(available_bytes, 0) // bytes_per_step)
        if last_step is not None:
            left = available_bytes - int(bytes_per_step * max(last_step - step, 0))
            if left >= 0:
                total = "" if limit_bytes is None else f" of {format_bytes(limit_bytes)}"
                parts.append(f"at this rate {format_bytes(left)}{total} are left after {per} {last_step}")
        parts.append(f"out of memory at about {per} {step + steps_left + 1}")
    text = "; ".join(parts)
    likely = "The cause was not found" if cause is Cause.UNKNOWN else f"Likely cause: {cause.value}"
    because = f"{likely} ({detail})." if detail else f"{likely}."
    return MemoryFinding(
        where=where,
        per=per,
        bytes_per_epoch=round(bytes_per_step),
        cause=cause,
        detail=detail,
        remedy=REMEDIES[cause],
        available_bytes=available_bytes,
        epochs_left=steps_left,
        left_bytes=left,
        message=f"{text}. {because} {REMEDIES[cause]}",
    )


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


def _slope(levels: Sequence[float], false_alarm_rate: float, minimum_bytes: float) -> float | None:
    """The slope a step if the mean increment is above zero at this rate, is still there, and came to something."""
    increments = [after - before for before, after in itertools.pairwise(levels)]
    count = len(increments)
    mean = statistics.fmean(increments)
    if mean * count < minimum_bytes:
        return None
    # What levels off has stopped by its last third.
    if statistics.fmean(increments[-(count // 3 or 1) :]) < mean / 2:
        return None
    deviation = statistics.stdev(increments, mean)
    if deviation > 0 and _student_tail(mean / deviation * math.sqrt(count), count - 1) > false_alarm_rate:
        return None
    slopes = [(levels[j] - levels[i]) / (j - i) for i in range(count) for j in range(i + 1, count + 1)]
    slope = statistics.median(slopes)
    return slope if slope > 0 else None


def _student_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's distribution with a whole number of degrees, t >= 0: Abramowitz and Stegun 26.7.3-4."""
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
