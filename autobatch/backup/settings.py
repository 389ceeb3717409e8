"""Settings of a backup, as ``fit`` is given them: checked before anything is run."""

from __future__ import annotations

import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from autobatch import arguments

_EVERY_BY_DEFAULT = "60s"


@dataclass(frozen=True, slots=True)
class BackupSettings:
    """Folder of the backups, the seconds or the updates between two, and whether they stay behind the end."""

    folder: Path
    every_seconds: float
    every_updates: int | None
    keep: bool

    @classmethod
    def of(cls, backup: Any, backup_every: Any, keep_backup: Any) -> BackupSettings | None:
        """Return the settings; None if there is no backup to make.

        Raises:
            TypeError, ValueError: one of them cannot be used.
        """
        seconds, updates = arguments.backup_every(backup_every)
        keep = arguments.true_or_false(keep_backup, "keep_backup")
        if backup is None and keep:
            raise ValueError(
                'keep_backup=True keeps a backup, and none is made: pass backup="runs/a" as well, or leave it out.'
            )
        if backup is None and backup_every != _EVERY_BY_DEFAULT:
            raise ValueError(
                "backup_every says when to make a backup, and none is made: "
                f'pass backup="runs/a" as well, or leave it out. Received: backup_every={backup_every!r}'
            )
        if backup is None:
            return None
        if not isinstance(backup, (str, os.PathLike)) or not os.fspath(backup):
            raise TypeError(f'backup must be the path of a folder, such as "runs/a", or None. Received: {backup!r}')
        folder = Path(os.path.abspath(backup))  # the program may go to another folder while it trains
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"backup must be the path of a folder, and a file has that name. Received: {backup!r}")
        return cls(folder, seconds, updates, keep)

    def require_usable(self, data: Any, callbacks: Any) -> None:
        """Refuse what cannot be gone on with after a restart.

        Raises:
            ValueError: the data are read once, or Keras keeps a backup as well.
        """
        received = f"backup={str(self.folder)!r}"
        if isinstance(data, types.GeneratorType) or (hasattr(data, "__next__") and hasattr(data, "__iter__")):
            raise ValueError(
                "A generator can be read only once, so that a restart could not find its place in it. Pass arrays, a "
                "keras.utils.PyDataset, or tf.data.Dataset.from_generator of a function that makes the generator anew. "
                f"Received: {received}, data of type {type(data).__name__}"
            )
        given = callbacks if isinstance(callbacks, (list, tuple)) else getattr(callbacks, "callbacks", [callbacks])
        if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in given):
            raise ValueError(
                "backup keeps all that keras.callbacks.BackupAndRestore keeps, and each would restore over the other. "
                f"Leave one of them out. Received: {received} and a BackupAndRestore among the callbacks"
            )
