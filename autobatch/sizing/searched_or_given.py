"""Reports for ``fit`` and ``wrap_step``: of a search, or of the micro-batch that was given in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autobatch import display, interrupts
from autobatch.records import Report, TrialResult
from autobatch.sizing.reports import plan_of, say_what_differs, trace_planned, unsearched, warnings_of
from autobatch.sizing.search_trials import search_with
from autobatch.terminal import kept_aside

if TYPE_CHECKING:
    from autobatch.trial.live_trials import LiveTrials
    from autobatch.trial.protocol import Trials


_GIVEN = "no search: micro_batch was given"


def searched_or_given(
    trials: LiveTrials,
    micro_batch: int | None,
    *,
    target_batch: int,
    cache: bool,
    listed_in: str,
    why: str = _GIVEN,
    quiet: bool = False,
    found: Report | None = None,
) -> Report:
    """Search and close the trials, or take the ``micro_batch`` if there is one; warn of what differs.

    ``why`` is the report's account of where the ``micro_batch`` comes from. ``listed_in`` names the place where all
    differences can be read. ``found`` is what an earlier search of this training has found; it is taken as it is.
    """
    if found is not None:
        try:
            if found.plan is not None:
                trace_planned(trials, found.plan, found.plan.micro_batch)
                # The same sentences, which still know where each is explained.
                found = dataclasses.replace(found, warnings=warnings_of(trials, found.plan))
        finally:
            trials.close()
        say_what_differs(found, listed_in=listed_in)
        return found
    if micro_batch is None:
        try:
            known = trials.known_report() if cache else None
            report = shown_search(trials, quiet=quiet, known=known, target_batch=target_batch, cache=cache)
        finally:
            trials.close()
    else:
        report = unsearched(trials, min(micro_batch, -(-target_batch // trials.replicas)), target_batch, why)
        if why != _GIVEN and not quiet and display.show_search is not None:  # a size that the user gave is no news
            report = display.show_search(trials, lambda trials, on_trial=None: report)
    if report.plan is not None and trials.samples_in_portion == 1:
        size = trials.size_in_training(report.plan.micro_batch)
        if size != report.plan.micro_batch:
            report = dataclasses.replace(report, plan=plan_of(size, target_batch, trials.replicas))
    say_what_differs(report, listed_in=listed_in)
    return report


def shown_search(trials: Trials, *, quiet: bool = False, known: Report | None = None, **settings: Any) -> Report:
    """Run :func:`search_with`; show it by :data:`autobatch.display.show_search` if that is set and not ``quiet``.

    A report that is ``known`` is shown in place of a search.
    """

    def search_now(trials: Trials, on_trial: Callable[[TrialResult], None] | None = None) -> Report:
        if known is not None:
            return known
        with interrupts.not_lost(), kept_aside.window(expected=True):
            return search_with(trials, on_trial=on_trial, **settings)

    if quiet or display.show_search is None:
        return search_now(trials)
    report: Report = display.show_search(trials, search_now)
    return report
