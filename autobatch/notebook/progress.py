"""Display of a search on a live model in a notebook while it runs: one display, updated with each trial.

It needs no widgets. At the end one line is left, the plan, with the trials folded behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from typing import Any

from autobatch import display
from autobatch.cli.progress import WatchedTrials
from autobatch.errors import NoFeasibleBatchError
from autobatch.notebook import style
from autobatch.records import Environment, Report, TrialResult
from autobatch.report import html, sentences
from autobatch.units import format_bytes, format_seconds

shown = True
"""True if searches are shown; see :func:`autobatch.notebook.show_progress`."""


def watch() -> None:
    """Show every search on a live model from now on."""
    display.show_search = _watched


def stop_watching() -> None:
    if display.show_search is _watched:
        display.show_search = None


def _watched(trials: Any, search: Callable[..., Report]) -> Report:
    if not shown:
        return search(trials)
    told = SearchDisplay(trials.model_name, trials.environment)
    try:
        report = search(WatchedTrials(trials, told), on_trial=told.tried)
    except BaseException as error:  # an interrupt, too, must not leave "Trying ..." behind
        told.stopped(error)
        raise
    told.found(report)
    return report


class SearchDisplay:
    """The display of one search: an :class:`autobatch.cli.progress.Progress`."""

    def __init__(self, model_name: str, environment: Environment, clock: Callable[[], float] = time.monotonic) -> None:
        self._environment = environment
        self._clock = clock
        self._started = clock()
        self._trials: list[TrialResult] = []
        self._handle: Any = None
        where = [sentences.printable(model_name), sentences.printable(environment.device)]
        if environment.limit_bytes is not None:
            where.append(f"limit {format_bytes(environment.limit_bytes)}")
        self._where = " · ".join(part for part in where if part)

    def under(self, heading: str) -> None:
        """Show what follows as part of ``heading``."""
        self._where = heading

    def doing(self, what: str) -> None:
        """Show what is under way."""
        self._show(f'<p class="doing">{escape(what)} … <span>{escape(self._where)}</span></p>{self._table()}', what)

    def tried(self, result: TrialResult) -> None:
        """Note how a trial ended; the next update of the display shows it."""
        self._trials.append(result)

    def found(self, report: Report) -> None:
        """Show the end of a search: its plan, or the largest size that fits where there was no target.

        Where an earlier search has found the plan, its trials are shown.
        """
        spent = ""
        if not self._trials and report.trials:
            self._trials, spent = list(report.trials), "found before"
        line = f"Plan: {sentences.plan(report)}" if report.plan else f"Found: {sentences.found(report)}"
        self._end(line, self._table(sentences.decisive_trial(report), sentences.decisive_label(report)), spent)

    def stopped(self, error: BaseException) -> None:
        """Show the end of a search without a result."""
        reasons = {KeyboardInterrupt: "Interrupted", NoFeasibleBatchError: "Nothing fits"}
        self._end(reasons.get(type(error), f"Stopped by {type(error).__name__}"), self._table())

    def _end(self, line: str, table: str, spent: str = "") -> None:
        count = len(self._trials)
        spent = spent or f"{count} trial{'' if count == 1 else 's'} in {format_seconds(self._clock() - self._started)}"
        body = f"{escape(line)} <span>· {spent}</span>"
        folded = f"<details><summary>{body}</summary>{table}</details>" if table else f'<p class="doing">{body}</p>'
        self._show(folded, f"{line} · {spent}")

    def _table(self, chosen: TrialResult | None = None, label: str = "") -> str:
        if not self._trials:
            return ""
        return html.trial_table(self._trials, self._environment, chosen=chosen, label=label)

    def _show(self, body: str, plain: str) -> None:
        from IPython.display import display as show

        bundle = {"text/html": style.output(body), "text/plain": f"autobatch: {plain}"}
        if self._handle is None:
            self._handle = show(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
