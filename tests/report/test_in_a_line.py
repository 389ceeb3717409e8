"""The line that stays of a search."""

from __future__ import annotations

import dataclasses

from autobatch.records import Plan
from autobatch.report import sentences


def test_the_plan_its_cost_and_its_peak(full):
    line = sentences.in_a_line(full, spent="2 trials, 14 s")
    assert line == "micro-batch 64 x 4 for 256 on CPU:0 (2 trials, 14 s; peak 401 of 512 MiB)"


def test_several_replicas_no_target_and_no_figures(full):
    on_two = dataclasses.replace(full, plan=Plan(64, 2, 256, replicas=2))
    assert sentences.in_a_line(on_two, spent="x").startswith(
        "micro-batch 64 x 2 on each of 2 replicas for 256 (x; peak"
    )
    without_target = dataclasses.replace(full, plan=None)
    assert sentences.in_a_line(without_target, spent="x").startswith("64 samples at a time on CPU:0 (x; peak 401 of")
    trials = tuple(dataclasses.replace(trial, peak_bytes=None) for trial in full.trials)
    unmeasured = dataclasses.replace(full, trials=trials)
    assert sentences.in_a_line(unmeasured, spent="x") == "micro-batch 64 x 4 for 256 on CPU:0 (x)"
    environment = dataclasses.replace(full.environment, limit_bytes=12 * 2**30)
    other_unit = dataclasses.replace(full, environment=environment)
    assert sentences.in_a_line(other_unit, spent="x").endswith("(x; peak 401 MiB of 12 GiB)")


def test_seconds_that_people_wait_for():
    assert [sentences.rough_seconds(seconds) for seconds in (0.04, 9.96, 14.2, 150)] == [
        "0.0 s",
        "10.0 s",
        "14 s",
        "2.5 min",
    ]
