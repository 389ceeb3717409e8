"""Workers with a backup, one of which is killed: all go on from what the chief has kept, each with its own parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import optional
import pytest
from test_workers import free_ports

SCRIPT = Path(__file__).parents[1] / "integration" / "killed_workers.py"
pytestmark = pytest.mark.slow


def run(folder, **options):
    """Run both workers once; return the exit code of each, and what it has printed."""
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}
    processes = []
    for index in range(2):
        task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "TF_NUM_INTRAOP_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), str(folder), json.dumps(options)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    told = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=240)
            told.append((process.returncode, json.loads(out) if out else error))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return told


def kept(folder):
    """The updates of the backups in the chief's folder."""
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("backup-0/update-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    optional.several_devices()
    told = run(tmp_path_factory.mktemp("whole"))
    assert [code for code, _ in told] == [0, 0], told
    one, other = (each for _, each in told)
    assert one["digest"] != other["digest"]  # what a worker has of its own counts
    assert one["drawn"] != other["drawn"]
    return told


def test_all_go_on_behind_the_chiefs_last_backup(whole, tmp_path):
    # An epoch has three updates. The chief is killed in an update, the other worker told to leave in validation.
    first = run(tmp_path, every=1, victim=0, update=3, signal=signal.SIGKILL)
    assert first[0][0] == -signal.SIGKILL
    assert first[1][1]["error"] == "WorkerLostError", first
    assert 'With backup="runs/a" they go on' in first[1][1]["message"]
    assert set(kept(tmp_path)) & {1, 2}
    second = run(tmp_path, every="1h", victim=1, validation=1, signal=signal.SIGTERM)
    assert second[1][0] == -signal.SIGTERM
    assert second[0][1]["error"] == "WorkerLostError", second
    assert kept(tmp_path)[-1] == 3  # held at the end of the epoch, and written as the worker was lost
    third = run(tmp_path, every="1h", victim=1, update=2, signal=signal.SIGTERM)
    assert third[1][0] == -signal.SIGTERM
    assert third[0][1]["error"] == "WorkerLostError", third
    assert kept(tmp_path)[-1] == 6  # the worker's wish is heard in the next update, behind which all are kept
    assert run(tmp_path, every=2) == whole
    assert not (tmp_path / "backup-0").exists()
    assert not (tmp_path / "backup-1").exists()
