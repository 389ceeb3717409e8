"""The style sheet of the HTML report. Everything is under one root, so that it can stand in another page."""

from __future__ import annotations

_DARK = """
    --ink: #e8eaed; --soft: #a2a8b2; --faint: #343a43; --page: #14171b; --card: #1c2026;
    --blue: #6cb2ff; --red: #ff8078; --amber: #f0b455; --green: #6ccb8f; --line: #8a93a0;
    --warn: #2b2416;"""

_PAGE = f"""
.autobatch {{
    --ink: #1d2127; --soft: #5b6470; --faint: #e2e5e9; --page: #f6f7f9; --card: #ffffff;
    --blue: #1766c2; --red: #c5352b; --amber: #a86a00; --green: #1d8348; --line: #7d8794;
    --warn: #fdf5e3;
    color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
    max-width: 1080px; margin: 0 auto; padding: 28px 20px;
}}
@media (max-width: 480px) {{ .autobatch {{ padding: 18px 12px; }} }}
@media (prefers-color-scheme: dark) {{ .autobatch {{{_DARK}
}} body:has(> .autobatch) {{ background: #14171b; }} }}
@media (prefers-color-scheme: light) {{ body:has(> .autobatch) {{ background: #f6f7f9; }} }}
body:has(> .autobatch) {{ margin: 0; }}
"""


def rules(root: str) -> str:
    """How the parts of a report look inside of ``root``, a selector.

    The colours are the variables that :data:`_PAGE` defines for a page of its own; who puts a report elsewhere defines
    them there.
    """
    return f"""
{root} * {{ box-sizing: border-box; }}
{root} h1 {{ font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }}
{root} h2 {{ font-size: 15px; margin: 0 0 10px; }}
{root} header p {{ margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }}
{root} header .kicker {{ margin: 0 0 2px; font-size: 13px; }}
{root} section, {root} figure {{
    background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 16px 18px; margin: 16px 0 0;
}}
{root} .cards, {root} .plots {{ background: none; border: 0; padding: 0; display: grid; gap: 16px; }}
{root} .cards {{ grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }}
{root} .plots {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }}
{root} .plots figure {{ margin: 0; }}
{root} .card {{
    background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 12px 16px;
    display: flex; flex-direction: column;
}}
{root} .label, {root} .note {{ color: var(--soft); font-size: 13px; }}
{root} .figure {{ font-size: 27px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }}
{root} .meter {{ height: 6px; border-radius: 3px; background: var(--faint); margin: 4px 0; overflow: hidden; }}
{root} .fill {{ display: block; height: 100%; background: var(--blue); }}
{root} .fill.tight {{ background: var(--red); }}
{root} .warnings {{ background: var(--warn); border-left: 4px solid var(--amber); }}
{root} .warnings ul {{ margin: 0; padding-left: 20px; overflow-wrap: anywhere; }}
{root} .columns {{
    display: grid;
    gap: 0 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
}}
{root} .scroll {{ overflow-x: auto; }}
{root} table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
{root} th {{ text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; }}
{root} th, {root} td {{ padding: 6px 10px 6px 0; border-bottom: 1px solid var(--faint); white-space: nowrap; }}
{root} .number {{ text-align: right; }}
{root} td:last-child, {root} th:last-child {{ padding-right: 2px; }}
{root} tr.chosen td {{ font-weight: 650; }}
{root} tr.detail td {{
    color: var(--soft); font-size: 13px; white-space: normal; overflow-wrap: anywhere; padding-top: 2px;
}}
{root} tr:has(+ .detail) td {{ border-bottom: 0; padding-bottom: 0; }}
{root} tbody tr:last-child td {{ border-bottom: 0; }}
{root} .badge {{
    font-size: 11px; font-weight: 600; color: var(--card);
    background: var(--blue); border-radius: 4px; padding: 1px 5px;
}}
{root} .dot {{ display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }}
{root} .dot.fits {{ background: var(--green); }}
{root} .dot.out_of_memory {{ background: var(--red); }}
{root} .dot.timed_out {{ background: var(--amber); }}
{root} .remedies p {{ margin: 0 0 10px; overflow-wrap: anywhere; }}
{root} .remedies .remedy {{ margin: 14px 0 0; }}
{root} .remedies td.name {{ white-space: normal; min-width: 110px; }}
{root} .ratio {{ color: var(--soft); font-size: 13px; font-weight: 400; }}
{root} .ratio.better {{ color: var(--green); }}
{root} .ratio.worse {{ color: var(--red); }}
{root} pre {{
    margin: 4px 0 0; padding: 8px 12px; overflow-x: auto; background: var(--page);
    border-radius: 6px; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}}
{root} dl {{ margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 5px 16px; }}
{root} dt {{ color: var(--soft); }}
{root} dd {{ margin: 0; overflow-wrap: anywhere; min-width: 0; }}
{root} footer {{ color: var(--soft); font-size: 13px; margin: 18px 2px 0; }}
{root} svg {{ display: block; width: 100%; height: auto; font: 12px system-ui, -apple-system, sans-serif; }}
{root} figcaption {{
    display: flex; flex-wrap: wrap; gap: 2px 16px;
    color: var(--soft); font-size: 13px; margin-top: 8px;
}}
{root} svg text {{ fill: var(--soft); }}
{root} svg path {{ fill: none; stroke-width: 1; }}
{root} .grid {{ stroke: var(--faint); }}
{root} .axis, {root} .mark {{ stroke: var(--line); }}
{root} svg .line {{ stroke: var(--line); stroke-width: 1.5; }}
{root} svg .speed {{ stroke: var(--blue); stroke-width: 1.5; }}
{root} svg .limit {{ stroke: var(--red); stroke-width: 1.5; stroke-dasharray: 6 4; }}
{root} svg .limit-label {{ fill: var(--red); }}
{root} svg .point {{ fill: var(--blue); stroke: var(--card); stroke-width: 1.5; }}
{root} svg .failure {{ stroke: var(--red); stroke-width: 2.2; stroke-linecap: round; }}
{root} svg .timed_out {{ stroke: var(--amber); }}
{root} svg .ring {{ fill: none; stroke: var(--ink); stroke-width: 1.5; }}
{root} svg .ring-label {{ fill: var(--ink); font-weight: 600; }}
{root} .key {{
    display: inline-block; width: 16px;
    height: 0; margin: 0 6px 3px 0; border-top: 2px solid var(--line);
}}
{root} .key.speed {{ border-color: var(--blue); }}
{root} .key.limit {{ border-top: 2px dashed var(--red); }}
{root} .key.point {{
    width: 8px; height: 8px; border: 0;
    border-radius: 50%; background: var(--blue); margin-bottom: 0;
}}
{root} .key.failure {{ width: auto; height: auto; border: 0; margin-bottom: 0; font-style: normal; }}
{root} .key.failure::before {{ content: "\\2715"; color: var(--red); font-weight: 700; }}
{root} .key.timed_out::before {{ color: var(--amber); }}
@media (max-width: 480px) {{
    {root} section, {root} figure {{ padding: 12px; }}
    {root} .cards {{ grid-template-columns: 1fr 1fr; gap: 10px; }}
    {root} .figure {{ font-size: 22px; }}
    {root} svg {{ font-size: 15px; }}
    {root} .wide {{ display: none; }}
    {root} dl {{ grid-template-columns: 1fr; gap: 0; }}
    {root} dd {{ margin-bottom: 8px; }}
    {root} .ratio {{ display: block; }}
    {root} th, {root} td {{ padding-right: 7px; font-size: 13px; }}
}}
@media print {{ {root} section, {root} figure {{ break-inside: avoid; }} }}
"""


STYLE = _PAGE + rules(".autobatch")
"""For the page that :func:`autobatch.report.html.render` makes."""
