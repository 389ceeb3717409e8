from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import autobatch
from autobatch.report import RENDERERS, text


def test_every_format_renders_every_report(report):
    assert list(RENDERERS) == ["text", "json", "html", "markdown"]
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


@pytest.mark.parametrize("name", RENDERERS)
def test_render_writes_what_the_format_writes(report, name):
    assert autobatch.render(report, name) == RENDERERS[name].render(report)


@pytest.mark.parametrize("name", ["pdf", "TEXT", "", None, ["text"]])
def test_render_names_the_formats_there_are(full, name):
    with pytest.raises(ValueError, match=r'^format must be "text", "json", "html" or "markdown". Received: ') as raised:
        autobatch.render(full, name)
    assert str(raised.value).endswith(repr(name))


def test_render_refuses_what_is_no_report(full):
    with pytest.raises(TypeError, match=r"such as history.report .*Received: Plan\(.* \(of type Plan\)"):
        autobatch.render(full.plan)


def test_a_report_prints_as_text(report, capsys):
    print(report)
    assert capsys.readouterr().out == autobatch.render(report, "text") + "\n"
    assert f"{report}" == str(report) == autobatch.render(report)


def test_text_has_no_colours_even_where_there_is_a_terminal(full, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b" in text.render(full, color=None)
    assert "\x1b" not in str(full) + autobatch.render(full)


def test_the_repr_is_a_few_lines_however_many_trials_there_are(full):
    many = dataclasses.replace(full, trials=full.trials * 100)
    assert repr(many) == repr(full)
    assert repr(full).startswith("Report(plan=Plan(micro_batch=64, accumulation_steps=4, effective_batch=256")
    assert "largest_fit=64, smallest_failure=128" in repr(full)


def test_records_alone_can_be_printed_and_load_no_format_before():
    program = (
        "import sys; from autobatch.records import Environment, Report; "
        "report = Report(None, 8, 16, (), None, Environment('CPU:0', None, '', None, 0.0, 'float32', False), ''); "
        "assert not {'rich', 'autobatch.report'} & set(sys.modules); "
        "assert str(report).startswith('autobatch sizing report'); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
