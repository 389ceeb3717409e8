"""Plan from trials and a target: the micro-batch that makes the shortest whole update.

This module knows step times and arithmetic only. It predicts nothing: a plan is made of sizes that were run and fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from autobatch.records import Plan, TrialResult

OBJECTIVES = ("throughput", "largest")

_NEARLY_EQUAL = 1.02
"""Factor below which two update times are a tie: a repeated measurement differs by as much."""


_ONE_SHAPE = 1.05
"""Factor over the shortest update's time up to which a size that divides the target is taken, where each size is
compiled by itself: another size brings a second one with it, whose compilation takes as long as that of the first."""

_SAVED_LAUNCHES = 1.1
"""Factor over a size that divides the target up to which larger ones are not worth a compilation. They save this share
of an update's micro-steps at the most. Of a micro-step's time hardly more than half does not grow with its samples, so
that :data:`_ONE_SHAPE` is not exceeded."""


def require_objective(objective: str) -> None:
    """Raise ``ValueError`` unless ``objective`` is one of :data:`OBJECTIVES`."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}. Received: {objective!r}")


def candidate_sizes(
    target_batch: int, max_micro_batch: int | None = None, *, one_shape: bool = False
) -> tuple[int, ...]:
    """Return the distinct ``ceil(target_batch / k)``, ascending: the only micro-batches worth trying for a target.

    Any other size needs as many micro-batches an update as the next smaller of these, and more memory. There are
    about ``2 * sqrt(target_batch)`` of them: 31 for a target of 256. None is above ``max_micro_batch``. With
    ``one_shape``, sizes up to a tenth above one that divides the target are left out.

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
            break
        # The fewest steps that bring the micro-batch below this one, so that no size is met twice.
        steps = -(-target_batch // (micro_batch - 1))
    sizes.reverse()
    if not one_shape:
        return tuple(sizes)
    dividing = [size for size in sizes if divides(size, target_batch)]
    return tuple(
        size
        for size in sizes
        if divides(size, target_batch) or not any(one < size <= _SAVED_LAUNCHES * one for one in dividing)
    )


def update_seconds(trial: TrialResult, target_batch: int) -> float | None:
    """Compute the seconds of one whole update of ``target_batch`` samples; None where the trial was not timed.

    A micro-batch that is smaller than the trial's counts at the fraction of samples it holds.
    """
    if trial.step_seconds is None:
        return None
    return target_batch / trial.micro_batch * trial.step_seconds + (trial.apply_seconds or 0.0)


def make_plan(
    trials: Sequence[TrialResult], *, target_batch: int, objective: str = "throughput", one_shape: bool = False
) -> Plan:
    """Choose the micro-batch, among those that were run and fit, and count the micro-batches of an update.

    The objective "throughput" takes the shortest update. Among sizes within 2 % of it, one that divides
    ``target_batch`` is preferred: all micro-batches then have one shape. With ``one_shape``, because each shape is
    compiled by itself, that holds among sizes within 5 %. Among equals the fewest steps are preferred. Where no trial
    was timed, the largest size that fits is taken. The objective "largest" always takes the largest size that fits.

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
        near = [
            trial.micro_batch
            for seconds, trial in timed
            if seconds
            <= shortest * (_ONE_SHAPE if one_shape and divides(trial.micro_batch, target_batch) else _NEARLY_EQUAL)
        ]
        micro_batch = max(near, key=lambda size: (divides(size, target_batch), size))
    return Plan(micro_batch, -(-target_batch // micro_batch), target_batch)


def divides(micro_batch: int, target_batch: int) -> bool:
    """Return True if micro-batches of this size make up the target without a smaller one."""
    return target_batch % micro_batch == 0


def worth_one_shape(trials: Sequence[TrialResult], *, target_batch: int) -> int | None:
    """Return a size to run that may take the place of the planned one, so that a single size needs to be compiled.

    It is the largest below the planned size that divides the target. The result is None if the planned size divides the
    target itself, if that size has been run, or if by the times of the others it would take too long.
    """
    plan = make_plan(trials, target_batch=target_batch, one_shape=True)
    if divides(plan.micro_batch, target_batch):
        return None
    dividing = max(size for size in candidate_sizes(target_batch, plan.micro_batch) if divides(size, target_batch))
    timed = sorted(
        (trial.micro_batch, trial.step_seconds) for trial in trials if trial.fits and trial.step_seconds is not None
    )
    if not timed or any(trial.micro_batch == dividing for trial in trials):
        return None
    (small, at_small), (large, at_large) = timed[0], timed[-1]
    # With one time alone, half of it is taken to be the same for any number of samples.
    per_sample = (at_large - at_small) / (large - small) if large > small else 0.5 * at_large / large
    seconds = at_large - max(0.0, per_sample) * (large - dividing)
    return dividing if seconds / dividing <= _ONE_SHAPE * at_large / large else None
