"""Formats of reports, plans and memory lines in a notebook: HTML, and for a report also text where there is no HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from autobatch.notebook import style
from autobatch.records import MemoryModel, Plan, Report
from autobatch.report import html, sentences

_just_shown: list[tuple[Report, int]] = []
"""The report that a magic has shown last, with the number of the cell's execution; empty if there is none."""


def report_html(report: Report) -> str:
    """Return the whole report as HTML that can stand in any page."""
    return style.output(html.fragment(report))


def plan_html(plan: Plan) -> str:
    """Return the plan in a line of HTML."""
    return f"<div><b>Plan</b>: {escape(sentences.plan_alone(plan))}</div>"


def memory_model_html(model: MemoryModel) -> str:
    """Return the memory line in a line of HTML."""
    return f"<div><b>Memory line</b>: {escape(sentences.memory_model(model))}</div>"


_HTML = {Report: report_html, Plan: plan_html, MemoryModel: memory_model_html}


def register(shell: Any) -> None:
    """Let ``shell`` display the records as HTML; the records themselves know nothing of it."""
    formatters = shell.display_formatter.formatters
    for record, to_html in _HTML.items():
        formatters["text/html"].for_type(record, to_html)
    formatters["text/plain"].for_type(Report, _print_report)
    shell.display_formatter.ipython_display_formatter.for_type(Report, _unless_just_shown)


def unregister(shell: Any) -> None:
    """Let ``shell`` display the records as any other object again."""
    formatters = shell.display_formatter.formatters
    for record in _HTML:
        formatters["text/html"].pop(record, None)
    formatters["text/plain"].pop(Report, None)
    shell.display_formatter.ipython_display_formatter.pop(Report, None)


def was_shown(report: Report, shell: Any) -> None:
    """Remember that ``report`` stands in this cell's output, so that it is not displayed again as the cell's value."""
    _just_shown[:] = [(report, shell.execution_count)]


def _unless_just_shown(report: Report) -> None:
    """Return if ``report`` stands in the cell's output already: IPython then displays nothing more.

    Raises:
        NotImplementedError: it does not; IPython then displays it as usual.
    """
    from IPython import get_ipython

    shell = get_ipython()
    for shown, execution in _just_shown:
        if shown is report and shell is not None and execution == shell.execution_count:
            _just_shown.clear()
            return
    raise NotImplementedError


def _print_report(report: Report, printer: Any, cycle: bool) -> None:
    if len(printer.stack) > 1:  # inside of a list or the like
        printer.text(repr(report))
        return
    from autobatch.report import text

    printer.text(text.render(report, color=None))
