"""Folder that ``autobatch run`` makes for the script that it starts, and the names of the files in it."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "AUTOBATCH_RUN_FOLDER"
"""Environment variable that names the folder; without it, nobody starts this process again."""


def run_folder() -> Path | None:
    """Return the folder; None if this process was not started by ``autobatch run``."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named and os.path.isdir(named) else None


def status_file(folder: Path, pid: int) -> Path:
    """Return the name of the file in which a process says how far it is."""
    return folder / f"status-{pid}"


def last_words_file(folder: Path, pid: int) -> Path:
    """Return the name of the file with what a process has written to standard error in the step that is under way."""
    return folder / f"last-words-{pid}"


def causes_file(folder: Path) -> Path:
    """Return the name of the file that says why the script starts again."""
    return folder / "causes.json"


def open_last_words() -> list[int]:
    """Open the file for what this process writes in a step, for who looks into its crash; nothing if nobody does.

    A lock on it is held until this process and all that it has given the descriptor to are gone: all is written then.

    Raises:
        OSError: the file cannot be made.
    """
    folder = run_folder()
    if folder is None:
        return []
    import fcntl  # not at the top: Windows has none

    file = os.open(last_words_file(folder, os.getpid()), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_SH)
    return [file]
