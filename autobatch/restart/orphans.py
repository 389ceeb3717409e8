"""Orphans of a dead script: its workers, which run on and hold memory that the next process needs.

A process whose parent dies is given to the nearest one that has asked for such orphans. The one that starts scripts
asks, so that every orphan is a child of its own, and is found as such. What has a session of its own, as a server that
was started to stay has, is left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PATIENCE_SECONDS = 2.0


class Orphans:
    """Orphans of the scripts that this process starts: they become its children, from now on.

    Children that it has already are somebody else's: of a shell that has become this process.
    """

    def __init__(self) -> None:
        self._strangers = set(_children())
        with contextlib.suppress(ImportError, OSError, AttributeError):  # without it they go to another process
            import ctypes

            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def end(self) -> int:
        """End those in the session of this process, by SIGTERM and then by SIGKILL; return their number.

        Call it when no child runs that is to stay.
        """
        ended: set[int] = set()
        begun = time.monotonic()
        while True:
            _collect_dead()
            children = set(_children()) - self._strangers
            passed = time.monotonic() - begun
            if not children or passed > 2 * _PATIENCE_SECONDS:  # one may hang in the kernel
                return len(ended)
            is_late = passed > _PATIENCE_SECONDS
            for pid in children if is_late else children - ended:  # those of the ended come to light as new ones
                ended.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)
            time.sleep(0.02)


def _collect_dead() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _children() -> list[int]:
    """Return the living children of this process that are in its session."""
    own, session, found = os.getpid(), os.getsid(0), []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file:
                    # The name, in parentheses, may hold anything.
                    state, parent, _, of_session = file.read().rpartition(")")[2].split()[:4]
                if int(parent) == own and state != "Z" and int(of_session) == session:
                    found.append(int(entry))
    return found
