"""Sentences of a report that the text and the HTML renderer share.

Nothing is escaped for HTML here: the renderer does that. Strings from the user's model or from an error message are
passed on; only the control characters that would act on a terminal are shown as escapes.
"""

from __future__ import annotations

from typing import NamedTuple

from autobatch.records import Environment, MemoryModel, Outcome, Plan, Report, TrialResult
from autobatch.units import format_bytes, format_seconds

TIMES = "\u00d7"

OUTCOME_LABELS = {
    Outcome.FITS: "fits",
    Outcome.OUT_OF_MEMORY: "out of memory",
    Outcome.TIMED_OUT: "timed out",
}


def printable(text: str) -> str:
    """Return ``text`` in one line, with every character that a terminal or a parser would act on as an escape."""
    folded = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in folded)


def samples(count: int) -> str:
    """Return ``"1 sample"`` or ``"64 samples"``."""
    return f"{count:,} sample" if count == 1 else f"{count:,} samples"


def title(report: Report) -> str:
    name = printable(report.model_name)
    return f"autobatch sizing report: {name}" if name else "autobatch sizing report"


def decisive_trial(report: Report) -> TrialResult | None:
    """Return the trial that the report is about; see :attr:`autobatch.records.Report.decisive_trial`."""
    return report.decisive_trial


def share_of_limit(trial: TrialResult, environment: Environment) -> float | None:
    """Return peak over limit; None where either is unknown."""
    if trial.peak_bytes is None or not environment.limit_bytes:
        return None
    return trial.peak_bytes / environment.limit_bytes


class TrialCells(NamedTuple):
    """A trial as the cells of a table; "-" is "not measured"."""

    micro_batch: str
    outcome: str
    peak: str
    share: str
    step: str
    speed: str


def trial_cells(trial: TrialResult, environment: Environment) -> TrialCells:
    share = share_of_limit(trial, environment)
    speed = trial.samples_per_second
    return TrialCells(
        micro_batch=f"{trial.micro_batch:,}",
        outcome=OUTCOME_LABELS[trial.outcome],
        peak="-" if trial.peak_bytes is None else format_bytes(trial.peak_bytes),
        share="-" if share is None else f"{100 * share:.0f} %",
        step="-" if trial.step_seconds is None else format_seconds(trial.step_seconds),
        speed="-" if speed is None else format_speed(speed),
    )


def format_speed(samples_per_second: float) -> str:
    return f"{samples_per_second:,.0f}" if samples_per_second >= 10 else f"{samples_per_second:.2g}"


def decisive_label(report: Report) -> str:
    """Return the label of :func:`decisive_trial`: "plan" or "largest"."""
    return "plan" if report.plan else "largest"


def environment_lines(environment: Environment) -> list[tuple[str, str]]:
    """Return label and value of each condition that the trials ran under."""
    lines = [("Device", printable(environment.device)), ("Limit", _limit(environment))]
    if environment.budget_bytes is not None:
        budget = format_bytes(environment.budget_bytes)
        lines.append(("Budget", f"{budget}, the limit less {headroom(environment)}"))
    if environment.held_by_others_bytes:
        held = format_bytes(environment.held_by_others_bytes)
        lines.append(("Held before", f"{held}, by other tensors of the process"))
    lines.append(("Precision", printable(environment.precision)))
    lines.append(("XLA", "on" if environment.jit_compile else "off"))
    if environment.versions:
        lines.append(("Versions", ", ".join(f"{printable(name)} {printable(v)}" for name, v in environment.versions)))
    return lines


def headroom(environment: Environment) -> str:
    """Describe the headroom in bytes, and as a share of the limit."""
    share = f"{100 * environment.headroom:.3g} % headroom"
    if environment.limit_bytes is None or environment.budget_bytes is None:
        return share
    return f"{format_bytes(environment.limit_bytes - environment.budget_bytes)} ({share})"


def _limit(environment: Environment) -> str:
    source = printable(environment.limit_source)
    if environment.limit_bytes is None:
        return source or "not known"
    size = format_bytes(environment.limit_bytes)
    return f"{size} ({source})" if source else size


def plan(report: Report) -> str:
    """Describe the plan in a line, with the time of an update where it was measured."""
    if report.plan is None:
        return "none: nothing fits" if report.largest_fit is None else "none: no target batch was given"
    text = plan_alone(report.plan)
    seconds = update_seconds_sentence(report)
    return text if seconds is None else f"{text}, about {format_seconds(seconds)} an update"


def plan_alone(made: Plan) -> str:
    """Describe a plan in a line, without times."""
    largest, smallest = made.micro_batches[0], made.micro_batches[-1]
    if made.replicas > 1:
        each = f"{made.accumulation_steps:,} {TIMES} micro-batch {largest:,}"
        return f"effective batch {made.effective_batch:,} = {made.replicas:,} replicas {TIMES} {each}"
    if made.accumulation_steps == 1:
        return f"effective batch {made.effective_batch:,} in one micro-batch, nothing to accumulate"
    notes = []
    if smallest < largest:
        notes.append(f"{made.micro_batches.count(smallest):,} of them with {samples(smallest)}")
    if largest < made.micro_batch:
        notes.append(f"{made.micro_batch:,} were allowed")
    product = f"{made.accumulation_steps:,} {TIMES} micro-batch {largest:,}"
    text = f"effective batch {made.effective_batch:,} = {product}"
    return f"{text} ({'; '.join(notes)})" if notes else text


def in_a_line(report: Report, *, spent: str) -> str:
    """Say in one line what was found, and what it has cost by ``spent``.

    For example ``"micro-batch 64 x 4 for 256 on GPU:0 (2 trials, 14 s; peak 9.8 of 11.0 GiB)"``.
    """
    made, where = report.plan, printable(report.environment.device)
    if made is None:
        what = f"{samples(report.largest_fit or 0)} at a time on {where}"
    elif made.replicas == 1:
        what = f"micro-batch {made.micro_batches[0]} x {made.accumulation_steps} for {made.effective_batch} on {where}"
    else:
        each = f"micro-batch {made.micro_batches[0]} x {made.accumulation_steps} on each of {made.replicas} replicas"
        what = f"{each} for {made.effective_batch}"
    peak = _peak_of_limit(report)
    return f"{what} ({spent}{peak and f'; {peak}'})"


def _peak_of_limit(report: Report) -> str:
    trial, limit_bytes = decisive_trial(report), report.environment.limit_bytes
    if trial is None or not trial.peak_bytes:  # an allocator may keep no figures
        return ""
    peak = format_bytes(trial.peak_bytes)
    if not limit_bytes:
        return f"peak {peak}"
    limit = format_bytes(limit_bytes)
    (size, _, unit), (_, _, unit_of_limit) = peak.partition(" "), limit.partition(" ")
    return f"peak {size if unit == unit_of_limit else peak} of {limit}"


def rough_seconds(seconds: float) -> str:
    """Write a time that people wait for: ``rough_seconds(14.2) == "14 s"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def update_seconds_sentence(report: Report) -> float | None:
    """Return the seconds of one optimizer update of the plan; None where its trial was not timed."""
    return report.update_seconds


def memory_line(report: Report) -> str:
    """Describe the memory line of a report, and what its two parts hold; or say that it is not known."""
    line = report.memory_model
    return "not known: too few trials measured a peak" if line is None else memory_model(line)


def memory_model(line: MemoryModel) -> str:
    """Describe a memory line, and what its two parts hold."""
    per_sample = f"{format_bytes(line.per_sample_bytes)} a sample (activations, inputs)"
    if line.fixed_bytes < 0:
        # Measured peaks need not lie on a line; a negative value at zero samples means nothing.
        return f"peak = {per_sample} less {format_bytes(-line.fixed_bytes)}"
    return f"peak = {format_bytes(line.fixed_bytes)} fixed (weights, gradients, optimizer slots) + {per_sample}"


def host(report: Report) -> str:
    """Say what the input pipeline will hold in host memory; "" where that is not known."""
    parts = [f"{format_bytes(use.held_bytes)} {use.name}" for use in report.host_uses]
    total = sum(use.held_bytes for use in report.host_uses)
    return f"{format_bytes(total)} in host memory: {printable('; '.join(parts))}" if parts else ""


def found(report: Report) -> str:
    """Say what was proven: the largest size that fits, and the smallest that does not."""
    largest, failure = report.largest_fit, report.smallest_failure
    if largest is None:
        if failure is None:
            return "no size was seen to fit"
        return (
            "not even 1 sample fits" if failure == 1 else f"no size was seen to fit; {failure:,} was the smallest tried"
        )
    fits = f"{samples(largest)} {'fits' if largest == 1 else 'fit'}"
    return f"{fits}; none was seen to fail" if failure is None else f"{fits}, {failure:,} do not"


def distance(report: Report) -> str:
    """Say how far the decisive trial's peak is from the limit."""
    trial = decisive_trial(report)
    if trial is None:
        return "not known: no trial fitted"
    verb = "peaks" if trial.micro_batch == 1 else "peak"
    if trial.peak_bytes is None:
        return f"not known: no peak was measured for {samples(trial.micro_batch)}"
    start = f"{samples(trial.micro_batch)} {verb} at {format_bytes(trial.peak_bytes)}"
    limit = report.environment.limit_bytes
    if not limit:
        return f"{start}; no limit is known"
    free = limit - trial.peak_bytes
    side = "below" if free >= 0 else "above"
    gap = f"{format_bytes(abs(free))} ({100 * abs(free) / limit:.0f} %)"
    return f"{start}, {gap} {side} the limit of {format_bytes(limit)}"


def stopped(report: Report) -> str:
    return printable(report.stopped_because) or "not recorded"


COMPILATION_SECONDS = 1.0
"""Seconds by which a first step must exceed the next ones to be noted: it was traced and compiled."""


def trial_note(trial: TrialResult) -> str:
    """Return a note for below a trial's row in the table: time before its steps, a failure's words, a second try."""
    parts = []
    if trial.first_step_seconds is not None and trial.step_seconds is not None:
        before_seconds = trial.first_step_seconds - trial.step_seconds
        if before_seconds >= COMPILATION_SECONDS:
            parts.append(f"{format_seconds(before_seconds)} before its steps, for tracing and compilation")
    if trial.requested_bytes is not None and not trial.fits:
        parts.append(f"asked for {format_bytes(trial.requested_bytes)} more")
    if trial.retried:
        parts.append("failed once and was tried again")
    if trial.detail:
        parts.append(printable(trial.detail))
    return "; ".join(parts)
