"""The report as Markdown, for an issue or a pull request: GitHub's flavour, with the trials as a table."""

from __future__ import annotations

import re

from autobatch.records import Report, TrialResult
from autobatch.report import remedies, sentences

_ACTING = re.compile(r"[\\`*_{}\[\]<>#|~]")
_HEADINGS = ("Micro-batch", "Outcome", "Peak", "Of limit", "Step", "Samples/s", "")


def render(report: Report) -> str:
    """Return the report, without a newline at its end; strings of the user's model stand as they are written."""
    parts = [f"### {escaped(sentences.title(report))}", _list([("Plan", sentences.plan(report)), *_findings(report)])]
    if report.trials:
        parts += [_trials(report), _notes(report)]
    else:
        parts.append("No trial was run.")
    if report.remedies:
        parts.append(_remedies(report))
    if report.warnings:
        parts += ["**Warnings**", "\n".join(f"- {escaped(warning)}" for warning in report.warnings)]
    environment = _list(sentences.environment_lines(report.environment))
    parts.append(f"<details><summary>Environment</summary>\n\n{environment}\n\n</details>")
    return "\n\n".join(part for part in parts if part)


def escaped(text: str) -> str:
    """Return ``text`` in one line, with a backslash before every character that Markdown would act on."""
    return _ACTING.sub(lambda found: f"\\{found[0]}", sentences.printable(text))


def _findings(report: Report) -> list[tuple[str, str]]:
    return [
        ("Found", sentences.found(report)),
        ("Room left", sentences.distance(report)),
        ("Memory line", sentences.memory_line(report)),
        ("Stopped", sentences.stopped(report)),
        *([("Data hold", sentences.host(report))] if report.host_uses else []),
    ]


def _list(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"- **{label}**: {escaped(value)}" for label, value in pairs)


def _trials(report: Report) -> str:
    chosen = sentences.decisive_trial(report)
    rows = [_row(_cells(report, trial, trial is chosen)) for trial in report.trials]
    return "\n".join([_row(_HEADINGS), _row(["---:", ":---", "---:", "---:", "---:", "---:", ":---"]), *rows])


def _cells(report: Report, trial: TrialResult, is_chosen: bool) -> list[str]:
    cells = [escaped(cell) for cell in sentences.trial_cells(trial, report.environment)]
    return [*cells, f"**{sentences.decisive_label(report)}**" if is_chosen else ""]


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _notes(report: Report) -> str:
    noted = [(trial, note) for trial in report.trials if (note := sentences.trial_note(trial))]
    return "\n".join(f"- {trial.micro_batch:,}: {escaped(note)}" for trial, note in noted)


def _remedies(report: Report) -> str:
    """Return the gain of each remedy over the model as it is, the code of those measured, and why others were not."""
    timed = remedies.has_target(report)
    headings = ["Remedy", "Largest", "Samples/s", *(["Update"] if timed else [])]
    lines = [_row(headings), _row([":---", *["---:"] * (len(headings) - 1)])]
    for row in remedies.rows(report):
        if not row.why_not:
            name = f"**{escaped(row.name)} (recommended)**" if row.recommended else escaped(row.name)
            figures = [row.largest, row.speed, *([row.update] if timed else [])]
            lines.append(_row([name, *(escaped(f"{each.text} {each.ratio}") for each in figures)]))
    parts = ["**Remedies, measured**", "\n".join(lines)]
    for remedy in report.remedies:
        if remedy.measured:
            # A line that begins with a fence would end the block.
            code = "\n".join(line for line in remedies.code_lines(remedy) if not line.lstrip().startswith("```"))
            told = "; ".join(remedies.notes(report, remedy))
            parts.append(f"{escaped(remedy.name)}{told and f': {escaped(told)}'}\n\n```python\n{code}\n```")
    last = [f"{names}: {reason}" for names, reason in remedies.unmeasured(report)]
    parts.append("\n".join(f"- {escaped(line)}" for line in (*last, remedies.summary(report), *report.advice)))
    return "\n\n".join(parts)
