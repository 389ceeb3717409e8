"""The magic in a real shell, on real models."""

from __future__ import annotations

import argparse
import json
import re
import warnings

import keras
import pytest
from IPython.core.error import UsageError
from IPython.utils.capture import capture_output
from models import arrays, classifier

import autobatch
from autobatch.cli import report as report_command


@pytest.fixture
def names(shell):
    shell.run_line_magic("load_ext", "autobatch")
    x, y = arrays()
    shell.user_ns.update(model=classifier(), x=x, y=y, n=6, keras=keras)
    return shell.user_ns


def magic(shell, line):
    return shell.run_line_magic("autobatch", line)


def cell(shell, source):
    """Run a cell; what it printed, and its result with the exception if there was one."""
    with capture_output() as captured:
        result = shell.run_cell(source, store_history=True)
    return re.sub(r"\x1b\[[0-9;]*m", "", captured.stdout), result


def test_it_shows_the_report_and_returns_it(shell, names):
    before = [variable.numpy().tobytes() for variable in names["model"].variables]
    printed, result = cell(shell, "%autobatch model (x, y) --target-batch {2 * n} --objective largest")
    assert isinstance(result.result, autobatch.Report)
    assert result.result.plan == autobatch.Plan(12, 1, 12)
    assert printed.count("effective batch 12 in one micro-batch") == 1
    assert [variable.numpy().tobytes() for variable in names["model"].variables] == before


def test_the_options_reach_the_search(shell, names, capsys):
    with warnings.catch_warnings():
        # Without a limited arena and without oneDNN there are no figures to hold the limit to.
        warnings.simplefilter("ignore", autobatch.AutobatchWarning)
        report = magic(shell, 'model x y --max-trials=1 --headroom 0.25 --memory-limit "8 GiB" --quiet')
    assert capsys.readouterr().out == ""
    assert report.plan is None
    assert len(report.trials) == 1
    assert report.environment.headroom == 0.25
    report = magic(shell, 'model x y --max-trials=1 --headroom "1 GiB" --memory-limit "8 GiB" --quiet')
    assert report.environment.headroom_bytes == 2**30
    assert report.environment.headroom == 0.125
    assert report.environment.limit_bytes == 8 * 2**30


def test_a_limit_may_be_a_share(shell, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autobatch.AutobatchWarning)
        half, whole = (magic(shell, f"model (x, y) --quiet --max-trials 1 --memory-limit {n}%") for n in (10, 20))
    assert half.environment.limit_bytes == pytest.approx(whole.environment.limit_bytes / 2, abs=1)


def test_it_sees_a_function_s_own_names(shell, names):
    source = """
def inner(mine):
    return get_ipython().run_line_magic("autobatch", "mine (x, y) --target-batch 4 --quiet")
report = inner(model)
"""
    _, result = cell(shell, source)
    assert result.success
    assert names["report"].plan.effective_batch == 4


def test_json_and_files(shell, names, tmp_path, capsys):
    report = magic(shell, "model (x, y) --target-batch 4 --format json")
    assert json.loads(capsys.readouterr().out)["plan"]["effective_batch"] == report.plan.effective_batch
    names["path"] = tmp_path / "report.html"
    magic(shell, "model (x, y) --target-batch 4 --format html --output {path}")
    assert capsys.readouterr().out == ""
    assert names["path"].read_text().startswith("<!DOCTYPE html>")


def test_its_options_are_those_of_the_command(shell, names):
    parser = argparse.ArgumentParser()
    report_command.add_search_arguments(parser)
    text = shell.object_inspect("%autobatch")["docstring"]
    assert text.startswith("usage: %autobatch")
    for option in parser.format_usage().split("[")[2:]:
        assert option.split()[0].rstrip("]") in text


def test_help_is_printed(shell, names, capsys):
    assert magic(shell, "--help") is None
    assert capsys.readouterr().out.startswith("usage: %autobatch")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: MODEL, DATASET"),
        ("model", "the following arguments are required: DATASET"),
        ("modle x", "name 'modle' is not defined. Received: 'modle'"),
        ("model (x y)", "no Python expression"),
        ("model (x, y", "A bracket is never closed"),
        ("model x y 3", "There is one expression too many: .* Received: '3'"),
        ("model x --target-batch 0", "argument --target-batch: N must be a whole number of at least 1. Received: '0'"),
        ("model x --target-batch n", "argument --target-batch: .* Received: 'n'"),
        ("model x --target-batch $missing", "name 'missing' is not defined"),
        ("model x --memory-limit lots", "argument --memory-limit: SIZE, .* is a number of bytes"),
        ("model x --objective best", "argument --objective: invalid choice"),
        ("model x --jit", "an option of the command autobatch report alone.* Received: '--jit'"),
        ("model x --device=GPU", "an option of the command autobatch report alone.* Received: '--device=GPU'"),
        ("model x --timeout 3", "an option of the command autobatch report alone"),
        ("model x --target 3", "There is no such option; %autobatch\\? lists them. Received: '--target'"),
        ("model x --output /nowhere/report", "--output: there is no folder '/nowhere'"),
    ],
)
def test_a_line_that_cannot_be_used_is_told_in_a_line(shell, names, line, message):
    with pytest.raises(UsageError, match=message):
        magic(shell, line)


def test_autobatch_s_own_errors_are_a_line(shell, names):
    printed, result = cell(shell, "%autobatch 3 x")
    assert isinstance(result.error_in_exec, TypeError)
    assert printed.strip() == "TypeError: model must be a Keras model. Received: 3 (of type int)"
    printed, result = cell(shell, "%autobatch keras.Sequential([keras.layers.Dense(1)]) x")
    assert printed.startswith("ValueError: The model is not compiled")
    assert printed.count("\n") == 1


def test_a_bug_in_the_users_model_is_shown_from_their_code_on(shell, names):
    source = """
class Broken(keras.Model):
    def call(self, x):
        return self.helper(x)
    def helper(self, x):
        raise RuntimeError("mine")
broken = Broken()
broken.compile("sgd", "mse")
"""
    cell(shell, source)
    printed, result = cell(shell, "%autobatch broken (x, y) --target-batch 4")
    assert isinstance(result.error_in_exec, RuntimeError)
    assert "self.helper(x)" in printed
    assert "mine" in printed
    assert "_tune" not in printed
    assert "autobatch/notebook" not in printed


def test_a_bug_in_the_users_expression_is_shown_from_their_code_on(shell, names):
    cell(shell, "def load():\n    return 1 / 0")
    printed, result = cell(shell, "%autobatch model load()")
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    assert "return 1 / 0" in printed
    assert "evaluate" not in printed


def test_unloaded_it_is_gone(shell, names):
    shell.run_line_magic("unload_ext", "autobatch")
    with pytest.raises(UsageError, match="not found"):
        magic(shell, "model x")
    shell.run_line_magic("load_ext", "autobatch")
    assert magic(shell, "model (x, y) --target-batch 4 --quiet").plan.effective_batch == 4
