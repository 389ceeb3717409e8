"""What the renderers printed when a person last looked at it, in files beside this one.

After a change that is meant: ``AUTOBATCH_WRITE_GOLDEN=1 pytest tests/report``, then read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    path = _FOLDER / name
    if os.environ.get("AUTOBATCH_WRITE_GOLDEN"):
        _FOLDER.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")
