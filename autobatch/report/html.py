"""The report as one HTML file: no script, no network, light and dark, readable on a telephone.

Every string that came from outside is escaped here, once, when it is put into the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from autobatch.records import Environment, Outcome, Report, TrialResult
from autobatch.report import html_remedies, plot, sentences
from autobatch.report.html_style import STYLE
from autobatch.units import format_bytes, format_seconds


def render(report: Report) -> str:
    """Return a whole HTML page."""
    title = escape(sentences.title(report))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main class="autobatch">
{fragment(report)}
</main>
</body>
</html>"""


def fragment(report: Report) -> str:
    """Return the body of the page, to be put inside another page that brings :data:`html_style.STYLE`."""
    sections = (
        _header(report),
        _cards(report),
        _warnings(report),
        _plots(report),
        _trials(report),
        html_remedies.section(report),
        _details(report),
        _footer(report),
    )
    return "\n".join(section for section in sections if section)


def _header(report: Report) -> str:
    name = escape(sentences.printable(report.model_name)) or "Unnamed model"
    environment = report.environment
    where = [sentences.printable(environment.device)]
    if environment.limit_bytes is not None:
        where.append(f"limit {format_bytes(environment.limit_bytes)}")
    where.append(sentences.printable(environment.precision))
    return (
        f'<header><p class="kicker">autobatch sizing report</p><h1>{name}</h1>'
        f"<p>{escape(' · '.join(part for part in where if part))}</p></header>"
    )


def _cards(report: Report) -> str:
    """Return the main results in large figures."""
    cards = []
    if report.plan is not None:
        made = report.plan
        steps = "micro-batch, nothing to accumulate" if made.accumulation_steps == 1 else "micro-batches accumulated"
        cards.append(_card("Micro-batch", f"{made.micro_batches[0]:,}", "samples in one pass"))
        cards.append(_card("Accumulation", f"{sentences.TIMES} {made.accumulation_steps:,}", steps))
        seconds = sentences.update_seconds_sentence(report)
        note = "samples an update" if seconds is None else f"samples an update, about {format_seconds(seconds)}"
        cards.append(_card("Effective batch", f"{made.effective_batch:,}", note))
    elif report.largest_fit is not None:
        cards.append(_card("Largest micro-batch", f"{report.largest_fit:,}", "samples in one pass"))
    else:
        cards.append(_card("Largest micro-batch", "none", "no size was seen to fit"))
    chosen = sentences.decisive_trial(report)
    if chosen is not None and chosen.peak_bytes is not None:
        share = sentences.share_of_limit(chosen, report.environment)
        meter = ""
        if share is not None:
            tight = " tight" if share > 1 else ""
            width = f"{min(100.0, 100 * share):.1f}%"
            meter = f'<span class="meter"><span class="fill{tight}" style="width:{width}"></span></span>'
        note = "measured" if share is None else f"{100 * share:.0f} % of the limit"
        cards.append(_card("Peak memory", format_bytes(chosen.peak_bytes), note, meter))
    return f'<section class="cards">{"".join(cards)}</section>'


def _card(label: str, figure: str, note: str, extra: str = "") -> str:
    return (
        f'<div class="card"><span class="label">{escape(label)}</span><span class="figure">{escape(figure)}</span>'
        f'{extra}<span class="note">{escape(note)}</span></div>'
    )


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(sentences.printable(warning))}</li>" for warning in report.warnings)
    return f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>'


def _plots(report: Report) -> str:
    figures = []
    memory = plot.memory_plot(report)
    if memory:
        keys = [_key("point", "measured peak")]
        if report.memory_model is not None:
            keys.append(_key("line", "memory line"))
        limit = report.environment.limit_bytes
        if plot.drawn_limit(report) is not None:
            keys.append(_key("limit", "limit"))
        elif limit is not None:
            keys.append(f"<span>limit {escape(format_bytes(limit))}, far above this plot</span>")
        shown = plot.shown_failures(report)
        outcomes = {trial.outcome for trial in shown}
        keys += [
            _key(f"failure {outcome.value}", sentences.OUTCOME_LABELS[outcome])
            for outcome in Outcome
            if outcome in outcomes
        ]
        if any(trial.peak_bytes is None for trial in shown):
            keys.append("<span>(where no peak was measured, at what the line predicts)</span>")
        hidden = [f"{t.micro_batch:,}" for t in report.trials if not t.fits and t not in shown]
        if hidden:
            keys.append(f"<span>beyond this plot: {escape(', '.join(hidden))} failed</span>")
        figures.append(_figure("Peak memory", memory, keys))
    speed = plot.speed_plot(report)
    if speed:
        figures.append(_figure("Throughput", speed, [_key("speed", "samples/s of forward and backward pass")]))
    return f'<section class="plots">{"".join(figures)}</section>' if figures else ""


def _figure(heading: str, svg: str, keys: list[str]) -> str:
    return f"<figure><h2>{heading}</h2>{svg}<figcaption>{''.join(keys)}</figcaption></figure>"


def _key(css_class: str, label: str) -> str:
    return f'<span><i class="key {css_class}"></i>{escape(label)}</span>'


def _trials(report: Report) -> str:
    if not report.trials:
        return "<section><h2>Trials</h2><p>No trial was run.</p></section>"
    label = sentences.decisive_label(report)
    table = trial_table(report.trials, report.environment, chosen=sentences.decisive_trial(report), label=label)
    return f"<section><h2>Trials, in the order run</h2>{table}</section>"


def trial_table(
    trials: Iterable[TrialResult], environment: Environment, *, chosen: TrialResult | None = None, label: str = ""
) -> str:
    """Return a table with a row for each trial, and ``label`` beside the chosen one."""
    rows = []
    for trial in trials:
        cells = sentences.trial_cells(trial, environment)
        badge = f' <b class="badge">{label}</b>' if trial is chosen else ""
        rows.append(
            f'<tr{" class=chosen" if trial is chosen else ""}><td class="number">{cells.micro_batch}{badge}</td>'
            f'<td><i class="dot {trial.outcome.value}"></i>{cells.outcome}</td>'
            f'<td class="number">{cells.peak}</td><td class="number wide">{cells.share}</td>'
            f'<td class="number wide">{cells.step}</td><td class="number">{cells.speed}</td></tr>'
        )
        note = sentences.trial_note(trial)
        if note:
            rows.append(f'<tr class="detail"><td colspan="6">{escape(note)}</td></tr>')
    headings = (
        '<th class="number">Micro-batch</th><th>Outcome</th><th class="number">Peak</th>'
        '<th class="number wide">Of limit</th><th class="number wide">Step</th><th class="number">Samples/s</th>'
    )
    return f'<div class="scroll"><table><thead><tr>{headings}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _details(report: Report) -> str:
    result = [
        ("Plan", sentences.plan(report)),
        ("Found", sentences.found(report)),
        ("Room left", sentences.distance(report)),
        ("Memory line", sentences.memory_line(report)),
        ("Stopped", sentences.stopped(report)),
        *([("Data hold", sentences.host(report))] if report.host_uses else []),
    ]
    environment = sentences.environment_lines(report.environment)
    return (
        f'<div class="columns"><section><h2>Result</h2>{_definitions(result)}</section>'
        f"<section><h2>Environment</h2>{_definitions(environment)}</section></div>"
    )


def _definitions(pairs: list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in pairs) + "</dl>"


def _footer(report: Report) -> str:
    return (
        "<footer>Every size in the table was run: forward and backward pass, accumulated gradients, the optimizer's "
        f"update. Report schema {report.schema_version}.</footer>"
    )
