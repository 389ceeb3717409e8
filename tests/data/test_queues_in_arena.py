"""How many effective batches wait in the input queue, measured in CPU arenas, which hold them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("queues_in_arena.py")
# Those that wait in an arena of this size. An effective batch has 1 MiB.
AHEAD = {"128MiB": 2, "19MiB": 1, "9MiB": 0}


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run([sys.executable, str(SCRIPT), *AHEAD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(AHEAD, map(json.loads, done.stdout.splitlines()[-len(AHEAD) :]), strict=True))


@pytest.mark.parametrize(("limit", "ahead"), AHEAD.items())
def test_never_more_than_two_wait_and_fewer_where_memory_is_short(limit, ahead, measured):
    found = measured[limit]
    for kind, row in found.items():
        if kind != "dataset":  # what its own steps hold is up to tf.data
            more = 2.1 if kind == "arrays" else 3  # the one in use, and those that are being made
            assert row["held"] <= ahead + more, (kind, found)
        assert row["told"] == pytest.approx(1 + ahead, rel=0.01)
        assert row["name"].startswith(f"{1 + ahead} effective batch")
        assert ("memory is short" in row["name"]) == (ahead < 2)
