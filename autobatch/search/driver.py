"""The search itself: proposal, trial, bracket, until there is nothing more to run or a limit is reached.

It knows neither TensorFlow nor time: trials and clock are given to it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from autobatch.allocation_trace import AllocationTrace
from autobatch.records import Outcome, SampleEstimate, SearchResult, TrialRequest, TrialResult
from autobatch.search import replay
from autobatch.search.bracket import Bracket
from autobatch.search.goal import NO_LIMITS, Goal, Limits, Room
from autobatch.search.memory_model import fit_memory_model
from autobatch.search.moves import Run, SearchTerms, Stop
from autobatch.search.planning import candidate_sizes, worth_one_shape
from autobatch.search.proposals_by_line import propose, wants_estimate
from autobatch.units import format_bytes

logger = logging.getLogger(__name__)

FURTHEST = 2**20
"""Largest size that is tried where neither a target nor ``max_micro_batch`` is given."""

MOST_TRIALS_WITH_SPEED = 4
"""Most trials of a search that has run one more for speed alone."""

TIMED_STEPS = 3
"""Number of micro-steps that are timed in each trial where the plan is chosen by speed."""

_REPLAYED_ALIKE = 0.25
"""Largest share of the measured peak by which a replay of the same size may miss it and still be believed."""

_LEAST_GROWTH = 0.5
"""Least growth of all blocks together in a replay that is believed, as a share of the estimate or, without one, of the
measured rise of the peak. Blocks are given back and asked for again, so their growth normally adds up to several times
that rise."""

_FALLING = 1.05
"""Factor over the largest fit's throughput from which on a smaller size counts as faster."""


def search(
    run_trial: Callable[[TrialRequest], TrialResult],
    goal: Goal,
    room: Room,
    *,
    limits: Limits = NO_LIMITS,
    estimate_sample: Callable[[], SampleEstimate | None] | None = None,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> SearchResult:
    """Find the largest micro-batch that fits, by running a few sizes.

    docs/search.md says how each size is chosen, how many trials that takes, and which test holds it.

    Args:
        run_trial: Runs one size and returns its outcome. Its exceptions are passed on.
        goal: The size that is looked for.
        room: The memory that a trial may take.
        limits: The point at which the search ends early. The best that was run is returned.
        estimate_sample: Called at most once, before the first trial. The bytes that a sample adds to the peak choose
            the first trial; later they are a lower bound on the slope of a line (0.4 of them) or of a replay. The
            largest tensor's bytes decide how much room a prediction leaves.
        on_trial: Called with each result as it comes.

    Returns:
        The result, whose ``largest_fit`` was run and fits. It is None where no size that was run fits. Then
        ``smallest_failure`` is 1, unless a limit stopped the search before.

    Raises:
        ValueError: ``run_trial`` returned another size than it was asked for.
    """
    limit_reached = limits.begun()
    # Where no sizes compete for speed, nothing is timed beyond the steps that show that a size fits.
    timed_steps = TIMED_STEPS if goal.by_speed else 0
    trials: list[TrialResult] = []
    traces: list[AllocationTrace] = []
    headroom_given_up = False

    def run(micro_batch: int) -> TrialResult:
        request = TrialRequest(micro_batch, timed_steps=timed_steps, record_allocations=room.budget_bytes is not None)
        trial = run_trial(request)
        if trial.micro_batch != micro_batch:
            raise ValueError(f"run_trial was asked for {micro_batch}. Received: {trial!r}")
        if trial.allocations is not None:
            traces.append(trial.allocations)
            trial = replace(trial, allocations=None)
        if headroom_given_up:
            trial = _judged_by(trial, terms.budget_bytes)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
        return trial

    terms = SearchTerms(
        budget_bytes=room.budget_bytes,
        fixed_bytes_hint=room.fixed_bytes_hint or 0,
        headroom_bytes=room.headroom_bytes,
        exact=goal.exact,
        top_name=_top_name(goal),
        unlimited=goal.target_batch is None and goal.max_micro_batch is None and room.budget_bytes is None,
    )
    bracket = Bracket(_candidates(goal))
    if estimate_sample is not None and wants_estimate(bracket, terms):
        terms = replace(terms, estimate=estimate_sample())
    while True:
        proposal = propose(bracket, trials, terms)
        if isinstance(proposal, Stop) and bracket.largest_fit is None and not headroom_given_up:
            # That one sample is over the budget proves nothing about the limit itself.
            whole = room.without_headroom()
            trials[:] = [_judged_by(trial, whole.budget_bytes) for trial in trials]
            if any(trial.fits for trial in trials):
                headroom_given_up = True
                terms = replace(terms, budget_bytes=whole.budget_bytes, headroom_bytes=whole.headroom_bytes)
                bracket = _observed(bracket.candidates, trials)
                continue
        if isinstance(proposal, Stop):
            stopped_because = proposal.reason
            break
        if (reached := limit_reached(len(trials))) is not None:
            stopped_because = reached
            break
        known = len(traces)
        trial = run(proposal.micro_batch)
        if isinstance(proposal, Run):
            bracket = bracket.observe(trial.micro_batch, fits=trial.fits)
        if len(traces) > known and terms.budget_bytes is not None:
            told = _as_a_hint(
                functools.partial(_replayed, traces, trial, terms.budget_bytes, bracket.candidates[-1], terms.estimate)
            )
            if told is not None:
                last = traces[-1]
                in_parallel = last.in_parallel and not last.within_operations
                terms = replace(terms, replayed=told, in_parallel=in_parallel, is_compiled=last.is_compiled)

    if goal.target_batch is not None and goal.by_speed and limit_reached(len(trials)) is None:
        faster = _maybe_faster(bracket, trials)
        if faster is not None:
            run(faster)
        if goal.prefers_divisors and bracket.largest_fit is not None and limit_reached(len(trials)) is None:
            dividing = worth_one_shape(trials, target_batch=goal.target_batch)
            if dividing is not None:
                run(dividing)

    if headroom_given_up:
        stopped_because += "; the headroom was given up, since nothing fits beside it"
    fit = fit_memory_model(trials, budget_bytes=terms.budget_bytes, fixed_bytes_hint=room.fixed_bytes_hint)
    return SearchResult(
        largest_fit=bracket.largest_fit,
        smallest_failure=bracket.smallest_failure,
        trials=tuple(trials),
        memory_model=None if fit is None else fit.model,
        stopped_because=stopped_because,
        headroom_given_up=headroom_given_up,
    )


def _judged_by(trial: TrialResult, budget_bytes: int | None) -> TrialResult:
    """Return ``trial`` as one that fits if it ran, and its peak lies within ``budget_bytes``."""
    ran = trial.outcome is Outcome.OUT_OF_MEMORY and trial.peak_bytes is not None
    if not ran or budget_bytes is None or (trial.peak_bytes or 0) > budget_bytes:
        return trial
    return replace(trial, outcome=Outcome.FITS, detail="")


def _observed(candidates: Sequence[int], trials: Sequence[TrialResult]) -> Bracket:
    """Return the bracket of what the ``trials``, of which some fit, have shown."""
    largest = max(trial.micro_batch for trial in trials if trial.fits)
    above = (trial.micro_batch for trial in trials if trial.micro_batch > largest)
    return Bracket(candidates, largest, min(above, default=None))


def _as_a_hint(replayed: Callable[[], int | None]) -> int | None:
    """Return the result of a replay; None where it could not be carried out, as if it were not believed."""
    try:
        return replayed()
    except Exception as error:  # noqa: BLE001 - any fault of a trace; no hint may end one
        logger.info("a replay could not be carried out: %r", error)
        return None


def _replayed(
    traces: Sequence[AllocationTrace],
    trial: TrialResult,
    budget_bytes: int,
    at_most: int,
    estimate: SampleEstimate | None,
) -> int | None:
    """Return the largest size that fits in a replay of ``trial``'s trace, the newest; None where it is not believed."""
    if not trial.fits:
        return None
    trace = traces[-1] if len(traces) == 1 else replay.trace_between(traces[-2], traces[-1])
    again = replay.replayed_peak_bytes(trace, trace.micro_batch)
    held = sum(taken for _, taken in trace.held)
    elsewhere = max(0, (trial.held_bytes or 0) - held)  # in regions that the trial did not use
    again = None if again is None else again + elsewhere
    if again is None or trial.peak_bytes is None or abs(again - trial.peak_bytes) > _REPLAYED_ALIKE * trial.peak_bytes:
        logger.info("a replay is not believed: of %d samples it gives %s, and they took %s", *_told(trial, again))
        return None
    # Blocks whose growth goes unnoticed would let any size fit. A compiled program's own plan is no guess.
    growth = sum(per_sample for _, per_sample in trace.sizes)
    if trace.is_compiled:
        risen = 1.0
    elif estimate is not None:  # good to a factor of two
        risen = _LEAST_GROWTH * estimate.sample_bytes
    else:  # the rise of the peak, part of which may be workspaces
        risen = _LEAST_GROWTH * (trial.peak_bytes - held) / trial.micro_batch
    if growth < risen:
        logger.info("a replay is not believed: its blocks grow by %.0f bytes a sample, not by %.0f", growth, risen)
        return None
    largest = replay.largest_in_any_order(trace, budget_bytes - elsewhere, at_most=at_most)
    logger.debug("a replay of %d samples lets up to %d fit", trial.micro_batch, largest)
    return largest if largest >= trial.micro_batch else None


def _told(trial: TrialResult, again: int | None) -> tuple[int, str, str]:
    known = (again, trial.peak_bytes)
    first, second = ("no peak" if size is None else format_bytes(size) for size in known)
    return trial.micro_batch, first, second


def _candidates(goal: Goal) -> Sequence[int]:
    if goal.target_batch is not None:
        return candidate_sizes(goal.target_batch, goal.max_micro_batch, one_shape=goal.prefers_divisors)
    return range(1, (goal.max_micro_batch or FURTHEST) + 1)


def _top_name(goal: Goal) -> str:
    target, most = goal.target_batch, goal.max_micro_batch
    if target is not None and (most is None or most >= target):
        return "the target itself"
    if most is not None:
        return "the largest size allowed"
    return f"{FURTHEST}, the largest size that is ever tried,"


def _maybe_faster(bracket: Bracket, trials: Sequence[TrialResult]) -> int | None:
    """Return an untried candidate between the largest fit and a smaller size that had a higher throughput.

    The result is None if no smaller size was clearly faster, or if enough trials were run.
    """
    largest = next((trial for trial in trials if trial.micro_batch == bracket.largest_fit), None)
    if largest is None or largest.samples_per_second is None or len(trials) >= MOST_TRIALS_WITH_SPEED:
        return None
    timed = [(trial.samples_per_second or 0.0, trial.micro_batch) for trial in trials if trial.fits]
    rate, fastest = max(timed)
    if rate < _FALLING * largest.samples_per_second:
        return None
    between = [size for size in bracket.candidates if fastest < size < largest.micro_batch]
    untried = [size for size in between if all(size != trial.micro_batch for trial in trials)]
    middle = math.sqrt(fastest * largest.micro_batch)
    return min(untried, key=lambda size: abs(size - middle), default=None)
