"""The report for a terminal: a rich table, and plain text where there is no terminal."""

from __future__ import annotations

import io
import sys

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autobatch.records import Outcome, Remedy, Report
from autobatch.report import remedies, sentences

PLAIN_WIDTH = 100
_FIGURES = {"Peak": "peak", "Of limit": "share", "Step": "step", "Samples/s": "speed"}
# Below these widths a column is left out, so that no figure is cut.
_COLUMN_NEEDS_WIDTH = {"Of limit": 76, "Step": 66}

OUTCOME_STYLES = {Outcome.FITS: "green", Outcome.OUT_OF_MEMORY: "red", Outcome.TIMED_OUT: "yellow"}

_BETTER_STYLES = {True: "green", False: "red", None: ""}

# Nothing but spaces and dashes: piped text may meet an ASCII-only reader.
_PLAIN_BOX = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def render(report: Report, *, width: int | None = None, color: bool | None = False) -> str:
    """Return the report as lines of at most ``width`` columns.

    ``color=None`` adds colours if standard output is a terminal; use it for text that is written there at once.
    ``width=None`` takes the terminal's width there and :data:`PLAIN_WIDTH` elsewhere.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    if color is None:
        color = terminal
    if width is None and not terminal:
        width = PLAIN_WIDTH
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
        # A notebook's own display hook must not take the output away.
        force_jupyter=False,
    )
    with console.capture() as captured:
        console.print(_layout(report, rich_boxes=color, width=console.width))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _layout(report: Report, *, rich_boxes: bool, width: int) -> Group:
    parts: list[Text | Table | Padding] = [
        Text(sentences.title(report), style="bold"),
        Text(),
        _pairs(sentences.environment_lines(report.environment)),
        Text(),
    ]
    if report.trials:
        parts += [_trials(report, rich_boxes=rich_boxes, width=width), *_notes(report)]
    else:
        parts.append(Text("  No trial was run."))
    parts += [Text(), _pairs(_findings(report), strong=("Plan",))]
    if report.remedies:
        parts += _remedies(report, rich_boxes=rich_boxes)
    if report.warnings:
        parts += [Text(), Text("Warnings", style="bold yellow"), *(_bullet(warning) for warning in report.warnings)]
    return Group(*parts)


def _remedies(report: Report, *, rich_boxes: bool) -> list[Text | Table | Padding]:
    """Lay out the gain of each remedy over the model as it is, then the code of those that were measured."""
    timed = remedies.has_target(report)
    table = Table(box=box.SIMPLE_HEAD if rich_boxes else _PLAIN_BOX, padding=(0, 0, 0, 1), show_edge=False)
    table.add_column("Remedy", overflow="fold", min_width=8)
    headings = ["Largest", "Samples/s", *(["Update"] if timed else [])]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    parts: list[Text | Table | Padding] = [Text(), Text("Remedies, measured", style="bold"), Text()]
    for row in remedies.rows(report):
        if row.why_not:
            continue
        figures = [row.largest, row.speed, *([row.update] if timed else [])]
        name = f"{row.name} (recommended)" if row.recommended else row.name
        cells = [
            Text(f"{figure.text} {figure.ratio}".strip(), style=_BETTER_STYLES[figure.better]) for figure in figures
        ]
        table.add_row(Text(name), *cells, style="bold" if row.recommended else "")
    parts += [table, Text()]
    for remedy in report.remedies:
        if remedy.measured:
            parts += _remedy(report, remedy)
    for names, reason in remedies.unmeasured(report):
        parts.append(Padding(Text(f"{names}: {reason}", style="dim"), (0, 0, 0, 2)))
    parts += [Text(), *(_bullet(line) for line in (remedies.summary(report), *report.advice))]
    parts += [
        Text(),
        Text("Tried in vain", style="bold"),
        *(_bullet(f"{name} {why}") for name, why in remedies.IN_VAIN),
    ]
    return parts


def _remedy(report: Report, remedy: Remedy) -> list[Text | Table | Padding]:
    name = sentences.printable(remedy.name)
    told = "; ".join(remedies.notes(report, remedy))
    parts: list[Text | Table | Padding] = [Padding(Text(f"{name}: {told}" if told else f"{name}:"), (0, 0, 0, 2))]
    parts += [Padding(Text(line, style="cyan", overflow="fold"), (0, 0, 0, 6)) for line in remedies.code_lines(remedy)]
    return parts


def _findings(report: Report) -> list[tuple[str, str]]:
    return [
        ("Plan", sentences.plan(report)),
        ("Found", sentences.found(report)),
        ("Room left", sentences.distance(report)),
        ("Memory line", sentences.memory_line(report)),
        ("Stopped", sentences.stopped(report)),
        *([("Data hold", sentences.host(report))] if report.host_uses else []),
    ]


def _pairs(pairs: list[tuple[str, str]], *, strong: tuple[str, ...] = ()) -> Table:
    grid = Table.grid(padding=(0, 2), pad_edge=True)
    grid.add_column(style="dim", no_wrap=True, min_width=11)
    grid.add_column(overflow="fold")
    for label, value in pairs:
        grid.add_row(Text(label), Text(value, style="bold" if label in strong else ""))
    return grid


def _trials(report: Report, *, rich_boxes: bool, width: int) -> Table:
    style = box.SIMPLE_HEAD if rich_boxes else _PLAIN_BOX
    table = Table(box=style, padding=(0, 0, 0, 1), pad_edge=True, show_edge=False)
    table.add_column("Micro-batch", justify="right", no_wrap=True)
    table.add_column("Outcome", no_wrap=True)
    figures = [heading for heading in _FIGURES if width >= _COLUMN_NEEDS_WIDTH.get(heading, 0)]
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    chosen = sentences.decisive_trial(report)
    for trial in report.trials:
        cells = sentences.trial_cells(trial, report.environment)
        table.add_row(
            Text(cells.micro_batch),
            Text(cells.outcome, style=OUTCOME_STYLES[trial.outcome]),
            *(Text(getattr(cells, _FIGURES[heading])) for heading in figures),
            Text(sentences.decisive_label(report) if trial is chosen else ""),
            style="bold" if trial is chosen else "",
        )
    return table


def _notes(report: Report) -> list[Padding]:
    """Lay out the notes of the trials below their table, where there is room for a sentence."""
    noted = [(trial, note) for trial in report.trials if (note := sentences.trial_note(trial))]
    if not noted:
        return []
    return [Padding(Text(f"{trial.micro_batch:,}: {note}", style="dim"), (0, 0, 0, 2)) for trial, note in noted]


def _bullet(warning: str) -> Table:
    grid = Table.grid(padding=(0, 1), pad_edge=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("-"), Text(sentences.printable(warning)))
    return grid
