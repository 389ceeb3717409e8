"""The style sheet of the HTML report. Everything is under ``.autobatch``, so that it can stand in another page."""

from __future__ import annotations

_DARK = """
    --ink: #e8eaed; --soft: #a2a8b2; --faint: #343a43; --page: #14171b; --card: #1c2026;
    --blue: #6cb2ff; --red: #ff8078; --amber: #f0b455; --green: #6ccb8f; --line: #8a93a0;
    --warn: #2b2416;"""

STYLE = f"""
.autobatch {{
    --ink: #1d2127; --soft: #5b6470; --faint: #e2e5e9; --page: #f6f7f9; --card: #ffffff;
    --blue: #1766c2; --red: #c5352b; --amber: #a86a00; --green: #1d8348; --line: #7d8794;
    --warn: #fdf5e3;
    color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
    max-width: 1080px; margin: 0 auto; padding: 28px 20px;
}}
@media (prefers-color-scheme: dark) {{ .autobatch {{{_DARK}
}} body:has(> .autobatch) {{ background: #14171b; }} }}
@media (prefers-color-scheme: light) {{ body:has(> .autobatch) {{ background: #f6f7f9; }} }}
body:has(> .autobatch) {{ margin: 0; }}
.autobatch * {{ box-sizing: border-box; }}
.autobatch h1 {{ font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }}
.autobatch h2 {{ font-size: 15px; margin: 0 0 10px; }}
.autobatch header p {{ margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }}
.autobatch header .kicker {{ margin: 0 0 2px; font-size: 13px; }}
.autobatch section, .autobatch figure {{
    background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 16px 18px; margin: 16px 0 0;
}}
.autobatch .cards, .autobatch .plots {{ background: none; border: 0; padding: 0; display: grid; gap: 16px; }}
.autobatch .cards {{ grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }}
.autobatch .plots {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }}
.autobatch .plots figure {{ margin: 0; }}
.autobatch .card {{
    background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 12px 16px;
    display: flex; flex-direction: column;
}}
.autobatch .label, .autobatch .note {{ color: var(--soft); font-size: 13px; }}
.autobatch .figure {{ font-size: 27px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }}
.autobatch .meter {{ height: 6px; border-radius: 3px; background: var(--faint); margin: 4px 0; overflow: hidden; }}
.autobatch .fill {{ display: block; height: 100%; background: var(--blue); }}
.autobatch .fill.tight {{ background: var(--red); }}
.autobatch .warnings {{ background: var(--warn); border-left: 4px solid var(--amber); }}
.autobatch .warnings ul {{ margin: 0; padding-left: 20px; overflow-wrap: anywhere; }}
.autobatch .columns {{
    display: grid;
    gap: 0 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
}}
.autobatch .scroll {{ overflow-x: auto; }}
.autobatch table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
.autobatch th {{ text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; }}
.autobatch th, .autobatch td {{ padding: 6px 10px 6px 0; border-bottom: 1px solid var(--faint); white-space: nowrap; }}
.autobatch .number {{ text-align: right; }}
.autobatch td:last-child, .autobatch th:last-child {{ padding-right: 2px; }}
.autobatch tr.chosen td {{ font-weight: 650; }}
.autobatch tr.detail td {{
    color: var(--soft); font-size: 13px; white-space: normal; overflow-wrap: anywhere; padding-top: 2px;
}}
.autobatch tr:has(+ .detail) td {{ border-bottom: 0; padding-bottom: 0; }}
.autobatch tbody tr:last-child td {{ border-bottom: 0; }}
.autobatch .badge {{
    font-size: 11px; font-weight: 600; color: var(--card);
    background: var(--blue); border-radius: 4px; padding: 1px 5px;
}}
.autobatch .dot {{ display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }}
.autobatch .dot.fits {{ background: var(--green); }}
.autobatch .dot.out_of_memory {{ background: var(--red); }}
.autobatch .dot.timed_out {{ background: var(--amber); }}
.autobatch .remedies p {{ margin: 0 0 10px; overflow-wrap: anywhere; }}
.autobatch .remedies .remedy {{ margin: 14px 0 0; }}
.autobatch .remedies td.name {{ white-space: normal; min-width: 110px; }}
.autobatch .ratio {{ color: var(--soft); font-size: 13px; font-weight: 400; }}
.autobatch .ratio.better {{ color: var(--green); }}
.autobatch .ratio.worse {{ color: var(--red); }}
.autobatch pre {{
    margin: 4px 0 0; padding: 8px 12px; overflow-x: auto; background: var(--page);
    border-radius: 6px; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}}
.autobatch dl {{ margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 5px 16px; }}
.autobatch dt {{ color: var(--soft); }}
.autobatch dd {{ margin: 0; overflow-wrap: anywhere; min-width: 0; }}
.autobatch footer {{ color: var(--soft); font-size: 13px; margin: 18px 2px 0; }}
.autobatch svg {{ display: block; width: 100%; height: auto; font: 12px system-ui, -apple-system, sans-serif; }}
.autobatch figcaption {{
    display: flex; flex-wrap: wrap; gap: 2px 16px;
    color: var(--soft); font-size: 13px; margin-top: 8px;
}}
.autobatch svg text {{ fill: var(--soft); }}
.autobatch svg path {{ fill: none; stroke-width: 1; }}
.autobatch .grid {{ stroke: var(--faint); }}
.autobatch .axis, .autobatch .mark {{ stroke: var(--line); }}
.autobatch svg .line {{ stroke: var(--line); stroke-width: 1.5; }}
.autobatch svg .speed {{ stroke: var(--blue); stroke-width: 1.5; }}
.autobatch svg .limit {{ stroke: var(--red); stroke-width: 1.5; stroke-dasharray: 6 4; }}
.autobatch svg .limit-label {{ fill: var(--red); }}
.autobatch svg .point {{ fill: var(--blue); stroke: var(--card); stroke-width: 1.5; }}
.autobatch svg .failure {{ stroke: var(--red); stroke-width: 2.2; stroke-linecap: round; }}
.autobatch svg .timed_out {{ stroke: var(--amber); }}
.autobatch svg .ring {{ fill: none; stroke: var(--ink); stroke-width: 1.5; }}
.autobatch svg .ring-label {{ fill: var(--ink); font-weight: 600; }}
.autobatch .key {{
    display: inline-block; width: 16px;
    height: 0; margin: 0 6px 3px 0; border-top: 2px solid var(--line);
}}
.autobatch .key.speed {{ border-color: var(--blue); }}
.autobatch .key.limit {{ border-top: 2px dashed var(--red); }}
.autobatch .key.point {{
    width: 8px; height: 8px; border: 0;
    border-radius: 50%; background: var(--blue); margin-bottom: 0;
}}
.autobatch .key.failure {{ width: auto; height: auto; border: 0; margin-bottom: 0; font-style: normal; }}
.autobatch .key.failure::before {{ content: "\\2715"; color: var(--red); font-weight: 700; }}
.autobatch .key.timed_out::before {{ color: var(--amber); }}
@media (max-width: 480px) {{
    .autobatch {{ padding: 18px 12px; }}
    .autobatch section, .autobatch figure {{ padding: 12px; }}
    .autobatch .cards {{ grid-template-columns: 1fr 1fr; gap: 10px; }}
    .autobatch .figure {{ font-size: 22px; }}
    .autobatch svg {{ font-size: 15px; }}
    .autobatch .wide {{ display: none; }}
    .autobatch dl {{ grid-template-columns: 1fr; gap: 0; }}
    .autobatch dd {{ margin-bottom: 8px; }}
    .autobatch .ratio {{ display: block; }}
    .autobatch th, .autobatch td {{ padding-right: 7px; font-size: 13px; }}
}}
@media print {{ .autobatch section, .autobatch figure {{ break-inside: avoid; }} }}
"""
