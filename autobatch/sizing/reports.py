"""Sizing reports: made of a search's result, or of a plan without a search; and the warning of what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autobatch.differences import difference
from autobatch.errors import NoFeasibleBatchError, warn
from autobatch.memory.other_users import HOW_TO_FREE, explain_pressure
from autobatch.records import Environment, Plan, Report, SearchResult, TrialResult
from autobatch.sizing.in_samples import plan_in_samples, result_in_samples, samples_in_portion
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from autobatch.trial.live_trials import LiveTrials
    from autobatch.trial.protocol import Trials


def make_report(trials: Trials, result: SearchResult, plan: Plan | None) -> Report:
    """Make the report, in samples, of a search's ``result``, and of the ``plan`` if there is a target."""
    environment = trials.environment
    if result.headroom_given_up:
        environment = replace(environment, headroom=0.0, headroom_bytes=None, budget_bytes=environment.limit_bytes)
    each = samples_in_portion(trials)
    result = result_in_samples(result, each)
    plan = None if plan is None else plan_in_samples(plan, each)
    whole = "; sizes count elements, which cannot be cut" if getattr(trials, "takes_elements_whole", False) else ""
    return Report(
        plan=plan,
        largest_fit=result.largest_fit,
        smallest_failure=result.smallest_failure,
        trials=result.trials,
        memory_model=result.memory_model,
        environment=environment,
        stopped_because=f"{result.stopped_because}{whole}",
        model_name=trials.model_name,
        warnings=warnings_of(trials, plan),
        host_uses=trials.host_uses,
    )


def say_headroom_is_given_up(trials: Trials) -> None:
    """Warn that the search went on without headroom, because nothing fits beside it."""
    environment = trials.environment
    limit, budget = environment.limit_bytes or 0, environment.budget_bytes or 0
    warn(
        f"Not even one sample fits beside the headroom of {environment.headroom:.0%} of {format_bytes(limit)}, but one "
        f"does fit without it: the headroom of {format_bytes(limit - budget)} is given up. What else takes memory in "
        "training may run out of it; recovery then makes the micro-batch smaller.",
    )


def plan_of(micro_batch: int, effective_batch: int, replicas: int) -> Plan:
    return Plan(micro_batch, -(-effective_batch // (micro_batch * replicas)), effective_batch, replicas)


def _accumulates(plan: Plan) -> bool:
    return plan.accumulation_steps > 1 or plan.replicas > 1


def warnings_of(trials: Trials, plan: Plan | None) -> tuple[str, ...]:
    """Return the warnings of a report: what differs where gradients are accumulated, and what is noted in any case."""
    return (*(trials.warnings if plan is None or _accumulates(plan) else ()), *trials.notes)


def say_what_differs(report: Report, *, listed_in: str) -> None:
    """Warn in short that the plan's updates are not those of one batch; ``listed_in`` names where all are listed."""
    plan = report.plan
    if plan is None or not report.warnings:
        return
    micro_batches = f"Training with {plan.accumulation_steps * plan.replicas} micro-batches of {plan.micro_batches[0]}"
    one_batch = f"one batch of {plan.effective_batch}"
    message = difference.in_short(
        report.warnings,
        sure=f"{micro_batches} is not identical to {one_batch}",
        unsure=f"{micro_batches} may not be identical to {one_batch}",
        listed_in=listed_in,
    )
    warn(message)


def trace_planned(trials: LiveTrials, plan: Plan, micro_batch: int) -> None:
    """Trace what training by ``plan`` will run, at ``micro_batch`` samples: it shows what differs.

    Raises:
        CannotBeCutError: the elements can be neither cut nor joined.
    """
    if _accumulates(plan):
        trials.trace(micro_batch // samples_in_portion(trials))
    else:
        trials.trace_plain()


def unsearched(
    trials: LiveTrials, micro_batch: int, effective_batch: int, why: str = "no search: micro_batch was given"
) -> Report:
    """Make the report of a ``micro_batch`` that was found by no search; both sizes are in samples."""
    each = samples_in_portion(trials)
    plan = plan_of(max(1, micro_batch // each), effective_batch // each, trials.replicas)
    trace_planned(trials, plan, micro_batch)
    nothing_tried = SearchResult(None, None, trials=(), memory_model=None, stopped_because=why)
    return make_report(trials, nothing_tried, plan)


def no_size_fits(trials: Trials, result: SearchResult) -> NoFeasibleBatchError:
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
        + _held_by_others(environment)
        + "".join(f" {cause}" for cause in explain_pressure(environment.device)),
        needed_bytes=needed,
        limit_bytes=environment.limit_bytes,
    )


def _held_by_others(environment: Environment) -> str:
    if not environment.held_by_others_bytes:
        return ""
    return (
        f" {format_bytes(environment.held_by_others_bytes)} were held before by other tensors of this process, such as "
        f"earlier models, and data on a CPU. {HOW_TO_FREE}"
    )


def _what_it_needs(trials: Trials, smallest: TrialResult, needed: int | None) -> str:
    """Return in words what the smallest trial needed and what there is.

    ``needed`` is a lower bound, unless the trial's peak is known. Where the limit is above that bound, only the known
    parts of the need are named.
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
