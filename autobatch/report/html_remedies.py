"""The remedies in the HTML report: a table against the model as it is, and each one's line of code.

Every string that came from outside is escaped here, once.
"""

from __future__ import annotations

from html import escape

from autobatch.records import Remedy, Report
from autobatch.report import remedies
from autobatch.report.sentences import printable


def section(report: Report) -> str:
    """Return the sections on remedies; "" if the report has none."""
    if not report.remedies:
        return ""
    advice = "".join(f"<p>{escape(printable(line))}</p>" for line in report.advice)
    each = "".join(_remedy(report, remedy) for remedy in report.remedies if remedy.measured)
    each += "".join(
        f'<p class="remedy"><b>{escape(names)}</b>: {escape(reason)}</p>'
        for names, reason in remedies.unmeasured(report)
    )
    vain = "".join(f"<dt>{escape(name)}</dt><dd>{escape(why)}</dd>" for name, why in remedies.IN_VAIN)
    return (
        '<section class="remedies"><h2>Remedies, each measured on this model</h2>'
        f"<p><b>{escape(remedies.summary(report))}</b></p>{advice}{_table(report)}{each}</section>"
        f"<section><h2>What is tried in vain</h2><dl>{vain}</dl></section>"
    )


def _table(report: Report) -> str:
    timed = remedies.has_target(report)
    headings = ["Largest", "Samples/s", *(["Update"] if timed else [])]
    head = "<th>Remedy</th>" + "".join(f'<th class="number">{heading}</th>' for heading in headings)
    body = "".join(_row(row, timed) for row in remedies.rows(report) if not row.why_not)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: remedies.Row, timed: bool) -> str:
    badge = ' <b class="badge">recommended</b>' if row.recommended else ""
    figures = [row.largest, row.speed, *([row.update] if timed else [])]
    cells = "".join(f'<td class="number">{_figure(figure)}</td>' for figure in figures)
    chosen = " class=chosen" if row.recommended else ""
    return f'<tr{chosen}><td class="name">{escape(row.name)}{badge}</td>{cells}</tr>'


def _figure(figure: remedies.Figure) -> str:
    css_class = {True: "ratio better", False: "ratio worse", None: "ratio"}[figure.better]
    ratio = f' <span class="{css_class}">{escape(figure.ratio)}</span>' if figure.ratio else ""
    return f"{escape(figure.text)}{ratio}"


def _remedy(report: Report, remedy: Remedy) -> str:
    name = escape(printable(remedy.name))
    told = "; ".join(remedies.notes(report, remedy))
    note = f": {escape(told)}" if told else ""
    code = escape("\n".join(remedies.code_lines(remedy)))
    return f'<p class="remedy"><b>{name}</b>{note}</p><pre>{code}</pre>'
