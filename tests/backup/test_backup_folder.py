"""The folder of backups, and what it writes: no TensorFlow."""

import json
import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from autobatch.backup import packing
from autobatch.backup.folder import BackupFolder

STATE = {
    "numbers": [1, 2.5, True, None, float("inf"), -float("inf"), 10**30],
    "text": "a/b ü",
    "nested": {
        "array": np.arange(6, dtype="int16").reshape(2, 3),
        "empty": np.zeros([0, 3]),
        "scalar": np.float32(0.1),
    },
    "no dimension": np.array(3, dtype="int64"),
    "half": np.array([1, 2], ml_dtypes.bfloat16),
    "pair": (1, (2, 3)),
}


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(one, other) and getattr(one, "dtype", None) == getattr(other, "dtype", None)


def test_a_state_comes_back_as_it_was(tmp_path):
    folder = BackupFolder(tmp_path / "run")
    folder.write(7, STATE)
    assert same(folder.newest(), STATE)


def test_nan_comes_back(tmp_path):
    folder = BackupFolder(tmp_path)
    folder.write(1, {"value": float("nan"), "array": np.array([np.nan])})
    state = folder.newest()
    assert np.isnan(state["value"])
    assert np.isnan(state["array"]).all()


@pytest.mark.parametrize("value", [object(), {1: 2}, np.array([object()]), {"a": [print]}])
def test_what_cannot_be_kept_is_refused_by_its_place(value):
    with pytest.raises(TypeError, match=r"state.*Received"):
        packing.pack_state(value, {})


def test_the_last_two_are_kept_and_a_state_is_json(tmp_path):
    folder = BackupFolder(tmp_path)
    for update in (5, 40, 300):
        folder.write(update, {"update": update})
    assert [path.name for path in folder.backups()] == ["update-000000000300", "update-000000000040"]
    assert folder.newest() == {"update": 300}
    assert json.loads((folder.backups()[0] / "state.json").read_text())["schema"] == 1


def test_a_backup_of_the_same_update_takes_the_place_of_the_one_before(tmp_path):
    folder = BackupFolder(tmp_path)
    folder.write(5, {"time": 1})
    folder.write(5, {"time": 2})
    assert folder.newest() == {"time": 2}


def test_one_that_was_passed_over_takes_the_place_of_no_other(tmp_path):
    folder = BackupFolder(tmp_path)
    for update in (5, 6, 7):
        folder.write(update, {"update": update})
    (folder.backups()[0] / "arrays.npz").unlink()
    with pytest.warns(UserWarning, match="000007 cannot be used"):
        assert folder.newest() == {"update": 6}
    folder.write(6, {"update": "6 again"})
    assert [path.name for path in folder.backups()] == ["update-000000000006"]
    folder.write(7, {"update": "7 again"})
    assert [path.name for path in folder.backups()] == ["update-000000000007", "update-000000000006"]


def test_a_write_that_fails_leaves_the_others(tmp_path):
    folder = BackupFolder(tmp_path)
    folder.write(5, {"update": 5})
    with pytest.raises(TypeError):
        folder.write(6, {"update": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["update-000000000005"]


PROGRAM = """
import numpy, sys
from pathlib import Path
from autobatch.backup.folder import BackupFolder
folder = BackupFolder(Path(sys.argv[1]))
for update in range(1, 10**6):
    folder.write(update, {"update": update, "array": numpy.full(20_000, update)})
    print(update, flush=True)
"""


def test_whenever_the_writer_is_killed_a_whole_backup_is_left(tmp_path):
    folder = BackupFolder(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for kill in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
        )
        for _ in range(3 + kill):
            seen = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        state = folder.newest()
        assert state["update"] >= seen
        assert (state["array"] == state["update"]).all()
        folder.clean()
        assert all(path.name.startswith("update-") for path in tmp_path.iterdir())
        folder.remove()
        assert not tmp_path.exists()
