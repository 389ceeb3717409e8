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
from autobatch.search.memory_model import fit_memory_model
from autobatch.search.moves import Run, SearchTerms, Stop
from autobatch.search.planning import candidate_sizes, require_objective, worth_one_shape
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
    *,
    target_batch: int | None,
    budget_bytes: int | None,
    headroom_bytes: int = 0,
    max_micro_batch: int | None = None,
    fixed_bytes_hint: int | None = None,
    estimate_sample: Callable[[], SampleEstimate | None] | None = None,
    exact: bool = False,
    objective: str = "throughput",
    one_shape: bool = False,
    max_trials: int | None = None,
    max_seconds: float | None = None,
    clock: Callable[[], float] | None = None,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> SearchResult:
    """Find the largest micro-batch that fits, by running a few sizes.

    First trial: the largest candidate, if that is at most 32 and the weights take at most half of the budget. It mostly
    fits, and is then the only trial. Where the weights alone fill the budget, it is the smallest candidate. Otherwise
    ``estimate_sample`` gives a rough figure of what a sample needs. The first trial is then 0.4 of what fits by that
    estimate, or a prime a little below. It is the largest candidate if twice that candidate fits by the estimate.
    Without an estimate it is a probe of 8.

    Next trials: where a trial recorded its allocations, its blocks are replayed at other sizes
    (:mod:`autobatch.search.replay`). The largest size that finds room for them, less a margin, comes next. Otherwise
    the bytes held before the first sample and the probe's peak make a line. The search runs the size that the line
    predicts to fit, and refines until a size fits that is within 3 % of the prediction.

    A prediction leaves room for half of the estimate's largest tensor, in the headroom if there is one: the free memory
    of a nearly full allocator is in pieces. No such room is left where it would cost a whole candidate of a target. A
    far prediction goes through a trial half-way; see :mod:`autobatch.search.proposals_by_line`.

    Number of trials, where the budget and the peaks are known:

    - A straight line whose fixed part is the hint, with an estimate that is wrong by less than a factor of 0.6 to 2.5:
      3 at the most, mostly 2. There is no failure if the allocator loses up to half of the largest tensor.
    - A straight line whose fixed part is the hint, without an estimate: 4 at the most, mostly 2 or 3. There is no
      failure unless the first trial fails (less than 8 fit, or a target up to 32 does not).
    - Any memory curve, however it bends: 8 led by the line, and up to 11 of bisection after those if some failed.
    - ``exact``, a straight line whose fixed part is the hint: 6 at the most, with 2 failures (3 where no more than one
      sample fits). With an estimate and above 200 samples there are one or two more.
    - ``exact``, any curve: 10 + 2 log2(n) for n candidates.

    Few models reach a budget that is all that the allocator has. Free memory is then in pieces, and sizes fail below
    the line's prediction: on a CPU from 0.86 of it on, where convolutions ask for large workspaces. After each such
    failure a smaller size is run.

    Without a budget, or where the allocator keeps no peak, the size doubles from the first trial on until it fails. It
    is then bisected, to 3 % or, if ``exact``, to the end: 2 log2(n) + 2 trials.

    Where not even one sample fits beside the headroom, but ran within ``budget_bytes + headroom_bytes``, the search
    goes on without headroom. The trials that ran so far then count by what they needed.

    With a target, only the distinct ``ceil(target_batch / k)`` are run. The search then also stops where the next of
    them is predicted not to fit. Under the objective "throughput" one more, smaller candidate is run where a smaller
    size was faster than the largest fit, and fewer than 4 trials were run.

    Args:
        run_trial: Runs one size and returns its outcome. Its exceptions are passed on.
        target_batch: The effective batch, None if there is none.
        budget_bytes: Upper bound on a peak, None if unknown.
        headroom_bytes: Memory that the allocator has beside the budget; what it loses in pieces may be lost there.
        max_micro_batch: The largest size worth trying.
        fixed_bytes_hint: A lower bound on every peak: weights, accumulators and optimizer slots.
        estimate_sample: Called at most once, before the first trial. The bytes that a sample adds to the peak choose
            the first trial; later they are a lower bound on the slope of a line (0.4 of them) or of a replay. The
            largest tensor's bytes decide how much room a prediction leaves.
        exact: Prove it: one more than the size returned (with a target: the next candidate) is run and fails.
        objective: "throughput" or "largest".
        one_shape: Each size is compiled by itself, so that under the objective "throughput" sizes that divide the
            target are preferred (see :mod:`autobatch.search.planning`). One more of them may be run at the end, in
            place of what training would compile.
        max_trials: Stop after this number of trials. The best that was run is returned.
        max_seconds: Start no trial later than this after the start, other than the first. Needs ``clock``.
        clock: Returns seconds from any origin, like ``time.monotonic``.
        on_trial: Called with each result as it comes.

    Returns:
        The result, whose ``largest_fit`` was run and fits. It is None where no size that was run fits. Then
        ``smallest_failure`` is 1, unless a limit stopped the search before.

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
    # Where no sizes compete for speed, nothing is timed beyond the steps that show that a size fits.
    timed_steps = 0 if target_batch is None or objective == "largest" else TIMED_STEPS
    trials: list[TrialResult] = []
    traces: list[AllocationTrace] = []
    headroom_given_up = False

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
        if headroom_given_up:
            trial = _judged_by(trial, terms.budget_bytes)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
        return trial

    terms = SearchTerms(
        budget_bytes=budget_bytes,
        fixed_bytes_hint=fixed_bytes_hint or 0,
        headroom_bytes=headroom_bytes,
        exact=exact,
        top_name=_top_name(target_batch, max_micro_batch),
        unlimited=target_batch is None and max_micro_batch is None and budget_bytes is None,
    )
    one_shape = one_shape and objective == "throughput" and not exact
    bracket = Bracket(_candidates(target_batch, max_micro_batch, one_shape=one_shape))
    if estimate_sample is not None and wants_estimate(bracket, terms):
        terms = replace(terms, estimate=estimate_sample())
    while True:
        proposal = propose(bracket, trials, terms)
        if isinstance(proposal, Stop) and bracket.largest_fit is None and not headroom_given_up:
            # That one sample is over the budget proves nothing about the limit itself.
            whole_limit = None if budget_bytes is None else budget_bytes + headroom_bytes
            trials[:] = [_judged_by(trial, whole_limit) for trial in trials]
            if any(trial.fits for trial in trials):
                headroom_given_up = True
                terms = replace(terms, budget_bytes=whole_limit, headroom_bytes=0)
                bracket = _observed(bracket.candidates, trials)
                continue
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
        if len(traces) > known and terms.budget_bytes is not None:
            told = _as_a_hint(
                functools.partial(_replayed, traces, trial, terms.budget_bytes, bracket.candidates[-1], terms.estimate)
            )
            if told is not None:
                last = traces[-1]
                terms = replace(terms, replayed=told, in_parallel=last.in_parallel, is_compiled=last.is_compiled)

    if target_batch is not None and objective == "throughput" and limit_reached() is None:
        faster = _maybe_faster(bracket, trials)
        if faster is not None:
            run(faster)
        if one_shape and bracket.largest_fit is not None and limit_reached() is None:
            dividing = worth_one_shape(trials, target_batch=target_batch)
            if dividing is not None:
                run(dividing)

    if headroom_given_up:
        stopped_because += "; the headroom was given up, since nothing fits beside it"
    fit = fit_memory_model(trials, budget_bytes=terms.budget_bytes, fixed_bytes_hint=fixed_bytes_hint)
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
    if again is None or trial.peak_bytes is None or abs(again - trial.peak_bytes) > _REPLAYED_ALIKE * trial.peak_bytes:
        logger.info("a replay is not believed: of %d samples it gives %s, and they took %s", *_told(trial, again))
        return None
    # Blocks whose growth goes unnoticed would let any size fit. A compiled program's own plan is no guess.
    growth = sum(per_sample for _, per_sample in trace.sizes)
    held = sum(taken for _, taken in trace.held)
    if trace.is_compiled:
        risen = 1.0
    elif estimate is not None:  # good to a factor of two
        risen = _LEAST_GROWTH * estimate.sample_bytes
    else:  # the rise of the peak, part of which may be workspaces
        risen = _LEAST_GROWTH * (trial.peak_bytes - held) / trial.micro_batch
    if growth < risen:
        logger.info("a replay is not believed: its blocks grow by %.0f bytes a sample, not by %.0f", growth, risen)
        return None
    largest = replay.largest_in_any_order(trace, budget_bytes, at_most=at_most)
    logger.debug("a replay of %d samples lets up to %d fit", trial.micro_batch, largest)
    return largest if largest >= trial.micro_batch else None


def _told(trial: TrialResult, again: int | None) -> tuple[int, str, str]:
    known = (again, trial.peak_bytes)
    first, second = ("no peak" if size is None else format_bytes(size) for size in known)
    return trial.micro_batch, first, second


def _candidates(target_batch: int | None, max_micro_batch: int | None, *, one_shape: bool) -> Sequence[int]:
    if target_batch is not None:
        return candidate_sizes(target_batch, max_micro_batch, one_shape=one_shape)
    return range(1, (max_micro_batch or FURTHEST) + 1)


def _top_name(target_batch: int | None, max_micro_batch: int | None) -> str:
    if target_batch is not None and (max_micro_batch is None or max_micro_batch >= target_batch):
        return "the target itself"
    if max_micro_batch is not None:
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


def _require_positive(**arguments: float | None) -> None:
    for name, value in arguments.items():
        # No upper bound, and 0 is no way to say "none": None is.
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, or None. Received: {value!r}")
