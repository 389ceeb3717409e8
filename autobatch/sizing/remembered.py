"""Earlier results in place of a search: found by what they depend on, and run once before they are used.

The size that is returned was run now. A remembered size may fail, or need much less than it did. Then a search is made
as if nothing had been remembered, and its result takes the old one's place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autobatch.cache.entry import Remembered
from autobatch.cache.key import Key, make_key
from autobatch.errors import warn
from autobatch.records import Outcome, Plan, SearchResult, TrialRequest, TrialResult
from autobatch.search import planning

if TYPE_CHECKING:
    from autobatch.cache.store import ResultStore
    from autobatch.trial.protocol import Trials


_LESS = 0.9
"""Share of the remembered peak; a new peak below it means that a larger size may fit now."""

_LESS_BYTES = 16 * 2**20
"""Least difference between the two peaks that counts: what else a process holds differs by a little."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """Remembered result, confirmed: the plan of the sizes that were run now, and what the search had found."""

    result: SearchResult
    plan: Plan | None


class RememberedResult:
    """Remembered result of one search over ``trials``, and the place where a new result will be kept.

    ``target_batch`` is at most ``trials.largest_useful``.
    """

    def __init__(self, trials: Trials, *, target_batch: int | None, objective: str, exact: bool) -> None:
        self._trials = trials
        self._target_batch = target_batch
        self._objective = objective
        self._exact = exact
        self._store = _open_store()
        self._first_key = self._key()
        self._found = None if self._store is None else self._store.find(self._first_key)

    def confirm(self, run: Callable[[TrialRequest], TrialResult], tried: list[TrialResult]) -> Confirmed | None:
        """Run what is remembered, adding each trial to ``tried``; return None if nothing is, or if it no longer holds.

        One trial is run, of the remembered plan's micro-batch. An ``exact`` result whose plan is not of the largest
        size that fits takes a second trial, of that size. The proof that no larger one fits is remembered with it, and
        not repeated.
        """
        found = self._found
        if found is None:
            return None
        sizes = {found.micro_batch, found.largest_fit} if self._exact else {found.micro_batch}
        limited = self._trials.environment.budget_bytes is not None
        for micro_batch in sorted(sizes):
            # Recorded, as the search's own trials are: without the record a chunk that is larger than what was asked
            # for counts in full, and what fits looks as if it did not.
            trial = run(TrialRequest(micro_batch, record_allocations=limited))
            tried.append(trial)
            if not trial.fits or (micro_batch == found.micro_batch and _needs_less(trial, found)):
                return None
        plan = None
        if self._target_batch is not None:
            plan = planning.make_plan(
                tried,
                target_batch=self._target_batch,
                objective=self._objective,
                one_shape=self._trials.environment.jit_compile,
            )
        result = SearchResult(
            largest_fit=max(sizes),
            smallest_failure=found.smallest_failure if self._exact else None,
            trials=tuple(tried),
            memory_model=found.memory_model,
            stopped_because=_words(found, len(tried), self._exact),
        )
        return Confirmed(result, plan)

    def keep(self, result: SearchResult, plan: Plan | None) -> None:
        """Remember the result of a search that came to its end by itself."""
        if self._store is None or result.largest_fit is None:
            return
        if any(trial.outcome is Outcome.TIMED_OUT for trial in result.trials):
            return  # how long a trial takes depends on what else the machine does
        micro_batch = result.largest_fit if plan is None else plan.micro_batch
        trial = next(trial for trial in reversed(result.trials) if trial.fits and trial.micro_batch == micro_batch)
        environment = self._trials.environment
        most = self._trials.largest_useful if self._target_batch is None else self._target_batch
        remembered = Remembered(
            micro_batch=micro_batch,
            largest_fit=result.largest_fit,
            smallest_failure=result.smallest_failure,
            is_bound=most is None or result.largest_fit < most,
            limit_bytes=environment.limit_bytes or None,
            peak_bytes=trial.peak_bytes or None,
            memory_model=result.memory_model,
            target_batch=self._target_batch,
            model_name=self._trials.model_name,
            device=environment.device,
            stopped_because=result.stopped_because,
            created_seconds=time.time(),
        )
        # The trials have built what was not built yet, so the model has two keys: before training and after.
        for key in {self._first_key, self._key()}:
            self._store.put(key, remembered)

    def _key(self) -> Key:
        return make_key(
            self._trials.content,
            self._trials.environment,
            target_batch=self._target_batch,
            largest_useful=self._trials.largest_useful,
            objective=self._objective,
            exact=self._exact,
        )


def _open_store() -> ResultStore | None:
    try:
        from autobatch.cache.folder import cache_folder
        from autobatch.cache.store import ResultStore

        return ResultStore(cache_folder())
    except ImportError as error:  # Python can be built without SQLite
        reason = f"this Python has no SQLite ({error})"
    except RuntimeError as error:
        reason = f"there is no home folder ({error}); AUTOBATCH_CACHE_DIR names a folder"
    warn(f"Results are not remembered: {reason}.")
    return None


def _needs_less(trial: TrialResult, found: Remembered) -> bool:
    """Return True if memory that bounded the search then is free now, so that another size would be found."""
    if not found.is_bound or found.peak_bytes is None or trial.peak_bytes is None:
        return False
    return trial.peak_bytes < _LESS * found.peak_bytes and found.peak_bytes - trial.peak_bytes > _LESS_BYTES


def _words(found: Remembered, trials: int, exact: bool) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.created_seconds))
    parts = [f"remembered from {when}, confirmed with {'one trial' if trials == 1 else f'{trials} trials'}"]
    if exact and found.smallest_failure is not None:
        parts.append(f"that {found.smallest_failure} does not fit was shown then")
    elif found.largest_fit > found.micro_batch:
        parts.append(f"up to {found.largest_fit} fitted then")
    parts.append(f"that search ended because {found.stopped_because}")
    return "; ".join(parts)


def without_repeats(
    run: Callable[[TrialRequest], TrialResult], tried: Sequence[TrialResult]
) -> Callable[[TrialRequest], TrialResult]:
    """Return ``run`` with a ready answer for each size that was just tried: a failure takes ten seconds or more."""
    known = {trial.micro_batch: trial for trial in tried}
    return lambda request: known.get(request.micro_batch) or run(request)
