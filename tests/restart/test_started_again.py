"""Real trainings that die of memory and are started again; see ``dying_fits.py``."""

import json
from pathlib import Path

import pytest
from running import join, run

SCRIPT = Path(__file__).with_name("dying_fits.py")


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [1200 * 2**20])
def test_a_training_that_the_kernel_kills_in_a_trial_and_in_an_update(tmp_path, group):
    done = run(SCRIPT, tmp_path, "kernel", preexec_fn=lambda: join(group))
    said = [line for line in done.stderr.splitlines() if line.startswith("autobatch: ") and "start" in line]
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    killed = "killed by the kernel for host memory"
    shorter = f"autobatch: {killed}: starting again with shorter queues and"
    economy = "short queues, few workers, no copy of arrays"
    assert said[0].startswith(f"{shorter} with trials of at most 48, from its beginning, as fit has no backup yet (")
    assert said[1] == f"autobatch: started again ({killed}): {economy}"
    assert said[2].startswith(f"{shorter} at micro-batch 32, behind update 5 (")
    assert said[3] == f"autobatch: started again ({killed}): micro-batch 48 -> 32, {economy}"
    assert found["recoveries"] == [[0, "restart", 48, 48, killed], [5, "restart", 48, 32, killed]]
    assert found["largest_trial"] <= 48
    assert found["not_run"] == [f"not run: an earlier process died in a trial of 96 ({killed})"]
    # Every update is of the same samples as without a kill, in other micro-batches and read in another way.
    assert found["difference"] < 1e-6


@pytest.mark.slow
def test_a_crash_in_a_limited_arena_begins_smaller_and_grows_back(tmp_path):
    done = run(SCRIPT, tmp_path, "crash")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    crashed = "ended by SIGSEGV for want of device memory"
    assert f"autobatch: {crashed}: starting again at micro-batch 16, from its beginning" in done.stderr
    assert f"autobatch: started again ({crashed}): micro-batch 24 -> 16\n" in done.stderr
    assert "larger again from update 16 on: micro-batch 16 -> 20 x 5" in done.stderr
    assert found["recoveries"] == [[0, "restart", 24, 16, crashed]]
    assert found["planned"] == 24
