"""Workers with a backup, one of which is killed: all go on from what the chief has kept, each with its own parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nursery
import optional
import pytest
from test_workers import free_ports

SCRIPT = Path(__file__).parents[1] / "integration" / "killed_workers.py"
pytestmark = pytest.mark.slow


def run(folder, *, command=(), **options):
    """Run both workers, by a ``command`` of autobatch's if one is given; return each one's exit code and its result."""
    (folder / "has died").unlink(missing_ok=True)
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}
    processes = []
    for index in range(2):
        task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "TF_NUM_INTRAOP_THREADS": "1"}
        words, path = (SCRIPT, folder, json.dumps(options)), folder / f"errors-{index}"
        if command:
            with path.open("w") as errors:  # last words are read of a file
                started = [sys.executable, *command, *map(str, words)]
                process = subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        else:
            process = nursery.Process(*words, env=environment, stderr=path)
        processes.append(process)
    told = []
    try:
        for index, process in enumerate(processes):
            out, _ = process.communicate(timeout=240)
            lines = out.splitlines() or [json.dumps((folder / f"errors-{index}").read_text()[-3000:])]
            told.append((process.returncode, json.loads(lines[-1])))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
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
    first = run(tmp_path, every=1, victim=0, update=3, signal=signal.SIGKILL)
    assert first[0][0] == -signal.SIGKILL
    assert first[1][0] == 1
    assert first[1][1]["error"] == "WorkerLostError", first
    assert 'With backup="runs/a" they go on' in first[1][1]["message"]
    before = kept(tmp_path)[-1]
    assert before in (1, 2)  # the second may not have been whole yet
    second = run(tmp_path, every="1h", victim=1, update=2, signal=signal.SIGTERM)
    assert second[1][0] == -signal.SIGTERM
    assert second[0][1]["error"] == "WorkerLostError", second
    # The wish to leave is heard in the next update, behind which all is kept; the end of an epoch, the third, is held.
    assert kept(tmp_path)[-1] == (3 if before + 2 == 3 else before + 3)
    assert run(tmp_path, every=2) == whole
    assert not (tmp_path / "backup-0").exists()
    assert not (tmp_path / "backup-1").exists()


def test_one_worker_that_died_for_memory_is_started_again_and_the_other_with_it(whole, tmp_path):
    told = run(
        tmp_path,
        command=["-m", "autobatch", "run"],
        every="1h",
        victim=1,
        validation=1,
        signal=signal.SIGABRT,
    )
    assert told == whole
    chief, other = ((tmp_path / f"errors-{index}").read_text() for index in range(2))
    # It had held the end of the epoch, and wrote that as the other one was lost.
    assert "another worker of its training was lost: starting again, behind update 3 (Worker 1 is lost" in chief
    assert "ended by SIGABRT for want of host memory: starting again" in other
