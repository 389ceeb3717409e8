"""Choice of the size to run next, or the reason to stop: a pure function of the bracket and the trials so far.

:func:`autobatch.search.driver.search` states how many trials the rules add up to. A :class:`Run` is always an untried
candidate of the bracket. A :class:`Measure` lies below what fits already, is cheap, and moves nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from autobatch.records import MemoryModel, Outcome, SampleEstimate, TrialResult
from autobatch.search.bracket import Bracket, Stage
from autobatch.search.memory_model import Fit, fit_memory_model, largest_within, least_peak_bytes
from autobatch.search.moves import CLOSE_TO_PREDICTION, COARSE, Measure, Run, SearchTerms, Stop, size_between
from autobatch.search.proposals_by_replay import by_replay
from autobatch.units import format_bytes

# The constants below were chosen by simulation over ten shapes of curve; the optimum is flat around each. The trials of
# real models (benchmarks/search_cost.py), which bend more at the start and end raggedly, were replayed as well.

FIRST_PROBE = 8
"""First size without an estimate: small enough to fail rarely, large enough that samples weigh beside the weights."""

_FIRST_SHARE = 0.4
"""Share of what is estimated to fit that is run first: the estimate is good to a factor of two."""

_OF_COMPILED = 0.5
"""Factor on the shares of an estimate that are relied on where XLA compiles the step. On a CPU a sample then needed 0.7
to 7 times what was estimated, over nine models."""

_FIRST_COMPILED = (0.05, 16)
"""Share of what is estimated to fit that is run first where XLA compiles the step, and the number of samples below
which that does not make it smaller. A small first trial costs nothing there: the program's plan shows from it as well
what any size needs (:mod:`autobatch.memory.compiled_growth`)."""

_SMALL_ROOM = 0.05
"""Share of the budget that is taken to be left for samples where hint and workspaces fill it."""

_TELLING_FROM = 0.7
"""Share of the first size down to which a prime is run in its place."""

_TELLING_FROM_COMPILED = 0.4
"""Share of the first size down to which a prime is run in its place where XLA compiles the step."""

_SURE = 2.0
"""Multiple of the largest candidate that must be estimated to fit for that candidate to be run first; more of it where
XLA compiles the step."""

SMALL_TOP = 32
"""Limit up to which the largest candidate itself is the first trial: it mostly fits, and is then the only one."""

CLOSE_ENOUGH = 0.97
"""Share of what can fit that a size must reach for the search to stop, unless it is exact."""

MODEL_TRIALS = 8
"""Number of trials after which the line has misled too often, and only the bracket is believed."""

_AIM = 0.9775
"""Share of what is predicted to fit at which the next trial aims. A failure is expensive, and an allocator that is
nearly full often fails although the bytes would do, because no free piece is large enough."""

_PIECE = 0.5
"""Part of its largest tensor that a safe size must leave free, beside what it is predicted to need: the free memory of
a nearly full allocator is in pieces. An allocator fails earlier the fewer and larger the tensors are."""

_LEAST_OF_ESTIMATE = 0.4
"""Least slope that is believed, as a part of the estimate: where a line is flatter, workspaces hide the samples."""

_EDGE_SHARE = 0.25
"""Part of the way from the largest safe size to the line's own end, run first once the safe sizes are exhausted."""

_NEARLY_SAFE = 1.01
"""Factor over the largest fit below which the largest safe size is no longer worth a trial in exact mode."""

_EXACT_NEAR = 1.25
"""Factor of growth below which a prediction gets no margin in exact mode."""

_CHORD_REACH = 64
"""Multiple of its own size up to which a single probe is trusted to predict."""

_FAR_STEEPER = 4.0
"""Factor of error in the slope that the next size must survive where a single probe would have to predict too far."""

_SECANT_REACH = (0.25, 1.5)
"""Further rise of the peak, as a part of the rise between a secant's two points, that the secant may predict. Up to the
first figure it is trusted outright, beyond the second not at all; in between the slope goes over to the chord's. Where
small sizes are ruled by workspaces, the bend lies between the two points, and the secant promises too much."""

_STRAIGHT_REACH = (2.0, 4.0)
"""Reach as the one above, of a secant on which a third, smaller measurement lies."""

_FAR_GROWTH = 3.0
"""Factor by which a distrusted line still lets the size grow, or half-way to where it leads if that is less. Otherwise
weights that fill most of the budget would make the size crawl."""

_NEAR_CHORD = 1.3
"""Factor of growth by one probe and the hint below which a second, smaller probe is run, to give a real slope."""

_ONE_SAMPLE = 0.5
"""Part of one sample's predicted bytes that must be left for a second sample to be worth a try. The hint is a lower
bound, so the prediction says little of what a second one needs; no smaller size can be run to improve it."""

_BELOW_FAILURE = 0.65
"""Part of the way from what fits to a predicted size that failed, at which the next size lies."""

_BELOW_FAILURES = 0.4
"""Part of the way from what fits to a predicted size that failed, for the next size after two failures in a row."""

_BELOW_FIRST_FAILURE = 0.6
"""Share of the size allowed by the bytes that a first failure names, run next: those bytes are a lower bound."""


def propose(bracket: Bracket, trials: Sequence[TrialResult], terms: SearchTerms) -> Run | Measure | Stop:
    """Choose the next step of a search in this state."""
    low, high = bracket.largest_fit, bracket.smallest_failure
    if bracket.stage is Stage.UNTRIED:
        return Run(_first_probe(bracket, terms))
    if low is None:
        if bracket.is_closed:
            timed_out = trials[-1].outcome is Outcome.TIMED_OUT
            return Stop("not even a micro-batch of 1 " + ("ended in time" if timed_out else "fits"))
        return Run(_below_first_failure(bracket, trials, terms))
    if bracket.is_closed:
        return Stop(f"{terms.top_name} fits" if high is None else f"proven: {low} fits, {high} does not")
    if not terms.exact and high is not None and low >= CLOSE_ENOUGH * bracket.untried[-1]:
        return Stop(f"{low} fits and {high} does not: within 3 %")
    fit = fit_memory_model(trials, budget_bytes=terms.budget_bytes, fixed_bytes_hint=terms.fixed_bytes_hint)
    if terms.budget_bytes is None or fit is None or fit.anchor.micro_batch != low:
        return _by_outcomes(bracket, low, trials, terms)
    if terms.replayed is not None and len(trials) < MODEL_TRIALS:
        proposal = by_replay(bracket, low, max(low, terms.replayed), trials, terms)
        if proposal is not None:
            return proposal
    return _by_model(bracket, low, trials, terms, fit, terms.budget_bytes)


def wants_estimate(bracket: Bracket, terms: SearchTerms) -> bool:
    """Return True if a rough estimate of what a sample adds to the peak would improve the choice of the first trial."""
    budget = terms.budget_bytes
    return budget is not None and terms.fixed_bytes_hint < budget and not _runs_top_first(bracket, terms)


def _runs_top_first(bracket: Bracket, terms: SearchTerms) -> bool:
    # Where weights alone take more than half, a small top is no longer likely to fit.
    budget = terms.budget_bytes
    return bracket.candidates[-1] <= SMALL_TOP and (budget is None or terms.fixed_bytes_hint <= budget / 2)


def _first_probe(bracket: Bracket, terms: SearchTerms) -> int:
    budget, top = terms.budget_bytes, bracket.candidates[-1]
    if budget is not None and terms.fixed_bytes_hint >= budget:
        return bracket.candidates[0]
    if _runs_top_first(bracket, terms):
        return top
    if budget is None or terms.estimate is None:
        return bracket.floor(FIRST_PROBE)
    room = budget - terms.fixed_bytes_hint - terms.estimate.workspace_bytes
    # What an operation finds no room for may wait for that of another, so that the workspace is no certain need.
    fitting = max(room, _SMALL_ROOM * budget) / terms.estimate.sample_bytes
    relied_on = _relied_on(terms.estimate)
    if relied_on * fitting >= _SURE * top:
        return top
    first = relied_on * _FIRST_SHARE * fitting
    if not terms.estimate.is_compiled:
        return _telling(bracket, int(min(first, top / 2)))
    share, least = _FIRST_COMPILED
    return _telling(bracket, int(min(first, max(share * fitting, least), top / 2)), _TELLING_FROM_COMPILED)


def _relied_on(estimate: SampleEstimate) -> float:
    return _OF_COMPILED if estimate.is_compiled else 1.0


def _telling(bracket: Bracket, most: int, telling_from: float = _TELLING_FROM) -> int:
    """Return a candidate up to ``most``, a prime if there is one nearby: it shows which blocks grow with the size."""
    largest = bracket.floor(most)
    candidates = bracket.untried
    near = candidates[bisect_left(candidates, telling_from * largest) : bisect_right(candidates, largest)]
    primes = (size for size in reversed(near) if all(size % divisor for divisor in range(2, math.isqrt(size) + 1)))
    return next(primes, largest)


def _below_first_failure(bracket: Bracket, trials: Sequence[TrialResult], terms: SearchTerms) -> int:
    failed = trials[-1]
    guess = failed.micro_batch / 4
    if terms.budget_bytes is not None:
        least = least_peak_bytes(failed, terms.budget_bytes, terms.fixed_bytes_hint)
        room = terms.budget_bytes - terms.fixed_bytes_hint
        if least is not None and least > terms.budget_bytes + 1 and room > 0:
            allowed = failed.micro_batch * room / (least - terms.fixed_bytes_hint)
            # A whole peak says more than the one allocation that failed: others would have followed that one.
            guess = min(_BELOW_FIRST_FAILURE * allowed, failed.micro_batch / (2 if failed.peak_bytes else 4))
    return bracket.floor(int(guess))


def _by_outcomes(bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: SearchTerms) -> Run | Stop:
    if bracket.smallest_failure is not None:
        return Run(size_between(bracket, low, bracket.smallest_failure))
    if terms.unlimited and _is_saturated(trials):
        return Stop("no limit is known, and two doublings made it less than 5 % faster")
    return Run(bracket.floor(2 * low))


def _is_saturated(trials: Sequence[TrialResult]) -> bool:
    fitting = sorted((trial for trial in trials if trial.fits), key=lambda trial: trial.micro_batch)
    rates = [rate for trial in fitting[-3:] if (rate := trial.samples_per_second) is not None]
    return len(rates) == 3 and rates[2] < 1.05 * rates[0]


def _by_model(
    bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: SearchTerms, fit: Fit, budget: int
) -> Run | Measure | Stop:
    high, untried = bracket.smallest_failure, bracket.untried
    beyond = _beyond_caution(bracket, low, trials, terms, fit, budget)
    if beyond is not None:
        return Run(beyond)
    if len(trials) >= MODEL_TRIALS:
        if high is not None:
            return Run(size_between(bracket, low, high))
        if terms.exact:
            # Steps that double, whatever the line says: a curve that creeps must not be followed one by one.
            return Run(bracket.floor(low + (1 << (len(trials) - MODEL_TRIALS))))
    elif high is not None and not fit.is_interpolation and fit.model.peak_bytes(high) <= budget:
        return Run(_below_failure(bracket, low, high, trials, terms, fit, budget))
    if low == 1 and high is None and fit.is_chord and terms.estimate is not None:
        # One sample's peak may be nearly all workspace, which more samples share: the traced step tells the samples.
        more = _FIRST_SHARE * (budget - fit.anchor.peak_bytes) / terms.estimate.sample_bytes
        if more >= _FIRST_SHARE:
            return Run(_telling(bracket, min(FIRST_PROBE, 1 + int(more))))
    reach = _reach(bracket, fit, terms, budget)
    only_probe = all(trial.micro_batch >= low for trial in trials)
    if only_probe and low > 1 and fit.is_chord and reach < min(_NEAR_CHORD * low, untried[-1]):
        return Measure(bracket.candidates[bisect_right(bracket.candidates, low // 2) - 1])
    if reach < untried[0]:
        second_may_fit = fit.anchor.peak_bytes + _ONE_SAMPLE * fit.chord_bytes <= budget
        if low == 1 and fit.is_chord and second_may_fit:
            return Run(untried[0])
        if terms.exact:
            return Run(_proof(bracket, low, trials, terms, budget))
        return Stop(
            f"the next useful size, {untried[0]}, is predicted to need "
            f"{format_bytes(_cautious(fit, terms).peak_bytes(untried[0]))} of {format_bytes(budget)}"
        )
    if not terms.exact and low >= CLOSE_TO_PREDICTION * reach:
        return Stop(f"{low} fits, and no more than {reach} is predicted to: within 3 %")
    if len(trials) >= MODEL_TRIALS:
        return Stop(f"{len(trials)} trials gave no line to trust; more than {low} may fit")
    return Run(_aim(bracket, low, _trusted(fit, low, reach, budget), terms, fit, budget))


def _cautious(fit: Fit, terms: SearchTerms) -> MemoryModel:
    """Return the line through the largest fit, no flatter than the estimate allows, with room for memory in pieces."""
    if terms.estimate is None:
        return fit.model
    lost_bytes = _PIECE * terms.estimate.largest_tensor_bytes
    least = _LEAST_OF_ESTIMATE * _relied_on(terms.estimate) * terms.estimate.sample_bytes
    slope = max(fit.model.per_sample_bytes, least)
    fixed = fit.anchor.peak_bytes - slope * fit.anchor.micro_batch
    return MemoryModel(min(fixed, fit.model.fixed_bytes), slope + lost_bytes)


def _safe(fit: Fit, terms: SearchTerms, budget: int, at_most: int) -> int:
    """Return the largest size that is predicted to fit with room to spare; that room may lie in the headroom."""
    edge = largest_within(fit.model, budget, at_most=at_most)
    return min(edge, largest_within(_cautious(fit, terms), budget + terms.headroom_bytes, at_most=at_most))


def _reach(bracket: Bracket, fit: Fit, terms: SearchTerms, budget: int) -> int:
    """Return the largest size predicted to fit: with room to spare, unless that would cost a whole candidate."""
    most = bracket.untried[-1]
    edge = largest_within(fit.model, budget, at_most=most)
    if terms.estimate is None:
        return edge
    safe = _safe(fit, terms, budget, most)
    low = bracket.largest_fit or 0
    next_above = bracket.floor(edge) if edge >= bracket.untried[0] else edge
    below = max((low, *bracket.untried[: bisect_right(bracket.untried, safe)][-1:]))
    return edge if COARSE * below < next_above and below < CLOSE_ENOUGH * safe else safe


def _beyond_caution(
    bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: SearchTerms, fit: Fit, budget: int
) -> int | None:
    """Return the size to run in exact mode once the safe sizes are exhausted.

    The result is None before that, in default mode, without an estimate, or with no slope but a chord's. It is also
    None where the line itself predicts no larger size to fit.
    """
    if not terms.exact or terms.estimate is None or fit.is_chord:
        return None
    top = bracket.untried[-1]
    safe = max(low, _safe(fit, terms, budget, top))
    if safe >= _NEARLY_SAFE * low + 1:
        return None
    edge = largest_within(fit.model, budget, at_most=top)
    if edge <= low:
        return None
    if bracket.smallest_failure is not None and edge >= top:
        return size_between(bracket, low, bracket.smallest_failure)
    before = fit_memory_model(trials[:-1], budget_bytes=budget, fixed_bytes_hint=terms.fixed_bytes_hint)
    if before is not None and low > largest_within(_cautious(before, terms), budget, at_most=top):
        return bracket.floor(edge)  # a step beyond caution has just fitted
    return bracket.floor(max(low + 1, safe + int(_EDGE_SHARE * (edge - safe))))


def _below_failure(
    bracket: Bracket, low: int, high: int, trials: Sequence[TrialResult], terms: SearchTerms, fit: Fit, budget: int
) -> int:
    """Return the size to run next after ``high`` failed although the line predicts it to fit."""
    if terms.estimate is not None and fit.is_chord and len(trials) == 2:
        # A chord is too steep rather than too flat, and room was left: a size that failed all the same lacked little.
        return bracket.floor(math.ceil(CLOSE_ENOUGH * (high - 1)))
    share = _BELOW_FAILURE if len(trials) < 2 or trials[-2].fits or trials[-1].fits else _BELOW_FAILURES
    guess = int(low + share * (high - low))
    failed = next(trial for trial in trials if trial.micro_batch == high)
    least = least_peak_bytes(failed, budget, terms.fixed_bytes_hint)
    if least is not None and least > budget + 1:
        per_sample = (least - fit.anchor.peak_bytes) / (high - low)
        steeper = MemoryModel(fit.anchor.peak_bytes - per_sample * low, per_sample)
        guess = min(guess, largest_within(steeper, budget, at_most=high))
    return bracket.floor(guess)


def _proof(bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: SearchTerms, budget: int) -> int:
    """Return one more than fits, to be seen failing; where that has just fitted, against the line, double the steps."""
    if trials[-1].micro_batch == low:
        before = fit_memory_model(trials[:-1], budget_bytes=budget, fixed_bytes_hint=terms.fixed_bytes_hint)
        if before is not None and before.model.peak_bytes(low) > budget:
            return bracket.floor(low + 2 * (low - before.anchor.micro_batch))
    return bracket.untried[0]


def _trusted(fit: Fit, low: int, reach: int, budget: int) -> int:
    """Return the size up to ``reach`` to which the line may be believed in a single step."""
    room, slope = budget - fit.anchor.peak_bytes, fit.model.per_sample_bytes
    if fit.is_interpolation:
        return reach
    if fit.is_chord:
        if reach <= _CHORD_REACH * low:
            return reach
        steeper = _FAR_STEEPER * slope
    else:
        outright, never = _STRAIGHT_REACH if fit.is_straight else _SECANT_REACH
        seen = max(1, fit.anchor.peak_bytes - fit.other.peak_bytes)
        doubt = min(1.0, max(0.0, (room / seen - outright) / (never - outright)))
        steeper = slope + doubt * max(0.0, fit.chord_bytes - slope)
    if fit.bends_between:
        return min(reach, int(low + room / max(slope, fit.chord_bytes)))
    if steeper * (reach - low) <= room:
        return reach
    no_crawl = min(int(_FAR_GROWTH * low), (low + reach) // 2)
    return min(reach, max(int(low + room / steeper), no_crawl))


def _aim(bracket: Bracket, low: int, trusted: int, terms: SearchTerms, fit: Fit, budget: int) -> int:
    """Return a candidate a little below ``trusted``, unless the budget is far away or the candidates are far apart."""
    edge = bracket.floor(trusted)
    if terms.estimate is not None:
        return edge  # it leaves a margin for the largest tensor already
    # Exact mode must run the edge itself sooner or later.
    if (terms.exact and trusted < _EXACT_NEAR * low) or fit.model.peak_bytes(edge) <= _AIM * budget:
        return edge
    safe = bracket.floor(math.ceil(_AIM * trusted))
    # Where the margin would cost a whole candidate and the line comes from nearby, the edge is worth the risk.
    if safe < CLOSE_ENOUGH * edge and edge < 1.5 * low:
        return edge
    return safe
