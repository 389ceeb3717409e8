"""The causes of a full card, each named."""

from __future__ import annotations

import os
import subprocess
import sys

from autobatch.memory.nvml import NvmlAnswer, NvmlCard, NvmlProcess
from autobatch.memory.other_users import explain_pressure

GIB = 2**30


def answer(*processes: NvmlProcess, used_bytes: int, listed: bool = True) -> NvmlAnswer:
    card = NvmlCard(
        0, "H100", "GPU-0", "0000:00:00.0", 80 * GIB, 80 * GIB - used_bytes, used_bytes, processes if listed else None
    )
    return NvmlAnswer((card,), environ={})


def test_another_process_is_named():
    said = explain_pressure("GPU:0", answer(NvmlProcess(4242, "/opt/other", 30 * GIB), used_bytes=31 * GIB))
    assert said == ["Another process holds 30 GiB of H100: pid 4242 (/opt/other)."]


def test_a_pool_taken_whole_is_told():
    (said,) = explain_pressure("GPU:0", answer(NvmlProcess(4242, "python", 76 * GIB), used_bytes=77 * GIB))
    assert said.startswith(
        "Another process holds 76 GiB of H100: pid 4242 (python), which looks like a TensorFlow pool"
    )
    assert "configure_memory" in said


def test_this_process_and_small_ones_explain_nothing():
    own, small = NvmlProcess(os.getpid(), "python", 60 * GIB), NvmlProcess(2, "Xorg", 4 * 2**20)
    assert explain_pressure("GPU:0", answer(own, small, used_bytes=61 * GIB)) == []


def test_a_worker_of_this_process_is_not_another():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        own = NvmlProcess(worker.pid, "python", 60 * GIB)
        assert explain_pressure("GPU:0", answer(own, used_bytes=61 * GIB)) == []
        worker.communicate(b"\n")


def test_memory_that_nobody_holds_is_told():
    (said,) = explain_pressure("GPU:0", answer(used_bytes=40 * GIB))
    assert said.startswith("40 GiB of H100 are in use by no process that can be seen from here")


def test_processes_that_are_not_listed():
    (said,) = explain_pressure("GPU:0", answer(used_bytes=40 * GIB, listed=False))
    assert "does not say by whom" in said


def test_no_driver():
    (said,) = explain_pressure("GPU:0", NvmlAnswer(reason="NVML does not start: no driver"))
    assert said == "What else uses GPU:0 cannot be told: NVML does not start: no driver."


def test_the_cpu_has_no_such_causes():
    assert explain_pressure("CPU:0") == []
