"""Search on a live model as a terminal shows it: a table of its trials while it runs, and one line that stays.

Where standard error is no terminal, it is that line alone.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

from autobatch import display
from autobatch.cli.progress import WatchedTrials
from autobatch.errors import NoFeasibleBatchError
from autobatch.records import Environment, Report, TrialResult
from autobatch.report import sentences
from autobatch.terminal import kept_aside, notices
from autobatch.units import format_bytes

_REFRESH_SECONDS = 0.5
_LINES_BESIDE_ROWS = 4


def shown(trials: Any, search: Callable[..., Report]) -> Report:
    """Run ``search`` over ``trials`` and show it; see :data:`autobatch.display.show_search`."""
    if not notices.are_shown():
        return search(trials)
    told = SearchTable(trials.model_name, trials.environment)
    heading = f"{display.search_heading}: " if display.search_heading else ""
    try:
        with kept_aside.table_below() as table, told.refreshing(table):
            report = search(WatchedTrials(trials, told), on_trial=told.tried)
    except (NoFeasibleBatchError, KeyboardInterrupt) as error:
        ended = "nothing fits" if isinstance(error, NoFeasibleBatchError) else "the search was interrupted"
        where = sentences.printable(trials.environment.device)
        notices.write_line(f"{heading}{ended} on {where} ({told.spent()})")
        raise
    notices.write_line(f"{heading}{sentences.in_a_line(report, spent=told.spent(report))}")
    return report


class SearchTable:
    """The table of one search: an :class:`autobatch.cli.progress.Progress`."""

    def __init__(self, model_name: str, environment: Environment, clock: Callable[[], float] = time.monotonic) -> None:
        where = [sentences.printable(model_name), sentences.printable(environment.device)]
        if environment.limit_bytes is not None:
            where.append(f"limit {format_bytes(environment.limit_bytes)}")
        self._heading = "autobatch: " + ", ".join(part for part in where if part)
        self._environment = environment
        self._clock = clock
        self._started = self._doing_since = clock()
        self._doing = "Starting"
        self._before_seconds = 0.0  # of what was under way before: of the trial, when it has ended
        self._trials: list[tuple[TrialResult, float]] = []
        self._lock = threading.Lock()

    def refreshing(self, table: kept_aside.Table | None) -> _Refreshing:
        """Draw on ``table`` while a ``with`` block runs, so that seconds count; nowhere if it is None."""
        return _Refreshing(self, table)

    def under(self, heading: str) -> None:
        """Show what follows as part of ``heading``."""
        self._heading = heading

    def doing(self, what: str) -> None:
        """Show what is under way."""
        with self._lock:
            now = self._clock()
            self._before_seconds = now - self._doing_since
            self._doing, self._doing_since = what, now

    def tried(self, result: TrialResult) -> None:
        """Add a trial that has ended."""
        with self._lock:
            self._trials.append((result, self._before_seconds))

    def spent(self, report: Report | None = None) -> str:
        """Say in words what the search has cost, and where its ``report`` comes from if it was no search."""
        count = len(self._trials)
        if report is not None and not count:
            _, no_search, why = report.stopped_because.partition("no search: ")
            return why if no_search else "known from an earlier search, no trial"
        seconds = sentences.rough_seconds(self._clock() - self._started)
        cost = f"{count} trial{'' if count == 1 else 's'}, {seconds}"
        remembered = report is not None and report.stopped_because.startswith("remembered")
        return f"remembered, confirmed with {cost}" if remembered else cost

    def text(self, columns: int, lines: int) -> str:
        """Return the table, coloured, in at most ``lines`` lines of fewer than ``columns`` characters."""
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from autobatch.report.text import OUTCOME_STYLES

        with self._lock:
            trials, doing, since = list(self._trials), self._doing, self._doing_since
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True)
        for heading in ("Micro-batch", "Outcome", "Peak", "Of limit", "Time"):
            table.add_column(heading, justify="left" if heading == "Outcome" else "right", no_wrap=True)
        for trial, seconds in trials[-max(1, lines - _LINES_BESIDE_ROWS) :]:
            cells = sentences.trial_cells(trial, self._environment)
            outcome = Text(cells.outcome, style=OUTCOME_STYLES[trial.outcome])
            table.add_row(cells.micro_batch, outcome, cells.peak, cells.share, sentences.rough_seconds(seconds))
        console = Console(
            file=io.StringIO(),
            width=columns - 1,
            force_terminal=True,
            legacy_windows=False,
            highlight=False,
            markup=False,
            emoji=False,
            force_jupyter=False,
        )
        with console.capture() as captured:
            console.print(Text(self._heading, style="bold"), no_wrap=True, overflow="ellipsis")
            if trials:
                console.print(table)
            seconds_now = int(self._clock() - since)
            now = f"{doing} … {seconds_now} s" if seconds_now else f"{doing} …"
            console.print(Text(now, style="dim"), no_wrap=True, overflow="ellipsis")
        return captured.get().rstrip("\n")


class _Refreshing:
    """Thread that draws a search's table again and again."""

    def __init__(self, told: SearchTable, table: kept_aside.Table | None) -> None:
        self._told = told
        self._table = table
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="autobatch-table", daemon=True)

    def __enter__(self) -> None:
        if self._table is not None:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._table is not None:
            self._thread.join()

    def _draw(self) -> None:
        assert self._table is not None
        last = ""
        while not self._ended.is_set():
            columns, lines = self._table.size
            text = self._told.text(max(20, columns), lines)
            if text != last:
                self._table.show(text)
                last = text
            self._ended.wait(_REFRESH_SECONDS)
