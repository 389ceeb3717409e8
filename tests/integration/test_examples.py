"""The examples run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import optional
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_multi_worker_starts_two_workers_by_itself():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "multi_worker.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("2 replicas x ")
    assert float(re.search(r"accuracy ([\d.]+)%", last)[1]) > 85


def test_survives_kill_prints_equal_digests():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "survives_kill.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("killed in update") for line in lines) == 2
    digests = [line for line in lines if "digest" in line]
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert digests[0].startswith("58 updates, digest ")


def test_keras_tuner_finds_a_plan_for_each_size_and_remembers_it(own_cache):
    optional.keras_tuner()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "keras_tuner_search.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *searches, best = done.stdout.splitlines()
    found = [re.fullmatch(r"(\{.*\}): micro-batch (\d+) \((.*)\)", line) for line in searches]
    assert len(found) == 3, done.stdout
    first, again, other = ((match[1], int(match[2]), match[3]) for match in found)
    assert "'filters': 16" in first[0]
    assert "'filters': 16" in again[0]
    assert "'filters': 32" in other[0]
    assert again[1] == first[1] < 256
    assert again[2].startswith("remembered from ")
    assert not first[2].startswith("remembered from ")
    assert not other[2].startswith("remembered from ")
    assert best.startswith("best: {'filters': ")
