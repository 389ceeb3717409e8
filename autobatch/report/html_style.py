"""The style sheet of the HTML report. Everything is under one root, so that it can stand in another page.

The colours are the variables that ``page.css`` defines for a page of its own. Who puts a report elsewhere defines them
there.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def rules(root: str) -> str:
    """Return the rules for the parts of a report inside of ``root``, a selector."""
    return (_FOLDER / "report.css").read_text(encoding="utf-8").replace(".autobatch ", f"{root} ")


STYLE = (_FOLDER / "page.css").read_text(encoding="utf-8") + rules(".autobatch")
