"""The search in a genuinely limited arena: what a traced step tells is near what trials measure, and few are needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("arena_search.py")


def _run(script: Path) -> dict:
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told():
    return _run(SCRIPT)


@pytest.fixture(scope="module")
def measures(told):
    return told["measures"]


@pytest.mark.slow
def test_the_estimate_is_within_a_factor_of_two_of_what_a_sample_adds(measures):
    small, large = measures["measured"]["64"], measures["measured"]["128"]
    added = (large["sample_peak_bytes"] - small["sample_peak_bytes"]) / 64
    assert added / 2 < measures["estimate"]["sample_bytes"] < 2 * added
    assert measures["estimate"]["largest_tensor_bytes"] == 24 * 24 * 16 * 4


@pytest.mark.slow
def test_operations_run_one_at_a_time_in_a_limited_arena(measures):
    """Side by side, whether two convolutions' workspaces are held at once is chance, and so is what fits."""
    assert measures["side_by_side"] is False


@pytest.mark.slow
def test_a_trial_tells_what_was_held_and_what_the_samples_needed(measures):
    for result in measures["measured"].values():
        assert 0 < result["held_bytes"] < result["sample_peak_bytes"] <= result["peak_bytes"]
    # What is held before the first sample does not depend on how many will come.
    held = [result["held_bytes"] for result in measures["measured"].values()]
    assert max(held) - min(held) < 1 << 20


@pytest.mark.slow
def test_trials_begin_with_the_same_free_piece_whatever_ran_before(measures):
    """Sums of 4 MiB came to lie behind the batch of the trial before."""
    assert max(measures["largest_free"]) - min(measures["largest_free"]) < 1 << 19


@pytest.fixture(scope="module")
def waiting(told):
    return told["waiting"]


@pytest.mark.slow
def test_a_recording_knows_where_the_sample_lies_and_what_waits(waiting):
    """No event of the trial names them. What lies in a region that the trial did not touch is no part of it."""
    assert any(bytes_of_it == waiting["beside_two_micro_batches"] for bytes_of_it, _ in waiting["held"])
    assert all(recorded == -(-bytes_of_it // 256) * 256 for bytes_of_it, recorded in waiting["held"])


@pytest.mark.slow
def test_the_batch_that_will_be_in_the_arena_is_held_beside_the_trials(waiting):
    assert waiting["told"] == waiting["batch"]
    assert abs(waiting["beside_trials"] - waiting["beside_two_micro_batches"]) < 1 << 18
    assert waiting["batch"] < waiting["hint"] <= waiting["peak"]


@pytest.mark.slow
def test_what_is_found_was_run_and_is_not_reached_one_by_one(told):
    told = told["searches"]
    for found, trials in zip(told["found"], told["trials"], strict=True):
        assert found == max(micro_batch for micro_batch, fits in trials if fits) > 128
    # What ran before hardly decides what fits: each trial begins with what is held laid anew.
    assert len(told["trials"]) == 3
    # Each search ends within 3 % of what it predicts, and predicts it from where the weights lie then.
    assert max(told["found"]) <= 1.06 * min(told["found"])
    for trials in told["trials"]:
        assert len(trials) <= 4
        assert sum(not fits for _, fits in trials) <= 1
    assert sum(not fits for trials in told["trials"] for _, fits in trials) <= 1


@pytest.fixture(scope="module")
def under_xla():
    return _run(SCRIPT.with_name("xla_trials.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("whole", "['out_of_memory', 'fits'] True"),
        ("accumulated", "True True"),
        ("later", "True True the sums alone"),
    ],
)
def test_running_out_of_memory_under_xla_leaves_the_values_and_the_process_alive(under_xla, steps, expected):
    assert under_xla[steps] == expected
