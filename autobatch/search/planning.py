"""Plan from trials and a target: the micro-batch that makes the shortest whole update.

This module knows step times and arithmetic only. It predicts nothing: a plan is made of sizes that were run and fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from autobatch.records import Plan, TrialResult

OBJECTIVES = ("throughput", "largest")

_NEARLY_EQUAL = 1.02
"""Factor below which two update times are a tie: a repeated measurement differs by as much."""


def require_objective(objective: str) -> None:
    """Raise ``ValueError`` unless ``objective`` is one of :data:`OBJECTIVES`."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}. Received: {objective!r}")


def candidate_sizes(target_batch: int, max_micro_batch: int | None = None) -> tuple[int, ...]:
    """Return the distinct ``ceil(target_batch / k)``, ascending: the only micro-batches worth trying for a target.

    Any other size needs as many micro-batches an update as the next smaller of these, and more memory. There are
    about ``2 * sqrt(target_batch)`` of them: 31 for a target of 256. None is above ``max_micro_batch``.

    Raises:
        ValueError: an argument is below 1.
    """
    for name, value in (("target_batch", target_batch), ("max_micro_batch", max_micro_batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1. Received: {value!r}")
    top = target_batch if max_micro_batch is None else min(target_batch, max_micro_batch)
    sizes: list[int] = []
    steps = -(-target_batch // top)
    while True:
        micro_batch = -(-target_batch // steps)
        sizes.append(micro_batch)
        if micro_batch == 1:
            return tuple(reversed(sizes))
        # The fewest steps that bring the micro-batch below this one, so that no size is met twice.
        steps = -(-target_batch // (micro_batch - 1))


def update_seconds(trial: TrialResult, target_batch: int) -> float | None:
    """Compute the seconds of one whole update of ``target_batch`` samples; None where the trial was not timed.

    A micro-batch that is smaller than the trial's counts at the fraction of samples it holds.
    """
    if trial.step_seconds is None:
        return None
    return target_batch / trial.micro_batch * trial.step_seconds + (trial.apply_seconds or 0.0)


def make_plan(trials: Sequence[TrialResult], *, target_batch: int, objective: str = "throughput") -> Plan:
    """Choose the micro-batch, among those that were run and fit, and count the micro-batches of an update.

    The objective "throughput" takes the shortest update. Among sizes within 2 % of it, one that divides
    ``target_batch`` is preferred: all micro-batches then have one shape and need one trace. Among equals the fewest
    steps are preferred. Where no trial was timed, the largest size that fits is taken. The objective "largest" always
    takes the largest size that fits.

    Raises:
        ValueError: nothing fits, or an argument is out of range.
    """
    require_objective(objective)
    if target_batch < 1:
        raise ValueError(f"target_batch must be at least 1. Received: {target_batch!r}")
    fitting = [trial for trial in trials if trial.fits and trial.micro_batch <= target_batch]
    if not fitting:
        raise ValueError(
            "make_plan needs a trial that fits and is not above target_batch. "
            f"Received: target_batch={target_batch!r}, trials of {[trial.micro_batch for trial in trials]!r}"
        )
    timed = [(seconds, trial) for trial in fitting if (seconds := update_seconds(trial, target_batch)) is not None]
    if objective == "largest" or not timed:
        micro_batch = max(trial.micro_batch for trial in fitting)
    else:
        shortest = min(seconds for seconds, _ in timed)
        near = [trial.micro_batch for seconds, trial in timed if seconds <= shortest * _NEARLY_EQUAL]
        micro_batch = max(near, key=lambda size: (target_batch % size == 0, size))
    return Plan(micro_batch, -(-target_batch // micro_batch), target_batch)
