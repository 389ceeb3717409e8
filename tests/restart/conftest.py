"""Control groups with a limit of memory, made where that is allowed: by root, outside of most containers."""

import contextlib
import os
import time
from pathlib import Path

import pytest

ROOTS = {
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
    Path("/sys/fs/cgroup/unified"): "memory.max",
}


@pytest.fixture
def limit_bytes():
    return 120 * 2**20


@pytest.fixture
def group(limit_bytes):
    """A control group of this test's own, with a limit of memory."""
    for root, limit in ROOTS.items():
        directory = root / f"autobatch-test-{os.getpid()}"
        if _limited(directory, limit, limit_bytes):
            break
    else:
        pytest.skip("no control group that limits memory can be made here")
    yield directory
    for _ in range(100):
        with contextlib.suppress(OSError):
            directory.rmdir()
            return
        time.sleep(0.05)


def _limited(directory, limit, limit_bytes):
    try:
        directory.mkdir()
    except OSError:
        return False
    with contextlib.suppress(OSError):
        if (directory / limit).exists():
            (directory / limit).write_text(str(limit_bytes))
            return True
    directory.rmdir()
    return False
