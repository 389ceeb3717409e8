"""Style of autobatch's HTML inside a page of somebody else.

JupyterLab, VS Code and Colab have no common way to ask for a notebook's theme, which need not be the browser's. So text
takes the page's own colour. Soft text and lines are that colour thinned, and backgrounds let the page's show through.
The few colours of the plots have a middle lightness: 3.3 : 1 or more against white and against #1e1e1e.
"""

from __future__ import annotations

from autobatch.report import html_style

# Two classes, so that this style prevails over a notebook's rules for tables and headings: one class and some elements.
_ROOT = ".autobatch-output.autobatch"

_STYLE = f"""
{_ROOT} {{
    --ink: currentColor; --soft: color-mix(in srgb, currentColor 72%, transparent);
    --faint: color-mix(in srgb, currentColor 18%, transparent); --page: transparent; --card: transparent;
    --blue: #3b82d8; --red: #dc4a40; --amber: #b27a12; --green: #2f9558; --line: #858d98;
    --warn: color-mix(in srgb, var(--amber) 12%, transparent);
    font: 13px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
    max-width: 1000px; padding: 2px 2px 4px;
}}
{html_style.rules(_ROOT)}
{_ROOT} h1 {{ font-size: 18px; font-weight: 650; }}
{_ROOT} h2 {{ font-size: 13px; font-weight: 650; }}
{_ROOT} h1, {_ROOT} h2 {{ color: inherit; letter-spacing: normal; }}
{_ROOT} section, {_ROOT} figure {{ border-radius: 6px; padding: 10px 14px; margin: 10px 0 0; }}
{_ROOT} .cards, {_ROOT} .plots {{ gap: 10px; padding: 0; }}
{_ROOT} .plots, {_ROOT} .columns {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); }}
{_ROOT} .columns {{ gap: 0 10px; }}
{_ROOT} svg {{ max-width: 520px; font-size: 13px; }}
{_ROOT} .card {{ border-radius: 6px; padding: 8px 12px; }}
{_ROOT} .figure {{ font-size: 20px; }}
{_ROOT} header .kicker, {_ROOT} .label, {_ROOT} .note, {_ROOT} th, {_ROOT} tr.detail td, {_ROOT} footer,
{_ROOT} figcaption {{ font-size: 12px; }}
{_ROOT} .badge {{ color: inherit; background: color-mix(in srgb, var(--blue) 30%, transparent); }}
{_ROOT} table {{ margin: 0; font-size: 13px; border: 0; table-layout: auto; }}
{_ROOT} tbody tr:nth-child(n), {_ROOT} tbody tr:nth-child(n):hover, {_ROOT} thead, {_ROOT} thead tr {{
    background: none; border: 0;
}}
{_ROOT} th, {_ROOT} td {{
    padding: 4px 10px 4px 0; text-align: left; vertical-align: middle; max-width: none; line-height: 1.5;
    border: 0; border-bottom: 1px solid var(--faint); font-size: 13px;
}}
{_ROOT} .number {{ text-align: right; }}
{_ROOT} dl {{ width: auto; }}
{_ROOT} dt, {_ROOT} dd {{ float: none; width: auto; padding: 0; font-weight: inherit; }}
{_ROOT} summary {{ cursor: pointer; }}
{_ROOT} summary span, {_ROOT} .doing span {{ color: var(--soft); }}
{_ROOT} p.doing {{ margin: 0 0 4px; }}
{_ROOT} details .scroll {{ margin-top: 4px; }}
"""


def output(body: str) -> str:
    """Return ``body`` as one element that can stand anywhere, together with its style.

    A notebook's table of contents takes headings from outputs too, and would list those of each report. So they are
    marked to be left out of it. No string of a user can be taken for a heading, because all are escaped.
    """
    for heading in ("h1", "h2"):
        body = body.replace(f"<{heading}>", f'<{heading} class="jp-toc-ignore tocSkip">')
    return f'<div class="autobatch autobatch-output"><style>{_STYLE}</style>\n{body}\n</div>'
