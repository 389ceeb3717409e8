from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import golden
import pytest

from autobatch.records import Outcome, TrialResult
from autobatch.report import html, plot

_VOID = {"meta", "br", "hr", "img", "input", "link"}


class _Strict(HTMLParser):
    """Fails on a tag that is not closed in order, and collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def _parse(page: str) -> _Strict:
    parser = _Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_golden(report, report_name):
    page = html.render(report)
    golden.check(f"{report_name}.html", re.sub(r"<style>.*</style>", "<style/>", page, flags=re.DOTALL))


def test_every_page_is_well_formed_and_self_contained(report):
    parsed = _parse(html.render(report))
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(parsed.tags)
    assert not {name for name, _ in parsed.attributes} & {"src", "href", "srcset", "onload", "onclick"}
    page = html.render(report)
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_strings_of_the_user_are_escaped(hostile):
    page = html.render(hostile)
    parsed = _parse(page)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page  # would turn the direction of the text after it
    shown = " ".join(parsed.words)
    # Once each: heading, subtitle's device, precision, title, source, versions, reason, warning, the trial's detail.
    assert shown.count("<script>alert('1')</script>") >= 9


def test_the_plots_show_what_was_measured(full):
    memory = plot.memory_plot(full)
    assert memory.count('class="point"') == 3
    assert memory.count('class="failure out_of_memory"') == 1
    assert memory.count('class="failure timed_out"') == 1
    assert memory.count('class="line"') == 1
    assert memory.count('class="limit"') == 1
    assert "limit 512 MiB" in memory
    assert "plan 64" in memory
    assert "64 samples: 401 MiB" in memory
    speed = plot.speed_plot(full)
    assert speed.count('class="point"') == 3
    assert "64 samples: 508 samples/s" in speed


def test_a_limit_far_away_is_told_in_words(full):
    far = dataclasses.replace(full, environment=dataclasses.replace(full.environment, limit_bytes=80 * 2**30))
    assert 'class="limit"' not in plot.memory_plot(far)
    assert "limit 80 GiB, far above this plot" in html.render(far)


def test_a_failure_far_away_is_told_in_words(full):
    far = dataclasses.replace(full, trials=(*full.trials, TrialResult(1 << 20, Outcome.OUT_OF_MEMORY)))
    assert plot.memory_plot(far).count('class="failure out_of_memory"') == 1
    assert "beyond this plot: 1,048,576 failed" in html.render(far)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("sizes", [(1,), (1, 2), (65, 100), (7, 7), (1, 5000, 1_000_000)])
def test_every_mark_is_inside_its_plot(full, sizes, factor):
    trials = tuple(TrialResult(n, Outcome.FITS, int(n * factor * 2**20), n * factor / 50) for n in sizes)
    limit = int(max(sizes) * factor * 2**20)
    report = dataclasses.replace(
        full,
        plan=None,
        largest_fit=max(sizes),
        trials=trials,
        environment=dataclasses.replace(full.environment, limit_bytes=limit),
    )
    for picture in (plot.memory_plot(report), plot.speed_plot(report)):
        numbers = re.findall(r'\b(x|y|cx|cy)="([^"]*)"', picture)
        assert numbers
        for axis, number in numbers:
            assert -1 <= float(number) <= (440 if axis.endswith("x") else 270), picture
        assert 2 <= picture.count('class="tick"') <= 18


def test_no_plot_without_measurements(full):
    report = dataclasses.replace(full, plan=None, largest_fit=1, trials=(TrialResult(1, Outcome.FITS),))
    assert plot.memory_plot(report) == ""
    assert plot.speed_plot(report) == ""
