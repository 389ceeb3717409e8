"""Subprocesses of this room's tests: TensorFlow takes seconds to import, so they are started once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VARIABLES = ("TF_CPU_ALLOCATOR_USE_BFC", "TF_CPU_BFC_MEM_LIMIT_IN_MB", "TF_ENABLE_ONEDNN_OPTS")


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without an arena, with autobatch importable, and TensorFlow's log quiet."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    lean = str(HERE.parent / "lean_children")
    path = os.pathsep.join(filter(None, (lean, str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"} | variables


class Started:
    """A Python process that prints JSON; starting and waiting are apart, so that several can run side by side."""

    def __init__(self, arguments: list[str], **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env=clean_environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> Any:
        if self._process.returncode is not None:
            return self._result
        try:
            out, err = self._process.communicate(timeout=600)
        finally:
            self._process.kill()
        assert self._process.returncode == 0, err[-3000:]
        self._result = json.loads(out)
        return self._result

    def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="session")
def processes() -> Iterator[dict[str, Started]]:
    """All of them at once, the one that waits for failed allocations first."""
    provoke, scenario = str(HERE / "provoke.py"), str(HERE / "arena_process.py")
    started = {
        "provoked_in_arena": Started([provoke, "arena"]),
        "after_import": Started([scenario, "after_import"]),
        "provoked": Started([provoke, "plain"]),
        "first": Started([scenario, "first"]),
        "no_limit": Started([scenario, "no_limit"]),
    }
    yield started
    for process in started.values():
        process.stop()
