"""Reports of earlier searches of the very model that is trained again, in the same process.

Such a search has run the step at the plan's size since it was traced, on data alike and under the same limits. So no
trial is run again, as long as its plan fits what there is now.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autobatch.records import Environment, Report

_KNOWN = "remembered from an earlier search of this model in this process"

_MORE_ROOM = 0.1
"""Share by which the budget must have grown for a new search to be worth it."""


def find(kept: dict[Any, Report], conditions: Any, environment: Environment) -> Report | None:
    """Return the report that is kept for some conditions; None if there is none, or if it may not hold now."""
    report = kept.get(conditions)
    if report is None or report.plan is None:
        return None
    budget, before = environment.budget_bytes, report.environment.budget_bytes
    if (budget is None) != (before is None):
        return None
    if budget is not None and before is not None:
        peaks = [trial.peak_bytes for trial in report.trials if trial.micro_batch == report.plan.micro_batch]
        if any(peak is not None and peak > budget for peak in peaks):
            return None
        if report.plan.accumulation_steps > 1 and budget > before * (1 + _MORE_ROOM):
            return None  # a larger size may fit now
    why = f"{_KNOWN}; that search ended because {report.stopped_because}"
    return replace(report, environment=environment, stopped_because=why)


def keep(kept: dict[Any, Report], conditions: Any, report: Report) -> None:
    """Keep the report of a search that has run trials, for :func:`find`."""
    if report.trials and not report.stopped_because.startswith(_KNOWN):
        kept[conditions] = report
