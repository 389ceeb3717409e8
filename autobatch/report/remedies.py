"""The remedies of a report in words and cells, each against the model as it is; text and HTML share them.

Nothing is escaped for HTML here: the renderer does that.
"""

from __future__ import annotations

from typing import NamedTuple

from autobatch.records import Remedy, Report
from autobatch.report.sentences import TIMES, format_speed, printable, samples
from autobatch.units import format_bytes, format_seconds

AS_IT_IS = "as it is"

IN_VAIN = (
    (
        "Pruning, quantization, distillation",
        "shrink the model that is deployed. The training step keeps its activations, gradients and optimizer slots.",
    ),
    (
        "del and gc.collect() in the step",
        "free nothing: the step is compiled, and TensorFlow decides in it what lives how long.",
    ),
    (
        "Eager mode (run_eagerly=True)",
        "is no cure: each operation is run by itself, which costs speed, and what the backward pass needs is held all "
        "the same.",
    ),
)
"""Measures that are often tried against running out of memory while training, each with the reason why it fails."""


class Figure(NamedTuple):
    """A figure, and its ratio to that of the model as it is; ``better`` is None for about the same, or unknown."""

    text: str
    ratio: str = ""
    better: bool | None = None


class Row(NamedTuple):
    """A line of the table of remedies; ``why_not`` takes the place of the figures where nothing was measured."""

    name: str
    largest: Figure
    speed: Figure
    update: Figure
    why_not: str = ""
    recommended: bool = False


def has_target(report: Report) -> bool:
    """Return True if there is an update at a target to compare."""
    return report.plan is not None or any(remedy.plan is not None for remedy in report.remedies)


def rows(report: Report) -> list[Row]:
    """Return the rows of the table: the model as it is, then each remedy."""
    base = report.decisive_trial
    speed = None if base is None else base.samples_per_second
    found = [
        Row(AS_IT_IS, Figure(_count(report.largest_fit)), Figure(_speed(speed)), Figure(_time(report.update_seconds)))
    ]
    for remedy in report.remedies:
        found.append(
            Row(
                printable(remedy.name),
                _against(_count(remedy.largest_fit), remedy.largest_fit, report.largest_fit, more_is_better=True),
                _against(_speed(remedy.samples_per_second), remedy.samples_per_second, speed, more_is_better=True),
                _against(
                    _time(remedy.update_seconds), remedy.update_seconds, report.update_seconds, more_is_better=False
                ),
                printable(remedy.why_not),
                remedy.recommended,
            )
        )
    return found


def summary(report: Report) -> str:
    """Say in a sentence or two which remedy to take, and what it gains."""
    best = next((remedy for remedy in report.remedies if remedy.recommended), None)
    if best is None:
        measured = any(remedy.measured for remedy in report.remedies)
        return "None of them gains anything here." if measured else "None of them could be measured."
    words = [f"Recommended: {printable(best.name)}{', both together' if best.name.count(' + ') == 1 else ''}."]
    if best.largest_fit is not None:
        before = "none" if report.largest_fit is None else f"{report.largest_fit:,}"
        words.append(f"Largest micro-batch {best.largest_fit:,} (was {before})")
        if best.update_seconds is not None and report.update_seconds is not None:
            was = format_seconds(report.update_seconds)
            words[-1] += f", an update in {format_seconds(best.update_seconds)} (was {was})"
        elif best.samples_per_second is not None:
            speed = None if report.decisive_trial is None else report.decisive_trial.samples_per_second
            words[-1] += f", {_speed(best.samples_per_second)} samples/s (was {_speed(speed)})"
        words[-1] += "."
    return " ".join(words)


def notes(report: Report, remedy: Remedy) -> list[str]:
    """Return notes beside the table: a remedy's peak, how training will differ, and why its search ended early."""
    found = []
    base = report.decisive_trial
    size = remedy.plan.micro_batch if remedy.plan is not None else remedy.largest_fit
    same = base is not None and base.micro_batch == size
    if same and base is not None and base.peak_bytes and remedy.peak_bytes is not None:
        found.append(
            f"{samples(size or 0)} peak at {format_bytes(remedy.peak_bytes)}, not {format_bytes(base.peak_bytes)}"
        )
    if remedy.measured and remedy.largest_fit is None:
        # The report of the model as it is says what to do about it.
        return [f"nothing fits: {printable(remedy.stopped_because).partition('. ')[0].rstrip('.')}"]
    if remedy.stopped_because.startswith("limit of"):
        found.append(f"its search was cut short: {printable(remedy.stopped_because)}")
    if remedy.changes_training and remedy.measured:
        found.append(f"trains with {printable(remedy.changes_training)}")
    return [*found, *(printable(note) for note in remedy.notes)]


def unmeasured(report: Report) -> list[tuple[str, str]]:
    """Return names and reason of the remedies that were not measured; those that share a reason make one entry."""
    reasons: dict[str, list[str]] = {}
    for remedy in report.remedies:
        if not remedy.measured:
            reasons.setdefault(printable(remedy.why_not), []).append(printable(remedy.name))
    return [(", ".join(names), reason) for reason, names in reasons.items()]


def code_lines(remedy: Remedy) -> list[str]:
    """Return the lines of code that apply ``remedy``, indentation kept."""
    return ["".join(c if c.isprintable() else "?" for c in line) for line in remedy.code.splitlines()]


def _count(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"


def _speed(value: float | None) -> str:
    return "-" if value is None else format_speed(value)


def _time(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _against(text: str, value: float | None, base: float | None, *, more_is_better: bool) -> Figure:
    if value is None or not base:
        return Figure(text)
    ratio = value / base
    near = 0.97 < ratio < 1.03
    better = None if near else (ratio > 1) == more_is_better
    return Figure(text, f"{TIMES}{ratio:.2f}" if ratio < 10 else f"{TIMES}{ratio:.0f}", better)
