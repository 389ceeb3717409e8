"""Writing of backups on a thread of their own, one at a time, beside the next steps."""

from __future__ import annotations

import threading
from typing import Any

from autobatch.backup.folder import BackupFolder
from autobatch.errors import warn
from autobatch.handover.status import note_backup


class Writer:
    """Writer of backups into a folder; one that could not be written is warned of, and training goes on."""

    def __init__(self, folder: BackupFolder) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.written: int | None = None
        """Update of the newest backup that is whole on the disk; None before the first."""

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def write_beside(self, update: int, state: dict[str, Any]) -> None:
        """Begin to write a backup, and return; one that is being written is waited for."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(update, state), name="autobatch-backup")
        self._thread.start()

    def write_now(self, update: int, state: dict[str, Any]) -> None:
        """Write a backup, and return when it is whole."""
        self.wait()
        self._write(update, state)
        self.say_what_failed()

    def _write(self, update: int, state: dict[str, Any]) -> None:
        try:
            self._folder.write(update, state)
        except Exception as error:  # noqa: BLE001 - a full disk must not end a training
            self._error = error
        else:
            self.written = update
            note_backup(update)

    def wait(self) -> None:
        """Wait for the backup that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.say_what_failed()

    def say_what_failed(self) -> None:
        """Warn if the last backup could not be written."""
        error, self._error = self._error, None
        if error is not None:
            warn(
                f"A backup could not be written into {self._folder.path} ({type(error).__name__}: {error}). Training "
                "goes on, and the next backup is tried when it is due."
            )
