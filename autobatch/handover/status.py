"""Status of a process, in a file that outlives it: what it does, at which micro-batch, what it has kept.

The file is mapped into memory, so that a note of a step costs microseconds and no system call, and is there after a
SIGKILL.
"""

from __future__ import annotations

import dataclasses
import enum
import mmap
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from autobatch.handover.folder import run_folder, status_file

_LAYOUT = struct.Struct("<4sIIQQqq???H300s")
_MAGIC = b"abr2"
_LONGEST = 300


class Doing(enum.IntEnum):
    """Kinds of work that memory may run out in."""

    ELSE = 0
    TRIAL = 1
    UPDATE = 2
    VALIDATION = 3


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """State of a process, as it has noted it last.

    ``training`` counts the calls of ``fit`` in it, from 1 on; 0 before the first. ``micro_batch`` is that of the trial
    or the step under way, and ``smaller`` the one that would follow it; both are 0 if unknown. ``backups`` counts what
    this training has written, and is 0 once they are removed. ``kept_update`` is the update that a restart goes on
    behind: -1 if there is none.
    ``device_is_host`` says that it computes on the CPU, ``in_arena`` that its memory there is a limited arena.
    ``poison`` is the error that no step can follow, as text. ``worker_is_lost`` says that it is the end of another
    worker's process.
    """

    training: int = 0
    doing: Doing = Doing.ELSE
    micro_batch: int = 0
    smaller: int = 0
    backups: int = 0
    kept_update: int = -1
    device_is_host: bool = False
    in_arena: bool = False
    poison: str = ""
    worker_is_lost: bool = False

    def packed(self) -> bytes:
        poison = self.poison.encode()[:_LONGEST]
        return _LAYOUT.pack(
            *(_MAGIC, self.training, int(self.doing), self.micro_batch, self.smaller, self.backups, self.kept_update),
            *(self.device_is_host, self.in_arena, self.worker_is_lost, len(poison), poison),
        )

    @classmethod
    def unpacked(cls, data: bytes) -> ProcessStatus | None:
        """Return the status; None if these bytes are none, as those of a file that was not written yet."""
        if len(data) < _LAYOUT.size or not data.startswith(_MAGIC):
            return None
        _, *numbers, is_host, in_arena, is_lost, length, poison = _LAYOUT.unpack_from(data)
        training, doing, size, smaller, backups, kept = numbers
        text = poison[:length].decode(errors="replace")
        return cls(training, Doing(doing), size, smaller, backups, kept, is_host, in_arena, text, is_lost)


def read_status(folder: Path, pid: int) -> ProcessStatus | None:
    """Return the last status of a process; None if it has noted none: no ``fit`` was called in it."""
    try:
        return ProcessStatus.unpacked(status_file(folder, pid).read_bytes())
    except OSError:
        return None


class _Page:
    """The file of this process, and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.status = ProcessStatus()
        self.lock = threading.RLock()  # backups are written on a thread; a signal may come in the midst of a note
        with path.open("w+b") as file:
            file.truncate(_LAYOUT.size)
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)

    def note(self, **changes: object) -> None:
        with self.lock:
            self.status = dataclasses.replace(self.status, **changes)  # type: ignore[arg-type]
            self._map[:] = self.status.packed()


_page: _Page | None = None
_looked = False


def _own_page() -> _Page | None:
    global _page, _looked
    if not _looked:
        _looked = True
        folder = run_folder()
        if folder is not None:
            try:
                _page = _Page(status_file(folder, os.getpid()))
            except OSError:
                _page = None  # a full disk must not end a training
    return _page


def _forget() -> None:
    global _page, _looked
    _page, _looked = None, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # a worker notes nothing in its parent's name


def is_watched() -> bool:
    """Return True if this process was started by ``autobatch run``."""
    return _own_page() is not None


def note_training() -> int:
    """Note that a ``fit`` begins; return its number in this process. It is 0 if nobody reads notes."""
    page = _own_page()
    if page is None:
        return 0
    training = page.status.training + 1
    page.note(
        training=training,
        doing=Doing.ELSE,
        micro_batch=0,
        smaller=0,
        backups=0,
        kept_update=-1,
        poison="",
        worker_is_lost=False,
    )
    return training


def note_device(*, is_host: bool, in_arena: bool) -> None:
    """Note where the training computes."""
    page = _own_page()
    if page is not None:
        page.note(device_is_host=is_host, in_arena=in_arena)


def note_doing(doing: Doing, micro_batch: int = 0, smaller: int = 0) -> None:
    """Note what begins now, and at which size; behind a poison nothing does."""
    page = _own_page()
    if page is not None and not page.status.poison:
        page.note(doing=doing, micro_batch=micro_batch, smaller=smaller)


def note_backup(update: int, *, written: bool = True) -> None:
    """Note that a restart goes on behind this update; ``written`` if the backup is a new one."""
    page = _own_page()
    if page is not None:
        with page.lock:
            page.note(kept_update=update, backups=page.status.backups + int(written))


def note_backups_removed() -> None:
    """Note that the training is through and its backups are removed: a restart would begin with it anew."""
    page = _own_page()
    if page is not None:
        page.note(kept_update=-1, backups=0)


def note_poison(detail: str) -> None:
    """Note an error after which nothing works in this process any more."""
    page = _own_page()
    if page is not None:
        page.note(poison=detail)


def note_worker_lost(detail: str) -> None:
    """Note that the process of another worker has ended, so that this one can go on with none of them."""
    page = _own_page()
    if page is not None:
        page.note(poison=detail, worker_is_lost=True, doing=Doing.ELSE)
