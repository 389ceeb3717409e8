"""From trials to a report: the search, and what the user is told of it, whoever runs the trials.

Knows no TensorFlow; importing this imports none.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from autobatch import search
from autobatch.records import Report, TrialRequest, TrialResult
from autobatch.search import planning
from autobatch.sizing.remembered import RememberedResult, without_repeats

if TYPE_CHECKING:
    from autobatch.trial.protocol import Trials
from autobatch.sizing.reports import make_plan, make_report, nothing_fits


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

    With ``cache``, an earlier result is confirmed instead where there is one (:mod:`autobatch.sizing.remembered`);
    the trials
    of one that failed are in the report, and do not count for ``max_trials``.

    Raises:
        NoFeasibleBatchError: Not even one sample fits.
    """
    # Sizes are those of one replica, and so is its share of the target.
    each = None if target_batch is None else -(-target_batch // trials.replicas)
    if each is not None and trials.largest_useful is not None:
        each = min(each, trials.largest_useful)
        target_batch = each if trials.replicas == 1 else target_batch
    planning.require_objective(objective)
    tried: list[TrialResult] = []
    told: list[TrialResult] = []

    def tell(trial: TrialResult) -> None:
        if on_trial is not None and all(trial is not known for known in told):
            on_trial(trial)
        told.append(trial)

    def run(request: TrialRequest) -> TrialResult:
        trial = trials.run(request)
        tell(trial)
        return trial

    # Several workers must run the same trials, whatever each of them remembers.
    remembers = cache and trials.replicas == 1
    memory = (
        RememberedResult(trials, target_batch=target_batch, objective=objective, exact=exact) if remembers else None
    )
    confirmed = None if memory is None else memory.confirm(run, tried)
    if confirmed is not None:
        return make_report(trials, confirmed.result, confirmed.plan)
    started = time.monotonic()
    result = search.search(
        without_repeats(trials.run, tried),
        target_batch=each,
        budget_bytes=trials.environment.budget_bytes,
        headroom_bytes=(trials.environment.limit_bytes or 0) - (trials.environment.budget_bytes or 0),
        max_micro_batch=trials.largest_useful,
        fixed_bytes_hint=trials.fixed_bytes_hint,
        estimate_sample=trials.estimate_sample,
        exact=exact,
        objective=objective,
        max_trials=max_trials,
        max_seconds=max_seconds,
        clock=time.monotonic,
        on_trial=tell,
    )
    cut_short = (max_trials is not None and len(result.trials) >= max_trials) or (
        max_seconds is not None and time.monotonic() - started >= max_seconds
    )
    before = tuple(trial for trial in tried if all(trial is not known for known in result.trials))
    result = dataclasses.replace(result, trials=(*before, *result.trials))
    if result.largest_fit is None:
        raise nothing_fits(trials, result)
    plan = None
    if target_batch is not None:
        micro_batch = planning.make_plan(result.trials, target_batch=each or 1, objective=objective).micro_batch
        plan = make_plan(micro_batch, target_batch, trials.replicas)
    if memory is not None and not cut_short:
        memory.keep(result, plan)
    return make_report(trials, result, plan)
