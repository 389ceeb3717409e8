"""What no CI machine can run for real, the benchmark for a GPU, at least runs to its end on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(GPU), "--sections", "intruder,nvml", "--minutes", "6", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    trained = results["sections"]["intruder"]
    assert trained["updates"] == trained["updates_expected"]
    assert trained["recoveries"], trained
    assert trained["relative_error"] < 1e-4
    if not results["about"]["on_gpu"]:
        assert "no card" in results["sections"]["nvml"]["ours"]


def test_an_unknown_section_is_a_usage_error():
    done = subprocess.run(
        [sys.executable, str(GPU), "--sections", "nvml,nvm"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Received: nvm" in done.stderr
