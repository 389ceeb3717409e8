"""Searches in arenas that are nearly full, or too small for one sample: genuine ones, each in a fork of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("full_arena.py")
MIB = 2**20


@pytest.fixture(scope="module")
def searches():
    # Without oneDNN, as limit_memory has it where it comes before TensorFlow.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told(searches):
    return searches["nearly_full"]


@pytest.mark.slow
def test_a_search_that_finds_nothing_ends_in_an_error_and_leaves_the_weights(searches):
    told = searches["too_small"]
    assert told["error"].startswith("Not even a micro-batch of 1 fits")
    assert told["same"]


@pytest.mark.slow
def test_a_dropped_model_is_collected_before_the_first_trial(told):
    assert told["held"] > 5 * MIB
    assert told["uncollected"] == told["held"], "only the collector frees a cycle"
    assert told["by_others"] < 2 * MIB


@pytest.mark.slow
def test_the_headroom_is_given_up_before_it_is_said_that_nothing_fits(told):
    assert told["headroom"] == 0
    assert told["plan"] == 16
    assert 0.4 * 64 * MIB < told["peak"] < 64 * MIB
    assert told["why"].endswith("the headroom was given up, since nothing fits beside it")
    (warned,) = [text for text in told["warned"] if "headroom" in text]
    assert "the headroom of 38.4 MiB is given up" in warned
    assert "60%" in warned


@pytest.mark.slow
def test_what_an_earlier_model_still_holds_is_told_in_bytes_with_the_remedy(told):
    (warned,) = [text for text in told["warned_again"] if "are held by other tensors" in text]
    assert "of 64 MiB on CPU:0" in warned
    assert "keras.backend.clear_session()" in warned
    assert told["kept"] == 9 * 5 * 100_000
    assert not told["error"] or "were held before by other tensors" in told["error"]
