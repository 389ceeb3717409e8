"""From trials to a report: the search, and what the user is told of it, whoever runs the trials.

Knows no TensorFlow; importing this imports none.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from autobatch import search
from autobatch.errors import AutobatchWarning, NoFeasibleBatchError
from autobatch.memory.pressure import explain_pressure
from autobatch.records import Plan, Report, SearchResult, TrialRequest, TrialResult
from autobatch.remembering import Remembering, without_repeats
from autobatch.search import planning
from autobatch.trial import differences
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from autobatch.trial.in_process import LiveTrials
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

    With ``cache``, an earlier result is confirmed instead where there is one (:mod:`autobatch.remembering`); the trials
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
    memory = Remembering(trials, target_batch=target_batch, objective=objective, exact=exact) if remembers else None
    confirmed = None if memory is None else memory.confirm(run, tried)
    if confirmed is not None:
        return _report(trials, confirmed.result, confirmed.plan)
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
        raise _nothing_fits(trials, result)
    plan = None
    if target_batch is not None:
        micro_batch = planning.make_plan(result.trials, target_batch=each or 1, objective=objective).micro_batch
        plan = _plan(micro_batch, target_batch, trials.replicas)
    if memory is not None and not cut_short:
        memory.keep(result, plan)
    return _report(trials, result, plan)


def _report(trials: Trials, result: SearchResult, plan: Plan | None) -> Report:
    accumulates = plan is None or plan.accumulation_steps > 1 or plan.replicas > 1
    return Report(
        plan=plan,
        largest_fit=result.largest_fit,
        smallest_failure=result.smallest_failure,
        trials=result.trials,
        memory_model=result.memory_model,
        environment=trials.environment,
        stopped_because=result.stopped_because,
        model_name=trials.model_name,
        warnings=trials.warnings if accumulates else (),
        host_uses=trials.host_uses,
    )


def _plan(micro_batch: int, effective_batch: int, replicas: int) -> Plan:
    return Plan(micro_batch, -(-effective_batch // (micro_batch * replicas)), effective_batch, replicas)


def say_what_differs(report: Report, *, listed_in: str) -> None:
    """Warn in short that the plan's updates are not those of one batch; ``listed_in`` is where all differences are."""
    plan = report.plan
    if plan is None or not report.warnings:
        return
    micro_batches = f"Training with {plan.accumulation_steps * plan.replicas} micro-batches of {plan.micro_batches[0]}"
    one_batch = f"one batch of {plan.effective_batch}"
    message = differences.in_short(
        report.warnings,
        sure=f"{micro_batches} is not identical to {one_batch}",
        unsure=f"{micro_batches} may not be identical to {one_batch}",
        listed_in=listed_in,
    )
    warnings.warn(message, AutobatchWarning, stacklevel=3)


def unsearched(
    trials: LiveTrials, micro_batch: int, effective_batch: int, why: str = "no search: micro_batch was given"
) -> Report:
    plan = _plan(micro_batch, effective_batch, trials.replicas)
    accumulates = plan.accumulation_steps > 1 or plan.replicas > 1
    if accumulates:
        trials.trace()
    return Report(
        plan=plan,
        largest_fit=None,
        smallest_failure=None,
        trials=(),
        memory_model=None,
        environment=trials.environment,
        stopped_because=why,
        model_name=trials.model_name,
        warnings=trials.warnings if accumulates else (),
        host_uses=trials.host_uses,
    )


def _nothing_fits(trials: Trials, result: SearchResult) -> NoFeasibleBatchError:
    smallest = min(result.trials, key=lambda trial: trial.micro_batch)
    environment = trials.environment
    known = [value for value in (smallest.peak_bytes, trials.fixed_bytes_hint) if value is not None]
    needed = max(known, default=None)
    if needed is not None and smallest.peak_bytes is None:
        needed += smallest.requested_bytes or 0
    if smallest.micro_batch > 1:
        return NoFeasibleBatchError(
            f"No micro-batch that fits was found before the search was stopped ({result.stopped_because}); the "
            f"smallest that was tried is {smallest.micro_batch}. Allow more trials or more seconds.",
            needed_bytes=needed,
            limit_bytes=environment.limit_bytes,
        )
    return NoFeasibleBatchError(
        f"Not even a micro-batch of {smallest.micro_batch} fits on {environment.device}: "
        f"{_what_it_needs(trials, smallest, needed)} "
        "Free memory, raise the limit, use smaller samples, a smaller model or an optimizer with fewer slots."
        + "".join(f" {cause}" for cause in explain_pressure(environment.device)),
        needed_bytes=needed,
        limit_bytes=environment.limit_bytes,
    )


def _what_it_needs(trials: Trials, smallest: TrialResult, needed: int | None) -> str:
    """Return in words what the smallest trial needed and what there is.

    ``needed`` is a lower bound, unless the trial's peak is known: where the limit is above it, only what is known of it
    is said.
    """
    environment = trials.environment
    limit, budget = environment.limit_bytes, environment.budget_bytes
    share = f", of which {environment.headroom:.0%} is headroom" if environment.headroom else ""
    there_is = "unknown" if limit is None else f"{format_bytes(limit)} ({environment.limit_source}){share}"
    if needed is None:
        return f"it needs more than there is, and the limit is {there_is}."
    if smallest.peak_bytes is not None or limit is None or needed > (limit if budget is None else budget):
        return f"it needs at least {format_bytes(needed)}, and the limit is {there_is}."
    known = []
    if trials.fixed_bytes_hint is not None:
        known.append(f"weights, optimizer and what else is held take at least {format_bytes(trials.fixed_bytes_hint)}")
    if smallest.requested_bytes is not None:
        known.append(f"the allocation that failed asked for {format_bytes(smallest.requested_bytes)} more")
    return (
        f"it ran out of memory, and the limit is {there_is}. Of that {', and '.join(known)}; the rest is other "
        "tensors, or free in pieces too small."
    )
