"""Last words of a process on standard error, read where no pipe has to be put in between.

A step of ``fit`` leaves what is written during it in a file of the run's folder (:mod:`autobatch.terminal.relay`). If
standard error is a file, its end is read there. On a terminal, outside of a step, nothing can be read.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path

from autobatch.handover.folder import last_words_file

_MOST_BYTES = 1 << 14
_PATIENCE_SECONDS = 30.0


class LastWords:
    """Reader of what a process writes to standard error from now on; ``folder`` is that of the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin = _size_of_stderr()

    def of(self, pid: int) -> str:
        """Return the end of what the process, now dead, has written, as far as it can be read."""
        return (self._in_step(pid) + b"\n" + self._in_file()).decode(errors="replace")

    def _in_step(self, pid: int) -> bytes:
        path = last_words_file(self._folder, pid)
        with contextlib.suppress(OSError), path.open("r+b") as file:
            _wait_for_writers(file.fileno())
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MOST_BYTES))
            return file.read()
        return b""

    def _in_file(self) -> bytes:
        size = _size_of_stderr()
        if self._begin is None or size is None or size <= self._begin:
            return b""
        # Opened anew: the descriptor that is written by need not be one to read by.
        with contextlib.suppress(OSError), open("/dev/fd/2", "rb") as file:
            file.seek(max(self._begin, size - _MOST_BYTES))
            return file.read(_MOST_BYTES)
        return b""


def _size_of_stderr() -> int | None:
    with contextlib.suppress(OSError):
        found = os.fstat(2)
        if stat.S_ISREG(found.st_mode):
            return found.st_size
    return None


def _wait_for_writers(descriptor: int) -> None:
    """Wait until the dead process's relay has written all: it holds a lock meanwhile.

    On a busy machine one that has just been started takes seconds until it reads.
    """
    import fcntl  # not at the top: Windows has none

    patience = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < patience:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return
