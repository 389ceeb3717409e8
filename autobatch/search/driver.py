"""Runs the search: proposal, trial, bracket, until there is nothing more to run or a limit is reached.

Knows neither TensorFlow nor time: trials and clock are given to it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from autobatch.records import AllocationTrace, SampleEstimate, SearchResult, TrialRequest, TrialResult
from autobatch.search import replay
from autobatch.search.bracket import Bracket
from autobatch.search.memory_model import fit_memory_model
from autobatch.search.moves import Run, Stop, Terms
from autobatch.search.planning import candidate_sizes, require_objective
from autobatch.search.proposals_by_line import propose, wants_estimate

logger = logging.getLogger(__name__)

FURTHEST = 2**20
"""The largest size tried where neither a target nor ``max_micro_batch`` is given."""

MOST_TRIALS_WITH_SPEED = 4
"""A further trial for speed alone must not make a search longer than this."""

TIMED_STEPS = 3
"""Micro-steps that are timed in each trial where the plan is chosen by speed."""

_REPLAYED_ALIKE = 0.25
"""A replay whose own size ends with another peak than was measured, by more than this, is not believed."""

_LEAST_GROWTH = 0.5
"""Nor one in which all blocks together grow by less than this part of what the peak rose by: they are given back and
asked for again, and add up to several times that."""

_FALLING = 1.05
"""Throughput counts as falling where a smaller size passes this many times the samples per second."""


def search(
    run_trial: Callable[[TrialRequest], TrialResult],
    *,
    target_batch: int | None,
    budget_bytes: int | None,
    headroom_bytes: int = 0,
    max_micro_batch: int | None = None,
    fixed_bytes_hint: int | None = None,
    estimate_sample: Callable[[], SampleEstimate | None] | None = None,
    exact: bool = False,
    objective: str = "throughput",
    max_trials: int | None = None,
    max_seconds: float | None = None,
    clock: Callable[[], float] | None = None,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> SearchResult:
    """Find the largest micro-batch that fits, by really running a few.

    The first trial is the largest candidate where that is at most 32 and the weights take less than half of the budget:
    it mostly fits, and then one trial is all. Otherwise ``estimate_sample`` is asked for what a sample needs, roughly:
    the first trial is 0.4 of what fits by that or a prime a little below, or the largest candidate if twice as much
    fits; without an estimate it is a probe of 8.

    Where that trial recorded what it allocated, its blocks are replayed at other sizes
    (:mod:`autobatch.search.replay`), and the largest that finds room for them, less a margin, comes next. Otherwise
    what is held before the first sample and the probe's peak make a line; then: run what it says fits, and refine,
    until what fits is within 3 % of that. A prediction leaves room for half of the estimate's largest tensor, in the
    headroom if there is one, because free memory is in pieces by then; where that room would cost a whole candidate of
    a target, it is not left. A far prediction goes through a trial half-way; see
    :mod:`autobatch.search.proposals_by_line`.

    Trials, where the budget and the peaks are known:

    - a straight line whose fixed part is the hint, and an estimate that is wrong by less than a factor of 0.6 to 2.5: 3
      at the most, mostly 2, and no failure, if the allocator loses up to half of the largest tensor;
    - the same without an estimate: 4 at the most, mostly 2 or 3, and no failure unless the first trial fails (less than
      8 fit, or a target up to 32 does not);
    - any memory curve, however it bends: 8 led by the line, and up to 11 of bisection after those if some failed;
    - ``exact``, a straight line whose fixed part is the hint: 6 at the most, and 2 failures (3 where but one sample
      fits, if that); with an estimate and above 200 samples one or two more; any curve: 10 + 2 log2(n) for n
      candidates.

    A budget that is all that the allocator has is reached by few models: free memory is in pieces by then, and sizes
    fail below the line's prediction (on a CPU from 0.86 of it on, where convolutions ask for large workspaces). Each
    such failure is met with a smaller size.

    Without a budget, or where the allocator keeps no peak, the size doubles from the first trial on until it fails and
    is then bisected, to 3 % or, if ``exact``, to the end: 2 log2(n) + 2.

    With a target, only the distinct ``ceil(target_batch / k)`` are run; "within 3 %" then also means that the next of
    them is predicted not to fit. Under the objective "throughput" one smaller candidate more is run where two trials
    have shown that throughput falls with the size, and fewer than 4 trials were run.

    Args:
        run_trial: Runs one size and says how it went. What it raises is passed on.
        target_batch: The effective batch, None if there is none.
        budget_bytes: What a peak may be at most, None if unknown.
        headroom_bytes: What the allocator has beside the budget: what it loses in pieces may be lost there.
        max_micro_batch: The largest size worth trying.
        fixed_bytes_hint: A lower bound on every peak: weights, accumulators and optimizer slots.
        estimate_sample: Asked at most once, before the first trial. Roughly what a sample adds to the peak chooses the
            first trial and nothing else; the largest tensor's share is how much room a prediction leaves.
        exact: Prove it: one more than the size returned (with a target: the next candidate) is run and fails.
        objective: "throughput" or "largest".
        max_trials: Stop after so many. The best that was run is returned.
        max_seconds: Start no trial later than this after the start, other than the first. Needs ``clock``.
        clock: Seconds from any origin, as ``time.monotonic``.
        on_trial: Called with each result as it comes.

    Returns:
        ``largest_fit`` was run and fits. It is None where no size that was run fits: ``smallest_failure`` is 1 then,
        unless a limit stopped the search before.

    Raises:
        ValueError: an argument is out of range, or ``run_trial`` returned another size than it was asked for.
    """
    require_objective(objective)
    _require_positive(
        target_batch=target_batch,
        budget_bytes=budget_bytes,
        max_micro_batch=max_micro_batch,
        max_trials=max_trials,
        max_seconds=max_seconds,
    )
    if headroom_bytes < 0:
        raise ValueError(f"headroom_bytes must not be negative. Received: {headroom_bytes!r}")
    if fixed_bytes_hint is not None and fixed_bytes_hint < 0:
        raise ValueError(f"fixed_bytes_hint must not be negative. Received: {fixed_bytes_hint!r}")
    if max_seconds is not None and clock is None:
        raise ValueError(f"max_seconds needs a clock, such as time.monotonic. Received: {max_seconds=}, {clock=}")

    started = clock() if clock is not None else 0.0
    # Where no sizes compete for speed, the seconds of the steps that show that a size fits are enough to be told.
    timed_steps = 0 if target_batch is None or objective == "largest" else TIMED_STEPS
    trials: list[TrialResult] = []
    traces: list[AllocationTrace] = []

    def limit_reached() -> str | None:
        if max_trials is not None and len(trials) >= max_trials:
            return f"limit of {max_trials} trial{'s' if max_trials > 1 else ''} reached"
        if max_seconds is not None and clock is not None and trials and clock() - started >= max_seconds:
            return f"limit of {max_seconds:g} s reached"
        return None

    def run(micro_batch: int) -> TrialResult:
        request = TrialRequest(micro_batch, timed_steps=timed_steps, record_allocations=budget_bytes is not None)
        trial = run_trial(request)
        if trial.micro_batch != micro_batch:
            raise ValueError(f"run_trial was asked for {micro_batch}. Received: {trial!r}")
        if trial.allocations is not None:
            traces.append(trial.allocations)
            trial = replace(trial, allocations=None)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
        return trial

    terms = Terms(
        budget_bytes=budget_bytes,
        fixed_bytes_hint=fixed_bytes_hint or 0,
        headroom_bytes=headroom_bytes,
        exact=exact,
        top_name=_top_name(target_batch, max_micro_batch),
        unlimited=target_batch is None and max_micro_batch is None and budget_bytes is None,
    )
    bracket = Bracket(_candidates(target_batch, max_micro_batch))
    if estimate_sample is not None and wants_estimate(bracket, terms):
        terms = replace(terms, estimate=estimate_sample())
    while True:
        proposal = propose(bracket, trials, terms)
        if isinstance(proposal, Stop):
            stopped_because = proposal.reason
            break
        if (reached := limit_reached()) is not None:
            stopped_because = reached
            break
        known = len(traces)
        trial = run(proposal.micro_batch)
        if isinstance(proposal, Run):
            bracket = bracket.observe(trial.micro_batch, fits=trial.fits)
        if len(traces) > known and budget_bytes is not None:
            told = _as_a_hint(
                functools.partial(_replayed, traces, trial, budget_bytes, bracket.candidates[-1], terms.estimate)
            )
            if told is not None:
                terms = replace(terms, replayed=told)

    if target_batch is not None and objective == "throughput" and limit_reached() is None:
        faster = _maybe_faster(bracket, trials)
        if faster is not None:
            run(faster)

    fit = fit_memory_model(trials, budget_bytes=budget_bytes, fixed_bytes_hint=fixed_bytes_hint)
    return SearchResult(
        largest_fit=bracket.largest_fit,
        smallest_failure=bracket.smallest_failure,
        trials=tuple(trials),
        memory_model=None if fit is None else fit.model,
        stopped_because=stopped_because,
    )


def _as_a_hint(replayed: Callable[[], int | None]) -> int | None:
    """What a replay tells; None where it could not be carried out, which is the same as one that is not believed."""
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
    """The largest size that fits where the newest trace, ``trial``'s, is replayed; None where that is not believed."""
    if not trial.fits:
        return None
    trace = traces[-1] if len(traces) == 1 else replay.between(traces[-2], traces[-1])
    again = replay.peak_bytes(trace, trace.micro_batch)
    if again is None or trial.peak_bytes is None or abs(again - trial.peak_bytes) > _REPLAYED_ALIKE * trial.peak_bytes:
        return None
    # Blocks that grow and are not known to would let any size fit: one buffer for all, as a compiler makes it.
    growth = sum(per_sample for _, per_sample in trace.sizes)
    held = sum(taken for _, taken in trace.held)
    risen = _LEAST_GROWTH * (trial.peak_bytes - held) / trial.micro_batch
    if growth < max(risen, 0.0 if estimate is None else estimate.sample_bytes):
        return None
    largest = replay.largest_that_fits(trace, budget_bytes, at_most=at_most)
    return largest if largest >= trial.micro_batch else None


def _candidates(target_batch: int | None, max_micro_batch: int | None) -> Sequence[int]:
    if target_batch is not None:
        return candidate_sizes(target_batch, max_micro_batch)
    return range(1, (max_micro_batch or FURTHEST) + 1)


def _top_name(target_batch: int | None, max_micro_batch: int | None) -> str:
    if target_batch is not None and (max_micro_batch is None or max_micro_batch >= target_batch):
        return "the target itself"
    if max_micro_batch is not None:
        return "the largest size allowed"
    return f"{FURTHEST}, the largest size that is ever tried,"


def _maybe_faster(bracket: Bracket, trials: Sequence[TrialResult]) -> int | None:
    """An untried candidate between the largest fit and a smaller size that passed more samples per second."""
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


def _require_positive(**arguments: float | None) -> None:
    for name, value in arguments.items():
        # No upper bound, and 0 is no way to say "none": None is.
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, or None. Received: {value!r}")
