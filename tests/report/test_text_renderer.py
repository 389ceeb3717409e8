from __future__ import annotations

import dataclasses

import golden
import pytest

from autobatch.records import Outcome, TrialResult
from autobatch.report import sentences, text


def test_golden(report, report_name):
    golden.check(f"{report_name}.txt", text.render(report, width=100, color=False))


def test_golden_in_colour(full):
    golden.check("full_colour.txt", text.render(full, width=80, color=True))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_asked(report, width):
    for line in text.render(report, width=width, color=False).splitlines():
        assert len(line) <= width
        assert "\u2026" not in line or width < 60  # no figure is cut short


def test_plain_where_there_is_no_terminal(full):
    rendered = text.render(full)
    assert "\x1b" not in rendered
    assert max(len(line) for line in rendered.splitlines()) <= text.PLAIN_WIDTH


def test_nothing_of_the_users_acts_on_the_terminal(hostile):
    rendered = text.render(hostile, color=False)
    assert all(c.isprintable() or c == "\n" for c in rendered)
    assert "[bold]x[/bold]" in rendered  # shown, not obeyed
    assert ":smile:" in rendered


def test_the_distance_to_the_limit(full):
    assert "64 samples peak at 401 MiB, 111 MiB (22 %) below the limit of 512 MiB" in text.render(full, width=120)


def test_every_warning_is_shown(full):
    report = dataclasses.replace(full, warnings=("first", "second"))
    assert "- first\n - second" in text.render(report)


def test_compilation_and_steps_are_told_apart():
    compiled = TrialResult(8, Outcome.FITS, step_seconds=0.5, first_step_seconds=27.5)
    assert sentences.trial_note(compiled) == "27.00 s before its steps, for tracing and compilation"
    assert sentences.trial_note(TrialResult(8, Outcome.FITS, step_seconds=0.5, first_step_seconds=0.9)) == ""
