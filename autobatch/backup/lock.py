"""Lock on the folder of a training's backups: two trainings in one folder would each remove what the other has written.

The kernel holds it (``flock``) for as long as the process lives, however that ends. So neither a file that a dead
process has left nor a number of a process that another one has by now means anything. The file tells whom to name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)

FILE = ".lock"
"""Name of the file that is locked, in the folder of the backups."""

_MOST_BYTES, _MOST_OF_COMMAND = 4096, 500
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Lock on a folder, held from :meth:`acquire` to :meth:`release`.

    Where a folder cannot be made, or its file system knows no locks, there is none, and nobody is refused.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Lock the folder, which is made if it is not there.

        Raises:
            ValueError: another training holds it, in this process or in another; the message names the process.
        """
        try:
            import fcntl  # not on Windows
        except ImportError:
            return
        while self._descriptor is None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                logger.debug("%s is not locked: %r", self._folder, error)
                return
            with contextlib.ExitStack() as unless_held:
                unless_held.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(self._in_use(descriptor)) from None
                except OSError as error:
                    logger.debug("%s is not locked: %r", self._folder, error)
                    return
                if self._is_there(descriptor):
                    unless_held.pop_all()
                    self._descriptor = descriptor
        _held.add(self)
        self._write_holder(self._descriptor)

    def _is_there(self, descriptor: int) -> bool:
        """Return False if the file was removed since it was opened, by the one that held the lock before."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except OSError:
            return False

    @staticmethod
    def _write_holder(descriptor: int) -> None:
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": " ".join(getattr(sys, "argv", []))[:_MOST_OF_COMMAND],
        }
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)

    def _in_use(self, descriptor: int) -> str:
        which, end = "another process", "end it"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it has not written it yet
            holder = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
            number, host = int(holder["process"]), str(holder["host"])
            here = host == socket.gethostname()
            which = f"process {number}{'' if here else f' on {host}'} ({holder['command']}), since {holder['since']}"
            end = f"end it (kill {number})" if here else end
            if here and number == os.getpid():
                which, end = f"this process itself, since {holder['since']}", "let that fit end"
        return (
            f"The folder of the backups is in use by another training, of {which}. Wait until it has ended, {end}, or "
            f"give another folder. Received: backup={str(self._folder)!r}"
        )

    def release(self) -> None:
        """Unlock the folder, and remove it if nothing is in it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        _held.discard(self)
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def let_go_in_child(self) -> None:
        """Leave the lock to the parent of this process: a child that outlives it must not hold the folder."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.let_go_in_child()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
