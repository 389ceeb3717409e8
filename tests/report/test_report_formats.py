from __future__ import annotations

import subprocess
import sys

import pytest

from autobatch.report import RENDERERS


def test_every_format_renders_every_report(report):
    assert list(RENDERERS) == ["text", "json", "html"]
    for name in RENDERERS:
        assert RENDERERS[name].render(report)


def test_an_unknown_format():
    assert "pdf" not in RENDERERS
    with pytest.raises(KeyError):
        RENDERERS["pdf"]


def test_naming_the_formats_loads_none_of_them():
    program = (
        "import sys; from autobatch.report import RENDERERS; list(RENDERERS); "
        "assert not {'rich', 'autobatch.report.html', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
