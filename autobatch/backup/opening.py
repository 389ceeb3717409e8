"""Opening of a training's backup: what was asked for is checked, and what an earlier process has kept is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autobatch.backup import fingerprint
from autobatch.backup.lock import FolderLock
from autobatch.backup.settings import BackupSettings
from autobatch.backup.training_backup import TrainingBackup
from autobatch.data.fit_data import data_parts
from autobatch.errors import warn
from autobatch.seams import strategies
from autobatch.types import Model


class Backups:
    """Opener of the backup of one call of ``fit``.

    ``chosen`` is the micro-batch that was given, or None; ``limits`` are the limit and the headroom that were given.

    Raises:
        TypeError, ValueError: an argument cannot be used.
    """

    def __init__(
        self,
        model: Model,
        backup: Any,
        backup_every: Any,
        keep_backup: Any,
        *,
        target_batch: int,
        chosen: int | None,
        limits: Sequence[float | None],
    ) -> None:
        self._model = model
        self._settings = BackupSettings.of(backup, backup_every, keep_backup)
        self._target_batch = target_batch
        self._chosen = chosen
        self._limits = limits
        self._opened = 0
        self._lock: FolderLock | None = None

    def open(self, x: Any, y: Any, options: dict[str, Any]) -> TrainingBackup | None:
        """Open the backup of a training on these data; None if none was asked for.

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
        settings.require_usable(x, options.get("callbacks"), strategies.strategy_of(self._model))
        parts = data_parts(x, y, options.get("sample_weight"))
        given = {**options, "sample_weight": parts[2]}
        data = fingerprint.of_data(parts[0], parts[1], given)
        lock = FolderLock(settings.folder)
        lock.acquire()
        self._lock = lock
        return TrainingBackup(
            settings, data=data, target_batch=self._target_batch, chosen=self._chosen, limits=self._limits
        )

    def close(self) -> None:
        """Let other trainings use the folder."""
        if self._lock is not None:
            self._lock.release()
