"""One scenario, in a limited arena on the CPU and, where there is one that TensorFlow sees, on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autobatch.memory import nvml

SCENARIO = Path(__file__).with_name("device_fit.py")

CARDS = nvml.devices()


def run(compiled, **environment):
    done = subprocess.run(
        [sys.executable, str(SCENARIO), compiled],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(seen):
    assert seen["trace_left"] == []
    assert seen["searched_largest"] in seen["sizes_that_fit"]
    assert seen["plan"][0] * (seen["plan"][1] - 1) < 256 <= seen["plan"][0] * seen["plan"][1]
    assert seen["plan"][1] > 1
    assert all(peak <= seen["limit_bytes"] for peak in seen["peaks"])
    assert seen["forced"], "the whole target was meant not to fit"
    assert seen["failed_then_smaller"] == ["out_of_memory", "fits"]
    assert seen["held_after_failure"] <= seen["held_before_failure"] + 2**20
    assert seen["updates"] == 2
    # The order of sums differs with the micro-batch, and on a GPU from run to run.
    assert seen["relative_error"] < 1e-3


@pytest.mark.slow
def test_the_promises_hold_in_an_arena_on_the_cpu():
    seen = run("graph", CUDA_VISIBLE_DEVICES="")
    assert seen["device"] == "CPU:0"
    check(seen)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not CARDS.cards, reason=f"no GPU: {CARDS.reason}")
@pytest.mark.parametrize("compiled", ["graph", "xla"])
def test_the_promises_hold_on_a_gpu(compiled):
    seen = run(compiled)
    if not seen["device"].startswith("GPU"):
        assert not os.environ.get("AUTOBATCH_EXPECT_GPU"), f"TensorFlow sees {seen['device']}, and the driver a GPU"
        pytest.skip("the driver sees a GPU, TensorFlow does not")
    check(seen)
