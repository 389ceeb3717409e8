"""Opening of a training's backup: what was asked for is checked, and what an earlier process has kept is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autobatch.backup import fingerprint
from autobatch.backup.identity import Identity
from autobatch.backup.lock import FolderLock
from autobatch.backup.processes import Processes
from autobatch.backup.settings import BackupSettings
from autobatch.backup.training_backup import TrainingBackup
from autobatch.data.fit_data import data_parts
from autobatch.errors import warn


class Backups:
    """Opener of the backup of one call of ``fit``.

    ``chosen`` is the micro-batch that was given, or None; ``limits`` are the limit and the headroom that were given.

    Raises:
        TypeError, ValueError: an argument cannot be used.
    """

    def __init__(
        self,
        backup: Any,
        backup_every: Any,
        keep_backup: Any,
        *,
        target_batch: int,
        chosen: int | None,
        limits: Sequence[float | None],
    ) -> None:
        self._settings = BackupSettings.of(backup, backup_every, keep_backup)
        self._target_batch = target_batch
        self._chosen = chosen
        self._limits = limits
        self._opened = 0
        self._lock: FolderLock | None = None

    def open(self, x: Any, y: Any, options: dict[str, Any], processes: Processes) -> TrainingBackup | None:
        """Open the backup of a training of these ``processes`` on these data; None if none was asked for.

        A ``fit`` of the model's own may train several times. Only the first training has a backup then: a restart
        would not know that it is through.

        Raises:
            ValueError: the data cannot be gone on with, or the backup is of other data, or another target; or another
                training uses the folder.
        """
        settings = self._settings
        if settings is None:
            return None
        self._opened += 1
        if self._opened > 1:
            warn(
                "This model's own fit trains more than once, and the backup is one of its first training. The present "
                "training has none: a restart begins with the first again."
            )
            return None

        def prepare() -> Identity:
            settings.require_usable(x, options.get("callbacks"))
            parts = data_parts(x, y, options.get("sample_weight"))
            given = {**options, "sample_weight": parts[2]}
            data = fingerprint.of_data(parts[0], parts[1], given)
            if processes.index == 0:
                lock = FolderLock(settings.folder)
                lock.acquire()
                self._lock = lock
            return Identity(
                settings,
                processes,
                data=data,
                target_batch=self._target_batch,
                chosen=self._chosen,
                limits=self._limits,
            )

        return TrainingBackup(settings, processes.together(prepare, "the folder of the backups"), processes)

    def close(self) -> None:
        """Let other trainings use the folder."""
        if self._lock is not None:
            self._lock.release()
