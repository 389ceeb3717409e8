"""How many effective batches wait in the input queue, measured in CPU arenas, which hold them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("queues_in_arena.py")
LIMITS = ("128MiB", "9MiB")  # an effective batch has 1 MiB


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run([sys.executable, str(SCRIPT), *LIMITS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(LIMITS, map(json.loads, done.stdout.splitlines()[-len(LIMITS) :]), strict=True))


@pytest.mark.parametrize("limit", LIMITS)
def test_no_batch_is_made_beside_a_step(limit, measured):
    """A step that fills the arena leaves no room for it. TensorFlow then ends the training, or crashes."""
    found = measured[limit]
    for kind, row in found.items():
        assert row["read"] == [0 if kind in ("arrays", "dataset") else 64] * 5, (kind, found)
        if kind != "dataset":  # what its own steps hold is up to tf.data
            assert row["held"] <= 2.1, (kind, found)  # the one in use, and that from which it is cut
        assert row["prefetches"] == []  # that at the end of the user's dataset is left out
        assert row["told"] == pytest.approx(1, rel=0.01)
        assert row["name"].endswith("none made ahead: a limited arena holds them")
