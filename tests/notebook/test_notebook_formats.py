from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import autobatch
from autobatch import api, display
from autobatch.errors import NoFeasibleBatchError
from autobatch.notebook import formats, progress, style
from autobatch.records import Environment, MemoryModel, Outcome, Plan, Report, TrialResult

NASTY = "net<script>alert('1')</script><h1>&\"\x1b[31m"
ENVIRONMENT = Environment(NASTY, 2**29, NASTY, 2**29, 0.0, "float32", False)
TRIALS = (
    TrialResult(8, Outcome.FITS, 2**25, 0.02, 0.001),
    TrialResult(64, Outcome.OUT_OF_MEMORY, detail=NASTY),
    TrialResult(32, Outcome.FITS, 2**27, 0.06, 0.001),
)
REPORT = Report(
    plan=Plan(32, 8, 250),
    largest_fit=32,
    smallest_failure=64,
    trials=TRIALS,
    memory_model=MemoryModel(2**20, 2**22),
    environment=ENVIRONMENT,
    stopped_because=NASTY,
    model_name=NASTY,
    warnings=(NASTY,),
)


class _Page(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.headings = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag in ("h1", "h2"):
            self.headings.append(dict(attrs).get("class"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outputs():
    shown = []

    class Recorded(progress.SearchDisplay):
        def _show(self, body, plain):
            shown.append(style.output(body))

    display = Recorded(NASTY, ENVIRONMENT)
    display.doing("Trying micro-batch 8")
    for trial in TRIALS:
        display.tried(trial)
        display.doing("Choosing the next size")
    display.found(REPORT)
    display.found(dataclasses.replace(REPORT, plan=None))
    display.stopped(KeyboardInterrupt())
    return [formats.report_html(REPORT), *shown]


@pytest.mark.parametrize("page", outputs())
def test_an_output_is_well_formed_and_keeps_to_itself(page):
    parsed = _Page(page)
    assert not {"script", "link", "img", "iframe", "body"} & set(parsed.tags)
    assert "id" not in parsed.attributes  # two outputs in one page would share it
    assert "<script" not in page
    assert "\x1b" not in page
    # A notebook's table of contents lists the headings of outputs that are not marked so.
    assert all(css_class == "jp-toc-ignore tocSkip" for css_class in parsed.headings)
    (sheet,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{(?!\s*\.autobatch)", re.sub(r"@media[^{]*\{", "", sheet))
    assert len(selectors) > 50
    for selector in ",".join(selectors).split(","):
        assert selector.strip().startswith(".autobatch-output.autobatch"), selector
    assert "prefers-color-scheme" not in sheet  # the browser's theme, not the notebook's


def test_the_report_is_the_one_of_the_command():
    page = formats.report_html(REPORT)
    for part in ("Micro-batch", "Peak memory", "Throughput", "Trials, in the order run", "Environment"):
        assert part in page
    assert page.count("<svg") == 2


def test_the_small_ones():
    assert formats.plan_html(Plan(32, 8, 250)) == (
        "<div><b>Plan</b>: effective batch 250 = 8 \u00d7 micro-batch 32 (6 of them with 31 samples)</div>"
    )
    assert "1 MiB fixed" in formats.memory_model_html(MemoryModel(2**20, 2**22))
    assert "4 MiB a sample" in formats.memory_model_html(MemoryModel(2**20, 2**22))


def test_progress_tells_how_a_search_ended():
    *_, found, found_without_plan, interrupted = outputs()
    assert re.search(r"<summary>Plan: effective batch 250 = .* <span>· 3 trials in ", found)
    assert '<b class="badge">plan</b>' in found
    assert "<summary>Found: 32 samples fit, 64 do not" in found_without_plan
    assert "<summary>Interrupted" in interrupted


def test_a_shell_displays_them_once_the_extension_is_loaded(shell):
    formatter = shell.display_formatter
    assert "text/html" not in formatter.format(REPORT)[0]
    shell.run_line_magic("load_ext", "autobatch")
    for record, part in [(REPORT, "<svg"), (REPORT.plan, "<b>Plan</b>"), (REPORT.memory_model, "<b>Memory line</b>")]:
        assert part in formatter.formatters["text/html"](record)
    plain = formatter.formatters["text/plain"]
    assert plain(REPORT).startswith("autobatch sizing report")
    assert plain([REPORT]).startswith("[Report(plan=Plan(micro_batch=32")
    assert plain(REPORT.plan) == repr(REPORT.plan)
    shell.run_line_magic("unload_ext", "autobatch")
    assert formatter.formatters["text/html"](REPORT) is None
    assert plain(REPORT) == repr(REPORT)


def test_a_terminal_is_left_alone(shell):
    before = display.show_search
    shell.run_line_magic("load_ext", "autobatch")
    assert autobatch.fit is api.fit  # the first use
    assert display.show_search is before  # the terminal's own


def test_a_report_shown_by_the_magic_is_not_shown_again_in_the_same_cell(shell):
    shell.run_line_magic("load_ext", "autobatch")
    formats.was_shown(REPORT, shell)
    assert shell.display_formatter.format(REPORT) == ({}, {})
    assert "text/plain" in shell.display_formatter.format(REPORT)[0]
    formats.was_shown(REPORT, shell)
    shell.execution_count += 1
    assert "text/plain" in shell.display_formatter.format(REPORT)[0]


def test_a_search_that_fails_says_so_and_passes_the_error_on(shell, monkeypatch):
    shown = []
    monkeypatch.setattr(progress.SearchDisplay, "_show", lambda self, body, plain: shown.append(plain))

    class Trials:
        model_name, environment = "net", ENVIRONMENT

    def search(trials, on_trial):
        on_trial(TRIALS[1])
        raise NoFeasibleBatchError("not even one")

    with pytest.raises(NoFeasibleBatchError):
        progress._watched(Trials(), search)
    assert re.fullmatch(r"Nothing fits · 1 trial in .*", shown[-1])


def test_ipython_is_not_imported_by_anything_but_a_shell():
    code = (
        "import sys, autobatch, autobatch.api, autobatch.notebook.formats, autobatch.notebook.progress, "
        "autobatch.notebook.magic; autobatch.fit; autobatch.Report; "
        "sys.exit(bool({'IPython', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
