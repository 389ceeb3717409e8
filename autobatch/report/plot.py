"""The two plots of the HTML report, as inline SVG without a script.

Every point is a trial that ran. The SVG has classes in place of colours; ``html_style.py`` gives them a light and a
dark look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from autobatch.records import MemoryModel, Report, TrialResult
from autobatch.report import sentences
from autobatch.units import format_bytes

# Drawn small, so that the labels are still readable where the plot is scaled down to a telephone's width.
_WIDTH, _HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 22, 42
_LABEL_WIDTH = 80

# Beyond these multiples of what fits, a failure or the limit is put into words: to scale, it would squash the points.
_FARTHEST_FAILURE = 4
_FARTHEST_LIMIT = 3

_BYTE_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


@dataclass(frozen=True, slots=True)
class _Scale:
    """A map from values to coordinates: linear, or logarithmic with ``log2``."""

    low: float
    high: float
    start: float
    end: float
    log2: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log2(self.low), math.log2(self.high)) if self.log2 else (self.low, self.high)
        value = math.log2(value) if self.log2 else value
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def memory_plot(report: Report) -> str:
    """Plot peak memory against micro-batch: measured points, the line through them, the limit, failures and the plan.

    The result is an SVG element, "" where no peak was measured.
    """
    fits = [trial for trial in report.trials if trial.fits and trial.peak_bytes is not None]
    if not fits:
        return ""
    failures = shown_failures(report)
    limit = drawn_limit(report)
    line = report.memory_model
    if line is not None and not math.isfinite(line.fixed_bytes + line.per_sample_bytes):
        line = None
    x_high = 1.06 * max(trial.micro_batch for trial in (*fits, *failures))
    y_high = 1.15 * max(1.0, limit or 0, *(float(trial.peak_bytes or 0) for trial in fits))
    x = _Scale(0, x_high, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(0, y_high, _HEIGHT - _BOTTOM, _TOP)

    unit, factor = next((pair for pair in _BYTE_UNITS if y_high >= pair[1]), _BYTE_UNITS[-1])
    parts = _axes(
        x,
        y,
        [(tick, f"{tick:,.0f}") for tick in _ticks(x_high, whole=True)],
        [(tick * factor, f"{tick:,g}") for tick in _ticks(y_high / factor)],
        f"peak, {unit}",
    )
    if line is not None:
        parts.append(_memory_line(line, x, y))
    if limit is not None:
        parts.append(f'<path class="limit" d="M{x(0)} {y(limit)}H{x(x_high)}"/>')
        parts.append(_text(x(0) + 5, y(limit) - 5, f"limit {format_bytes(limit)}", "limit-label"))
    for trial in failures:
        needed = float(trial.peak_bytes or 0)
        if trial.peak_bytes is None:
            # The line gives what it would have needed; that cannot have been less than the limit.
            needed = max(limit or 0.0, float(line.peak_bytes(trial.micro_batch)) if line is not None else 0.0)
        # A failure above the plot is drawn at its upper edge.
        parts.append(_cross(x(trial.micro_batch), y(min(needed, 0.97 * y_high)), trial))
    parts += [_point(x(t.micro_batch), y(t.peak_bytes or 0), t, format_bytes(t.peak_bytes or 0)) for t in fits]
    chosen = sentences.decisive_trial(report)
    if chosen is not None and chosen.peak_bytes is not None:
        parts.append(_ring(x(chosen.micro_batch), y(chosen.peak_bytes), report, below=True))
    return _svg(parts, f"Peak memory against micro-batch: {sentences.distance(report)}.")


def speed_plot(report: Report) -> str:
    """Plot samples per second against micro-batch, on a scale of powers of two; "" where no trial was timed."""
    timed = {trial.micro_batch: trial for trial in report.trials if trial.fits and trial.samples_per_second}
    if not timed:
        return ""
    trials = [timed[micro_batch] for micro_batch in sorted(timed)]
    smallest, largest = trials[0].micro_batch, trials[-1].micro_batch
    y_high = 1.15 * max(trial.samples_per_second or 0.0 for trial in trials)
    x = _Scale(smallest / 1.25, largest * 1.25, _LEFT, _WIDTH - _RIGHT, log2=True)
    y = _Scale(0, y_high, _HEIGHT - _BOTTOM, _TOP)
    points = [(x(trial.micro_batch), y(trial.samples_per_second or 0.0), trial) for trial in trials]

    parts = _axes(
        x,
        y,
        [(tick, f"{tick:,}") for tick in _power_ticks(smallest, largest)],
        [(tick, f"{tick:,g}") for tick in _ticks(y_high)],
        "samples/s",
    )
    if len(points) > 1:
        parts.append(f'<path class="speed" d="M{"L".join(f"{px} {py}" for px, py, _ in points)}"/>')
    for px, py, trial in points:
        parts.append(_point(px, py, trial, f"{sentences.format_speed(trial.samples_per_second or 0.0)} samples/s"))
    chosen = sentences.decisive_trial(report)
    if chosen is not None and chosen.micro_batch in timed:
        parts.append(_ring(x(chosen.micro_batch), y(chosen.samples_per_second or 0.0), report, below=False))
    return _svg(parts, "Samples per second against micro-batch.")


def shown_failures(report: Report) -> list[TrialResult]:
    """Return the failed trials that :func:`memory_plot` draws: those not far above the largest size that fits."""
    fitting = [trial.micro_batch for trial in report.trials if trial.fits]
    farthest = _FARTHEST_FAILURE * max(fitting, default=0)
    return [trial for trial in report.trials if not trial.fits and trial.micro_batch <= farthest]


def drawn_limit(report: Report) -> int | None:
    """Return the limit that :func:`memory_plot` draws; None if it is far above the highest peak, or unknown."""
    limit = report.environment.limit_bytes
    highest = max((trial.peak_bytes or 0 for trial in report.trials if trial.fits), default=0)
    return limit if limit is not None and limit <= _FARTHEST_LIMIT * highest else None


def _ticks(high: float, *, whole: bool = False) -> list[float]:
    """Return four to seven round values from 0 to ``high``; with ``whole``, fewer where ``high`` is small."""
    step = 10.0 ** math.floor(math.log10(high / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if high / (step * factor) <= 6)
    if whole:
        step = max(1.0, math.ceil(step))
    return [i * step for i in range(int(high / step) + 1)]


def _power_ticks(smallest: int, largest: int) -> list[int]:
    low, high = math.ceil(math.log2(smallest)), math.floor(math.log2(largest))
    exponents = list(range(low, high + 1))
    exponents = exponents[:: max(1, math.ceil(len(exponents) / 8))]
    # Two neighbours such as 65 and 100 have no power of two between them.
    return [2**exponent for exponent in exponents] if len(exponents) > 1 else sorted({smallest, largest})


def _axes(
    x: _Scale, y: _Scale, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], y_title: str
) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for value, label in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 7, y(value) + 4, label, "tick", "end"))
    for value, label in x_ticks:
        parts.append(f'<path class="mark" d="M{x(value)} {bottom}v5"/>')
        parts.append(_text(x(value), bottom + 18, label, "tick", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{_WIDTH - _RIGHT}"/>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "micro-batch", "axis-title", "middle"))
    parts.append(_text(4, 12, y_title, "axis-title"))
    return parts


def _memory_line(line: MemoryModel, x: _Scale, y: _Scale) -> str:
    """Draw the memory line from no sample to where it leaves the plot."""
    left, right = 0.0, x.high
    if line.per_sample_bytes > 0:
        left = max(left, -line.fixed_bytes / line.per_sample_bytes)
        right = min(right, (y.high - line.fixed_bytes) / line.per_sample_bytes)
    if right <= left:
        return ""
    start, end = (line.fixed_bytes + line.per_sample_bytes * at for at in (left, right))
    return f'<path class="line" d="M{x(left)} {y(start)}L{x(right)} {y(end)}"/>'


def _point(px: float, py: float, trial: TrialResult, value: str) -> str:
    label = escape(f"{sentences.samples(trial.micro_batch)}: {value}")
    return f'<circle class="point" cx="{px}" cy="{py}" r="4"><title>{label}</title></circle>'


def _cross(px: float, py: float, trial: TrialResult) -> str:
    label = escape(f"{sentences.samples(trial.micro_batch)}: {sentences.OUTCOME_LABELS[trial.outcome]}")
    path = f"M{px - 4:.1f} {py - 4:.1f}l8 8m0-8l-8 8"
    return f'<path class="failure {trial.outcome.value}" d="{path}"><title>{label}</title></path>'


def _ring(px: float, py: float, report: Report, *, below: bool) -> str:
    """Draw the ring around the decisive trial, with a label on the side where there is room."""
    chosen = sentences.decisive_trial(report)
    assert chosen is not None
    label = f"{sentences.decisive_label(report)} {chosen.micro_batch:,}"
    # Peaks rise to the right, so below them the right is free; above the samples per second it is the left.
    right = px < _WIDTH - _RIGHT - _LABEL_WIDTH if below else px < _LEFT + _LABEL_WIDTH
    anchor = "start" if right else "end"
    label_x = px - 2 if anchor == "end" else px + 2
    label_y = min(py + 24, _HEIGHT - _BOTTOM - 6) if below else py - 12
    return f'<circle class="ring" cx="{px}" cy="{py}" r="8"/>' + _text(label_x, label_y, label, "ring-label", anchor)


def _text(px: float, py: float, text: str, css_class: str, anchor: str = "start") -> str:
    return f'<text class="{css_class}" x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: list[str], description: str) -> str:
    body = "\n".join(part for part in parts if part)
    label = escape(description, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">\n{body}\n</svg>'
