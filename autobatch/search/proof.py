"""Steps of a proof in exact mode: the size to run next so that few trials, and few failed ones, close the bracket.

A failed allocation waits ten seconds, and a trial that fits takes one or two. So the bracket is not cut in halves: with
few failures to spend, sizes are run from below. It is the egg-dropping problem (M. Sniedovich, "The joy of egg-dropping
in Braunschweig and Hong Kong", INFORMS Transactions on Education 4, 2003).
"""

from __future__ import annotations

from collections.abc import Sequence

from autobatch.records import TrialResult
from autobatch.search.bracket import Bracket

MOST_TRIALS = 6
"""Trials that a search led by a recording is to take, its first one and the proof included."""

MOST_FAILURES = 2
"""Failed ones that are to be among them."""

_TRIALS_MORE = 1
"""Trials beyond those of halving that are given for fewer failures, each time."""

_FINE = 1 / 400
"""Part of the largest fit that a prediction is not expected to be better than: the unit of steps beyond it."""

_CREEP = 0.05
"""Part of the largest fit: two sizes that fit and are nearer than this are steps of the proof."""


def decided(trials: int, failures: int) -> int:
    """Return the number of untried sizes among which so many trials find the largest, if so many of them may fail."""
    if trials <= 0 or failures <= 0:
        return 0
    return decided(trials - 1, failures - 1) + decided(trials - 1, failures) + 1


def between(bracket: Bracket, trials: Sequence[TrialResult]) -> int:
    """Return the size to run next of those between what fits and what does not."""
    untried = bracket.untried
    failures = max(1, MOST_FAILURES - _failed(trials))
    enough = len(untried).bit_length() + _TRIALS_MORE
    while decided(enough, failures) < len(untried):
        failures += 1
    needed = next(count for count in range(1, enough + 1) if decided(count, failures) >= len(untried))
    return untried[min(decided(needed - 1, failures - 1), len(untried) - 1)]


def beyond(bracket: Bracket, low: int, trials: Sequence[TrialResult]) -> int:
    """Return a size beyond ``low``, which fits and is the largest that was predicted to.

    The next one is run first: mostly it fails, which is the proof. Where it fits, a step is as long as the trials and
    failures allow that are left. Behind these, steps double, up to a twentieth of what fits.
    """
    fitting = sorted(trial.micro_batch for trial in trials if trial.fits)
    before = low - fitting[-2] if len(fitting) > 1 else low
    if before > _CREEP * low:
        return bracket.untried[0]
    sizes = decided(MOST_TRIALS - len(trials) - 1, MOST_FAILURES - _failed(trials) - 1)
    step = (1 + sizes) * max(1, int(_FINE * low)) if sizes else min(2 * before, int(_CREEP * low))
    return bracket.floor(low + step)


def _failed(trials: Sequence[TrialResult]) -> int:
    return sum(not trial.fits for trial in trials)
