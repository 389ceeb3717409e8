"""Search that leads from trials to a report, whoever runs the trials.

This module knows no TensorFlow; importing it imports none.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from autobatch import interrupts, search
from autobatch.errors import FixedBatchSizeError, NoFeasibleBatchError
from autobatch.records import Report, SearchResult, TrialRequest, TrialResult
from autobatch.search import planning
from autobatch.sizing.in_samples import samples_in_portion, trial_in_samples
from autobatch.sizing.remembered import RememberedResult, without_repeats
from autobatch.sizing.reports import make_report, no_size_fits, plan_of, say_headroom_is_given_up

if TYPE_CHECKING:
    from autobatch.trial.protocol import Trials


def search_with(
    trials: Trials,
    *,
    target_batch: int | None,
    exact: bool = False,
    objective: str = "throughput",
    max_trials: int | None = None,
    max_seconds: float | None = None,
    on_trial: Callable[[TrialResult], None] | None = None,
    cache: bool = False,
) -> Report:
    """Run the search over any source of trials and make the report of it.

    With ``cache``, an earlier result is confirmed in place of a search, where there is one; see
    :mod:`autobatch.sizing.remembered`. If it does not hold, its trials are in the report, and do not count for
    ``max_trials``.

    ``target_batch`` and what is returned count samples; the trials and the search count portions of them.

    Raises:
        NoFeasibleBatchError: Not even one sample fits.
    """
    each = samples_in_portion(trials)
    if target_batch is not None:
        target_batch = max(1, target_batch // each)
    if target_batch is not None and trials.largest_useful is not None:
        target_batch = min(target_batch, trials.largest_useful * trials.replicas)
    target_per_replica = None if target_batch is None else -(-target_batch // trials.replicas)
    planning.require_objective(objective)
    tried: list[TrialResult] = []
    shown: list[TrialResult] = []

    def show(trial: TrialResult) -> None:
        if on_trial is not None and all(trial is not known for known in shown):
            on_trial(trial_in_samples(trial, each))
        shown.append(trial)

    def run_one(request: TrialRequest) -> TrialResult:
        with interrupts.not_lost():  # one that has come during this trial ends the search before the next
            return trials.run(request)

    def run(request: TrialRequest) -> TrialResult:
        trial = run_one(request)
        show(trial)
        return trial

    # Several workers must run the same trials, whatever each of them remembers.
    remembers = cache and trials.replicas == 1
    memory = (
        RememberedResult(trials, target_batch=target_batch, objective=objective, exact=exact) if remembers else None
    )
    try:
        confirmed = None if memory is None else memory.confirm(run, tried)
        if confirmed is not None:
            return make_report(trials, confirmed.result, confirmed.plan)
        started = time.monotonic()
        result = search.search(
            without_repeats(run_one, tried),
            search.Goal(
                target_batch=target_per_replica,
                max_micro_batch=trials.largest_useful,
                objective=objective,
                exact=exact,
                one_shape=trials.environment.jit_compile,
            ),
            search.Room(
                trials.environment.budget_bytes,
                headroom_bytes=(trials.environment.limit_bytes or 0) - (trials.environment.budget_bytes or 0),
                fixed_bytes_hint=trials.fixed_bytes_hint,
            ),
            limits=search.Limits(max_trials, max_seconds, time.monotonic),
            estimate_sample=trials.estimate_sample,
            on_trial=show,
        )
    except FixedBatchSizeError as error:
        if target_batch is None or target_per_replica is None:
            raise
        return _whole_alone(trials, run, shown, target_batch, target_per_replica, error)
    cut_short = (max_trials is not None and len(result.trials) >= max_trials) or (
        max_seconds is not None and time.monotonic() - started >= max_seconds
    )
    before = tuple(trial for trial in tried if all(trial is not known for known in result.trials))
    result = dataclasses.replace(result, trials=(*before, *result.trials))
    if result.largest_fit is None:
        raise no_size_fits(trials, result)
    plan = None
    if target_batch is not None and target_per_replica is not None:
        on_one = planning.make_plan(
            result.trials,
            target_batch=target_per_replica,
            objective=objective,
            one_shape=trials.environment.jit_compile,
        )
        plan = plan_of(on_one.micro_batch, target_batch, trials.replicas)
    if memory is not None and not cut_short and not result.headroom_given_up:
        memory.keep(result, plan)
    if result.headroom_given_up:
        say_headroom_is_given_up(trials)
    return make_report(trials, result, plan)


def _whole_alone(
    trials: Trials,
    run: Callable[[TrialRequest], TrialResult],
    tried: list[TrialResult],
    target_batch: int,
    whole: int,
    error: FixedBatchSizeError,
) -> Report:
    """Return the report of the whole effective batch as one micro-batch: the model's code cannot take less.

    Raises:
        NoFeasibleBatchError: It does not fit.
    """
    known = [trial for trial in tried if trial.micro_batch == whole]
    limited = trials.environment.budget_bytes is not None
    trial = known[0] if known else run(TrialRequest(whole, record_allocations=limited))
    if not trial.fits:
        raise NoFeasibleBatchError(
            f"{whole} samples at a time do not fit, and the model's code cannot take fewer. {error}",
            needed_bytes=trial.peak_bytes,
            limit_bytes=trials.environment.limit_bytes,
        ) from error
    result = SearchResult(whole, None, tuple(tried), None, "the model's code cannot take fewer samples at a time")
    return make_report(trials, result, plan_of(whole, target_batch, trials.replicas))
