from __future__ import annotations

import dataclasses
import json as standard_json
import math

import golden
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.records import SCHEMA_VERSION, Environment, MemoryModel, Outcome, Plan, Report, TrialResult
from autobatch.report import json

_counts = st.integers(1, 2**40)
_bytes = st.none() | st.integers(0, 2**60)
_seconds = st.none() | st.floats(0, allow_nan=False)
_text = st.text(st.characters())  # lone surrogates included: argv and file names have them

_trials = st.builds(
    TrialResult, _counts, st.sampled_from(Outcome), _bytes, _seconds, _seconds, _seconds, _bytes, st.booleans(), _text
)
_plans = st.builds(lambda micro, steps: Plan(micro, steps, micro * steps), st.integers(1, 2**20), st.integers(1, 2**20))
_models = st.builds(MemoryModel, st.floats(allow_nan=False), st.floats(0, allow_nan=False))
_environments = st.builds(
    Environment,
    device=_text,
    limit_bytes=_bytes,
    limit_source=_text,
    budget_bytes=_bytes,
    headroom=st.floats(0, 1),
    precision=_text,
    jit_compile=st.booleans(),
    versions=st.lists(st.tuples(_text, _text), max_size=3).map(tuple),
)
_reports = st.builds(
    Report,
    plan=st.none() | _plans,
    largest_fit=st.none() | _counts,
    smallest_failure=st.none() | _counts,
    trials=st.lists(_trials, max_size=4).map(tuple),
    memory_model=st.none() | _models,
    environment=_environments,
    stopped_because=_text,
    model_name=_text,
    warnings=st.lists(_text, max_size=3).map(tuple),
    schema_version=st.just(SCHEMA_VERSION),
)


def test_golden(report, report_name):
    golden.check(f"{report_name}.json", json.render(report))


@settings(max_examples=60, deadline=None)
@given(_reports)
def test_what_is_read_back_is_what_was_written(report):
    text = json.render(report)
    text.encode("ascii")
    assert json.load(text) == report


def test_a_report_writes_and_reads_itself(report):
    text = report.to_json()
    assert text == json.render(report)
    assert Report.from_json(text) == report
    assert "\n" not in report.to_json(indent=None)
    assert Report.from_json(report.to_json(indent=None)) == report
    with pytest.raises(ValueError, match="This is not JSON"):
        Report.from_json(text[:-1])


def test_the_keys_are_the_fields_and_the_version_comes_first(full):
    data = standard_json.loads(json.render(full))
    assert next(iter(data)) == "schema_version"
    assert set(data) == {field.name for field in dataclasses.fields(Report)}
    kept = {field.name for field in dataclasses.fields(TrialResult)} - {
        "allocations",
        "allocated_peak_bytes",
    }  # the search's alone; left out where unknown
    assert set(data["trials"][0]) == kept
    assert data["plan"] == {"micro_batch": 64, "accumulation_steps": 4, "effective_batch": 256}
    assert [trial["outcome"] for trial in data["trials"]] == ["fits", "fits", "out_of_memory", "fits", "timed_out"]


def test_what_is_not_finite_is_still_json(full):
    report = dataclasses.replace(full, memory_model=MemoryModel(math.inf, 0.0))
    text = json.render(report)
    standard_json.loads(text, parse_constant=pytest.fail)
    assert json.load(text) == report


def test_unknown_keys_are_passed_over_and_defaults_filled_in(full):
    data = standard_json.loads(json.render(full))
    data["of_a_later_version"] = {"a": 1}
    data["trials"][0]["of_a_later_version"] = 1
    del data["warnings"], data["trials"][0]["retried"]
    assert json.load(standard_json.dumps(data)) == dataclasses.replace(full, warnings=())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"text"', "{}", '{"plan": null}', "[" * 100_000, "\ud800"]
)
def test_what_is_no_report(text):
    with pytest.raises(ValueError, match=r"not JSON|not an autobatch report"):
        json.load(text)


def test_a_newer_schema_is_refused_with_a_remedy(full):
    data = standard_json.loads(json.render(full)) | {"schema_version": SCHEMA_VERSION + 1}
    with pytest.raises(ValueError, match=rf"schema_version {SCHEMA_VERSION + 1}.*Upgrade autobatch"):
        json.load(standard_json.dumps(data))


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_a_schema_version_that_is_none(full, version):
    data = standard_json.loads(json.render(full)) | {"schema_version": version}
    with pytest.raises(ValueError, match="schema_version: expected a whole number"):
        json.load(standard_json.dumps(data))


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("plan",), 3, r"plan: expected an object. Received: 3"),
        (("plan", "micro_batch"), "64", r"plan.micro_batch: expected a whole number. Received: '64'"),
        (("plan", "micro_batch"), True, r"plan.micro_batch: expected a whole number"),
        (("plan", "micro_batch"), 0, r"plan: micro_batch must be at least 1"),
        (("plan", "accumulation_steps"), 5, r"plan: accumulation_steps must be ceil"),
        (("trials",), {}, r"trials: expected a list"),
        (
            ("trials", 2, "outcome"),
            "maybe",
            r"trials\[2\].outcome: expected one of 'fits', 'out_of_memory', 'timed_out'",
        ),
        (("trials", 2, "outcome"), [], r"trials\[2\].outcome: expected one of"),
        (("trials", 1, "peak_bytes"), 1.5, r"trials\[1\].peak_bytes: expected a whole number"),
        (("trials", 1, "peak_bytes"), -1, r"trials\[1\]: peak_bytes must not be negative"),
        (("trials", 1, "step_seconds"), "fast", r"trials\[1\].step_seconds: expected a number"),
        (("trials", 1, "step_seconds"), 10**400, r"trials\[1\].step_seconds: expected a number that a float holds"),
        (("environment",), None, r"environment: expected an object"),
        (("environment", "jit_compile"), 1, r"environment.jit_compile: expected true or false"),
        (("environment", "device"), None, r"environment.device: expected text"),
        (("environment", "versions"), [["one"]], r"environment.versions\[0\]: expected a list of 2"),
        (("warnings",), "one", r"warnings: expected a list"),
        (("largest_fit",), "x" * 1000, r"largest_fit: expected a whole number. Received: 'x+\.\.\.$"),
    ],
)
def test_a_malformed_field_is_named(full, path, value, match):
    data = standard_json.loads(json.render(full))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=match):
        json.load(standard_json.dumps(data))


def test_a_missing_field_is_named(full):
    data = standard_json.loads(json.render(full))
    del data["environment"]["precision"]
    with pytest.raises(ValueError, match=r"environment.precision: the field is missing"):
        json.load(standard_json.dumps(data))
