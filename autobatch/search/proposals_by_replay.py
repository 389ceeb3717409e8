"""Choice of the size to run next where a trial's allocations were replayed (:mod:`autobatch.search.replay`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autobatch.records import TrialResult
from autobatch.search.bracket import Bracket
from autobatch.search.moves import CLOSE_TO_PREDICTION, COARSE, Run, SearchTerms, Stop, size_between

_REPLAY_AIM = 0.985
"""Share of the largest size that fits in a replay at which the next trial aims."""

_BELOW_REPLAY = 0.975
"""Share of the largest size that may still fit, run next after a size failed that the replay had predicted to fit."""

_REPLAY_FAILURES = 2
"""Most failed trials of a search in which the replay is still believed."""

_NEARLY_WITHIN = 1.03
"""Factor over the budget beyond which a measured peak proves the replay wrong; the line then chooses the size."""

_REPLAY_NEAR = 0.96
"""Share of the smallest failure that must fit in exact mode before the two sides of the bracket are bisected."""

_REPLAY_CREEP = 0.05
"""Part of the largest fit: two sizes that fit and are nearer than this are steps of the proof, which double."""


def by_replay(
    bracket: Bracket, low: int, edge: int, trials: Sequence[TrialResult], terms: SearchTerms
) -> Run | Stop | None:
    """Choose the next move towards ``edge``, the largest size that fits in the replay.

    The result is None where the replay was seen to be wrong; the line then chooses. A replay is right to a few per
    cent, because the addresses held before a trial are not quite the same each time.
    """
    high, untried = bracket.smallest_failure, bracket.untried
    if high is not None and edge >= high:
        failures = sum(not trial.fits for trial in trials)
        last = next(trial for trial in trials if trial.micro_batch == high)
        far_over = (last.peak_bytes or 0) > _NEARLY_WITHIN * (terms.budget_bytes or 0)
        if far_over or failures > _REPLAY_FAILURES:
            return None
        if terms.exact and low >= _REPLAY_NEAR * high:
            return Run(size_between(bracket, low, high))
        return Run(bracket.floor(math.ceil(_BELOW_REPLAY * (high - 1))))
    if terms.exact:
        if edge >= untried[0]:
            return Run(bracket.floor(edge))
        return Run(_beyond(bracket, low, trials))
    if low >= CLOSE_TO_PREDICTION * edge:
        return Stop(f"{low} fits, and no more than {edge} is predicted to: within 3 %")
    if edge < untried[0]:
        return Stop(f"the next useful size, {untried[0]}, is predicted not to fit")
    certain, possible = bracket.floor(math.floor(_REPLAY_AIM * edge)), bracket.floor(edge)
    # Where the margin would cost a whole candidate, the edge is worth the risk.
    return Run(possible if possible > COARSE * certain or certain > edge else certain)


def _beyond(bracket: Bracket, low: int, trials: Sequence[TrialResult]) -> int:
    """Return one more than fits, to be seen failing; where it keeps fitting, double the steps."""
    if bracket.smallest_failure is not None:
        return size_between(bracket, low, bracket.smallest_failure)
    fitting = sorted(trial.micro_batch for trial in trials if trial.fits)
    step = 2 * (low - fitting[-2]) if len(fitting) > 1 and low - fitting[-2] <= _REPLAY_CREEP * low else 1
    return bracket.floor(low + step) if step > 1 else bracket.untried[0]
