"""Choice of the size to run next where a trial's allocations were replayed (:mod:`autobatch.search.replay`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autobatch.records import TrialResult
from autobatch.search import proof
from autobatch.search.bracket import Bracket
from autobatch.search.moves import CLOSE_TO_PREDICTION, COARSE, Run, SearchTerms, Stop

_REPLAY_AIM = 0.985
"""Share of the largest size that fits in a replay at which the next trial aims."""

_BELOW_REPLAY = 0.975
"""Share of the largest size that may still fit, run next after a size failed that the replay had predicted to fit."""

_BELOW_FIRST_EXACT = 0.99
"""Share as the one above, after a first failure in exact mode: the size that is looked for is mostly just below, and
each size between the two is run for itself."""

_BELOW_UNSURE_REPLAY = (0.92, 0.85)
"""Shares as the one above, after a first failure and a second, where operations run side by side: what fits then
differs from run to run."""

_CLOSE_TO_UNSURE = (0.9, 0.8)
"""Share of the smallest failure that must fit, after one failure and after more, for the search to stop where
operations run side by side, unless it is exact: nearer sizes would fit at one time and fail at another."""

_BELOW_COMPILED = 0.9
"""Share as :data:`_BELOW_REPLAY` for a compiled program, at which the search also stops unless it is exact. The need of
its one block is known. If it fails, the largest free piece is smaller than was told, mostly by several per cent: sizes
just below fail too."""

_ROOM_LEFT = 0.85
"""Share of the budget below which a peak leaves much of it: a size beyond the replay's edge is then worth a trial."""

_OF_ROOM_LEFT = 0.92
"""Share of the budget that such a size would need if all that was needed grew with the samples."""

_REPLAY_FAILURES = 2
"""Most failed trials of a search in which the replay is still believed."""

_NEARLY_WITHIN = 1.03
"""Factor over the budget beyond which a measured peak proves the replay wrong; the line then chooses the size."""

_REPLAY_NEAR = 0.96
"""Share of the smallest failure that must fit in exact mode before the two sides of the bracket are bisected."""


def by_replay(
    bracket: Bracket, low: int, edge: int, trials: Sequence[TrialResult], terms: SearchTerms
) -> Run | Stop | None:
    """Choose the next move towards ``edge``, the largest size that fits in the replay.

    The result is None where the replay was seen to be wrong; the line then chooses. A replay is right to a few per
    cent, because the addresses held before a trial are not quite the same each time.
    """
    high, untried = bracket.smallest_failure, bracket.untried
    failures = sum(not trial.fits for trial in trials)
    if high is not None and terms.in_parallel and not terms.exact:
        enough = _CLOSE_TO_UNSURE[min(failures, len(_CLOSE_TO_UNSURE)) - 1] * high
        if low >= enough:
            return Stop(f"{low} fits and {high} does not; between them it depends on what runs side by side")
    if high is not None and terms.is_compiled and not terms.exact and low >= _BELOW_COMPILED * (high - 1):
        return Stop(f"{low} fits and {high} does not; between them it depends on where free memory lies")
    if high is not None and edge >= high:
        last = next(trial for trial in trials if trial.micro_batch == high)
        far_over = (last.peak_bytes or 0) > _NEARLY_WITHIN * (terms.budget_bytes or 0)
        if far_over or failures > _REPLAY_FAILURES:
            return None
        if terms.exact and low >= _REPLAY_NEAR * high:
            return Run(proof.between(bracket, trials))
        if terms.exact and failures == 1:
            return Run(bracket.floor(math.ceil(_BELOW_FIRST_EXACT * (high - 1))))
        if terms.is_compiled and not terms.exact:
            return Run(bracket.floor(math.ceil(_BELOW_COMPILED * (high - 1))))
        if not terms.in_parallel:
            return Run(bracket.floor(math.ceil(_BELOW_REPLAY * (high - 1))))
        return Run(bracket.floor(math.ceil(_BELOW_UNSURE_REPLAY[min(failures, 2) - 1] * (high - 1))))
    if terms.exact:
        if edge >= untried[0]:
            return Run(bracket.floor(edge))
        return Run(proof.between(bracket, trials) if high is not None else proof.beyond(bracket, low, trials))
    if (
        terms.in_parallel
        and high is None
        and (further := _into_room_left(bracket, low, edge, trials, terms)) is not None
    ):
        return Run(further)
    if low >= CLOSE_TO_PREDICTION * edge:
        return Stop(f"{low} fits, and no more than {edge} is predicted to: within 3 %")
    if edge < untried[0]:
        return Stop(f"the next useful size, {untried[0]}, is predicted not to fit")
    certain, possible = bracket.floor(math.floor(_REPLAY_AIM * edge)), bracket.floor(edge)
    # Where the margin would cost a whole candidate, the edge is worth the risk.
    return Run(possible if possible > COARSE * certain or certain > edge else certain)


def _into_room_left(
    bracket: Bracket, low: int, edge: int, trials: Sequence[TrialResult], terms: SearchTerms
) -> int | None:
    """Return a size beyond ``edge`` where the replay stops although much of the budget is left; else None.

    In its order of events free memory is in pieces then; where operations run side by side another order may come.
    """
    peak = next((trial.peak_bytes for trial in trials if trial.micro_batch == low and trial.fits), None)
    if low < CLOSE_TO_PREDICTION * edge or not peak or terms.budget_bytes is None:
        return None
    if peak > _ROOM_LEFT * terms.budget_bytes:
        return None
    further = bracket.floor(int(low * _OF_ROOM_LEFT * terms.budget_bytes / peak))
    return further if further > edge else None
