"""Which size to run next, or why to stop: a pure function of the bracket and the trials so far.

What the rules add up to, in trials, stands in :func:`autobatch.search.driver.search`. A :class:`Run` is an untried
candidate of the bracket, always; a :class:`Measure` lies below what fits already, is cheap, and moves nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from autobatch.records import MemoryModel, Outcome, TrialResult
from autobatch.search.bracket import Bracket, Stage
from autobatch.search.memory_model import Fit, fit_memory_model, largest_within, least_peak_bytes
from autobatch.search.moves import CLOSE_TO_PREDICTION, COARSE, Measure, Run, Stop, Terms, between
from autobatch.search.proposals_by_replay import by_replay
from autobatch.units import format_bytes

# The constants below were chosen by simulation over ten shapes of curve, where the optimum is flat around each, and by
# replaying the trials of real models (benchmarks/search_cost.py), which bend more at the start and end raggedly.

FIRST_PROBE = 8
"""Small enough that it rarely fails, large enough that samples weigh something beside the weights."""

_FIRST_SHARE = 0.4
"""How much of what is estimated to fit is run first: the estimate is good to a factor of two."""

_TELLING_FROM = 0.7
"""A prime may be so much smaller than what was to be run first."""

_SURE = 2.0
"""The top is run first where so many times its size are estimated to fit."""

SMALL_TOP = 32
"""Up to here the top itself is the first trial: it mostly fits, and then one trial is all."""

CLOSE_ENOUGH = 0.97
"""Default mode stops once what fits is this much of what can fit."""

MODEL_TRIALS = 8
"""From so many trials on, the line has misled too often, and only the bracket is believed."""

_AIM = 0.9775
"""A prediction aims at the least size that is this much of what is predicted to fit: a failure is expensive, and an
allocator that is nearly full often fails although the bytes would do, because no free piece is large enough."""

_PIECE = 0.5
"""How much of its largest tensor a size must leave free, beside what it is predicted to need, to be taken for safe:
free memory is in pieces by then. An allocator fails earlier the fewer and larger the tensors are."""

_LEAST_OF_ESTIMATE = 0.4
"""A line that is flatter than this part of the estimate is not believed: workspaces hide what samples need."""

_EDGE_SHARE = 0.25
"""How far from the last safe size to where the line itself leads the edge is looked for first."""

_NEARLY_SAFE = 1.01
"""Safe sizes are behind where they go on for less than this."""

_EXACT_NEAR = 1.25
"""In exact mode there is no margin for a prediction of less than this factor of growth."""

_CHORD_REACH = 64
"""A single probe is not trusted to predict further than this many times its size ..."""

_FAR_STEEPER = 4.0
"""... beyond it, the next trial is to fit even if the slope is this many times steeper."""

_SECANT_REACH = (0.25, 1.5)
"""A secant is trusted outright to predict a further rise of this part of what it has seen itself, and beyond the second
figure not at all: where small sizes are ruled by workspaces, the bend lies between the two points, and the secant
promises too much. In between the slope goes over to the chord's."""

_FAR_GROWTH = 3.0
"""A distrusted line still lets the size grow by this factor, or half-way to where it leads if that is less, or else
weights that fill most of the budget make it crawl."""

_NEAR_CHORD = 1.3
"""Where one probe and the hint leave less than this factor of growth, a second, smaller probe gives a real slope."""

_ONE_SAMPLE = 0.5
"""One sample's peak over a hint that is a lower bound tells little of what a second one needs, and no smaller size can
tell more. If this part of it is left, a second one is worth a try."""

_BELOW_FAILURE = 0.65
"""Where a predicted size failed, the next lies this far from what fits to what failed."""

_BELOW_FAILURES = 0.4
"""The same where the one before it failed too."""

_BELOW_FIRST_FAILURE = 0.6
"""How much of what the bytes named by a first failure would allow is tried next: they are a lower bound."""


def propose(bracket: Bracket, trials: Sequence[TrialResult], terms: Terms) -> Run | Measure | Stop:
    """The next step of a search in this state."""
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


def wants_estimate(bracket: Bracket, terms: Terms) -> bool:
    """Whether the first trial would be chosen better if it were known, roughly, what a sample adds to the peak."""
    budget = terms.budget_bytes
    return budget is not None and terms.fixed_bytes_hint < budget and not _runs_top_first(bracket, terms)


def _runs_top_first(bracket: Bracket, terms: Terms) -> bool:
    # Where weights alone take more than half, a small top is no longer likely to fit.
    budget = terms.budget_bytes
    return bracket.candidates[-1] <= SMALL_TOP and (budget is None or terms.fixed_bytes_hint <= budget / 2)


def _first_probe(bracket: Bracket, terms: Terms) -> int:
    budget, top = terms.budget_bytes, bracket.candidates[-1]
    if budget is not None and terms.fixed_bytes_hint >= budget:
        return bracket.candidates[0]
    if _runs_top_first(bracket, terms):
        return top
    if budget is None or terms.estimate is None:
        return bracket.floor(FIRST_PROBE)
    fitting = (budget - terms.fixed_bytes_hint) / terms.estimate.sample_bytes
    if fitting >= _SURE * top:
        return top
    return _telling(bracket, int(min(_FIRST_SHARE * fitting, top / 2)))


def _telling(bracket: Bracket, most: int) -> int:
    """A candidate up to ``most``, a prime if there is one nearby: what grows with it is told from what does not."""
    largest = bracket.floor(most)
    candidates = bracket.untried
    near = candidates[bisect_left(candidates, _TELLING_FROM * largest) : bisect_right(candidates, largest)]
    primes = (size for size in reversed(near) if all(size % divisor for divisor in range(2, math.isqrt(size) + 1)))
    return next(primes, largest)


def _below_first_failure(bracket: Bracket, trials: Sequence[TrialResult], terms: Terms) -> int:
    failed = trials[-1]
    guess = failed.micro_batch / 4
    if terms.budget_bytes is not None:
        least = least_peak_bytes(failed, terms.budget_bytes, terms.fixed_bytes_hint)
        room = terms.budget_bytes - terms.fixed_bytes_hint
        if least is not None and least > terms.budget_bytes + 1 and room > 0:
            allowed = failed.micro_batch * room / (least - terms.fixed_bytes_hint)
            # A whole peak says more than the one allocation that failed, which others would have followed.
            guess = min(_BELOW_FIRST_FAILURE * allowed, failed.micro_batch / (2 if failed.peak_bytes else 4))
    return bracket.floor(int(guess))


def _by_outcomes(bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: Terms) -> Run | Stop:
    if bracket.smallest_failure is not None:
        return Run(between(bracket, low, bracket.smallest_failure))
    if terms.unlimited and _is_saturated(trials):
        return Stop("no limit is known, and two doublings made it less than 5 % faster")
    return Run(bracket.floor(2 * low))


def _is_saturated(trials: Sequence[TrialResult]) -> bool:
    fitting = sorted((trial for trial in trials if trial.fits), key=lambda trial: trial.micro_batch)
    rates = [rate for trial in fitting[-3:] if (rate := trial.samples_per_second) is not None]
    return len(rates) == 3 and rates[2] < 1.05 * rates[0]


def _by_model(
    bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: Terms, fit: Fit, budget: int
) -> Run | Measure | Stop:
    high, untried = bracket.smallest_failure, bracket.untried
    beyond = _beyond_caution(bracket, low, trials, terms, fit, budget)
    if beyond is not None:
        return Run(beyond)
    if len(trials) >= MODEL_TRIALS:
        if high is not None:
            return Run(between(bracket, low, high))
        if terms.exact:
            # Steps that double, whatever the line says: a curve that creeps must not be followed one by one.
            return Run(bracket.floor(low + (1 << (len(trials) - MODEL_TRIALS))))
    elif high is not None and not fit.is_interpolation and fit.model.peak_bytes(high) <= budget:
        return Run(_below_failure(bracket, low, high, trials, terms, fit, budget))
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


def _cautious(fit: Fit, terms: Terms) -> MemoryModel:
    """The line through the largest fit, not flatter than the estimate allows, and room for what is lost in pieces."""
    if terms.estimate is None:
        return fit.model
    lost_bytes = _PIECE * terms.estimate.largest_tensor_bytes
    slope = max(fit.model.per_sample_bytes, _LEAST_OF_ESTIMATE * terms.estimate.sample_bytes)
    fixed = fit.anchor.peak_bytes - slope * fit.anchor.micro_batch
    return MemoryModel(min(fixed, fit.model.fixed_bytes), slope + lost_bytes)


def _safe(fit: Fit, terms: Terms, budget: int, at_most: int) -> int:
    """The largest size that is predicted to fit with room to spare, which may lie in the headroom."""
    edge = largest_within(fit.model, budget, at_most=at_most)
    return min(edge, largest_within(_cautious(fit, terms), budget + terms.headroom_bytes, at_most=at_most))


def _reach(bracket: Bracket, fit: Fit, terms: Terms, budget: int) -> int:
    """The largest size that is predicted to fit: with room to spare, unless that would cost a whole candidate."""
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
    bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: Terms, fit: Fit, budget: int
) -> int | None:
    """Where exact mode goes on once the safe sizes are behind it; None before that, and where the line ends too."""
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
        return between(bracket, low, bracket.smallest_failure)
    before = fit_memory_model(trials[:-1], budget_bytes=budget, fixed_bytes_hint=terms.fixed_bytes_hint)
    if before is not None and low > largest_within(_cautious(before, terms), budget, at_most=top):
        return bracket.floor(edge)  # a step beyond caution has just fitted
    return bracket.floor(max(low + 1, safe + int(_EDGE_SHARE * (edge - safe))))


def _below_failure(
    bracket: Bracket, low: int, high: int, trials: Sequence[TrialResult], terms: Terms, fit: Fit, budget: int
) -> int:
    """The line says that ``high`` fits, and it was seen not to."""
    if terms.estimate is not None and fit.is_chord and len(trials) == 2:
        # A chord is too steep rather than too flat, and room was left: what failed all the same failed for little.
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


def _proof(bracket: Bracket, low: int, trials: Sequence[TrialResult], terms: Terms, budget: int) -> int:
    """One more than fits, to be seen failing; where that has just fitted, against the line, the steps double."""
    if trials[-1].micro_batch == low:
        before = fit_memory_model(trials[:-1], budget_bytes=budget, fixed_bytes_hint=terms.fixed_bytes_hint)
        if before is not None and before.model.peak_bytes(low) > budget:
            return bracket.floor(low + 2 * (low - before.anchor.micro_batch))
    return bracket.untried[0]


def _trusted(fit: Fit, low: int, reach: int, budget: int) -> int:
    """How far towards ``reach`` the line may be believed in a single step."""
    room, slope = budget - fit.anchor.peak_bytes, fit.model.per_sample_bytes
    if fit.is_interpolation:
        return reach
    if fit.is_chord:
        if reach <= _CHORD_REACH * low:
            return reach
        steeper = _FAR_STEEPER * slope
    else:
        outright, never = _SECANT_REACH
        seen = max(1, fit.anchor.peak_bytes - fit.other.peak_bytes)
        doubt = min(1.0, max(0.0, (room / seen - outright) / (never - outright)))
        steeper = slope + doubt * max(0.0, fit.chord_bytes - slope)
    if fit.bends_between:
        return min(reach, int(low + room / max(slope, fit.chord_bytes)))
    if steeper * (reach - low) <= room:
        return reach
    no_crawl = min(int(_FAR_GROWTH * low), (low + reach) // 2)
    return min(reach, max(int(low + room / steeper), no_crawl))


def _aim(bracket: Bracket, low: int, trusted: int, terms: Terms, fit: Fit, budget: int) -> int:
    """A candidate a little below ``trusted``, unless the budget is far away or the candidates are far apart."""
    edge = bracket.floor(trusted)
    if terms.estimate is not None:
        return edge  # a margin for the largest tensor is in it already
    # The edge itself is what exact mode asks for, and must be run sooner or later.
    if (terms.exact and trusted < _EXACT_NEAR * low) or fit.model.peak_bytes(edge) <= _AIM * budget:
        return edge
    safe = bracket.floor(math.ceil(_AIM * trusted))
    # Where the margin would cost a whole candidate and the line comes from nearby, the edge is worth the risk.
    if safe < CLOSE_ENOUGH * edge and edge < 1.5 * low:
        return edge
    return safe
