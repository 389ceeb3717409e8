"""The folder of a training's backups: written aside, checked, renamed; the newest whole one is read.

Each backup is a folder ``update-000000000123`` with three files: ``state.json``, ``arrays.npz``, and ``sha256sums`` of
the two. It is written under another name, flushed to the disk, and renamed, so that a backup with its own name is
whole. The last two are kept. One that is broken all the same is passed over, with a warning, for the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autobatch.backup import packing
from autobatch.errors import warn

SCHEMA = 1
"""Number of the format that is written; older ones are still read."""

KEPT = 2
"""Backups that are kept: the newest, and the one before."""

_NAME = re.compile(r"update-(\d{12})")
_ASIDE = re.compile(r"\.(?:new|old)-update-\d{12}-\d+")
_STATE, _ARRAYS, _SUMS = "state.json", "arrays.npz", "sha256sums"


class BrokenBackupError(Exception):
    """Signal of a backup that cannot be read; the message says why."""


class NewerFormatError(ValueError):
    """Error of a backup in a format that this release does not know."""


class BackupFolder:
    """Folder of the backups of one training; it is made when the first is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def backups(self) -> list[Path]:
        """Return the backups, the newest first."""
        if not self.path.is_dir():
            return []
        return sorted((entry for entry in self.path.iterdir() if _NAME.fullmatch(entry.name)), reverse=True)

    def newest(self) -> dict[str, Any] | None:
        """Return the state of the newest backup that is whole, and warn of those that are not; None if there is none.

        Raises:
            NewerFormatError: it was written by a newer autobatch.
        """
        for backup in self.backups():
            try:
                return self._read(backup)
            except BrokenBackupError as broken:
                warn(f"The backup {backup} cannot be used ({broken}). It is passed over for the one before.")
        return None

    @staticmethod
    def _read(backup: Path) -> dict[str, Any]:
        try:
            lines = (backup / _SUMS).read_text(encoding="utf-8").splitlines()
            sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
            for name in (_STATE, _ARRAYS):
                if _sha256(backup / name) != sums.get(name):
                    raise BrokenBackupError(f"the checksum of {name} is not the one that was written")
            packed = json.loads((backup / _STATE).read_text(encoding="utf-8"))
            schema = packed["schema"]
            if schema > SCHEMA:
                raise NewerFormatError(
                    f"The backup was written by a newer autobatch, in format {schema}; this one reads formats up to "
                    f"{SCHEMA}. Install the newer autobatch again, or give another folder. Received: backup={backup}"
                )
            with np.load(backup / _ARRAYS, allow_pickle=False) as arrays:
                state: dict[str, Any] = packing.unpack_state(
                    packed["state"], {name: arrays[name] for name in arrays.files}
                )
        except NewerFormatError:
            raise
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BrokenBackupError(f"{type(error).__name__}: {error}") from error
        return state

    def write(self, update: int, state: dict[str, Any]) -> Path:
        """Write a backup behind this ``update``, and remove all but the last two; return its folder.

        Raises:
            OSError: it cannot be written; those before are as they were.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        name = f"update-{update:012d}"
        aside = self.path / f".new-{name}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            arrays: dict[str, Any] = {}
            packed = {"schema": SCHEMA, "state": packing.pack_state(state, arrays)}
            with _flushed(aside / _ARRAYS) as file:
                np.savez(file, **arrays)
            with _flushed(aside / _STATE) as file:
                file.write(json.dumps(packed).encode())
            sums = "".join(f"{_sha256(aside / name)}  {name}\n" for name in (_STATE, _ARRAYS))
            with _flushed(aside / _SUMS) as file:
                file.write(sums.encode())
            _flush_folder(aside)
            final = self.path / name
            self._remove([final])  # a broken one that was passed over, or the same update once more
            aside.rename(final)
            _flush_folder(self.path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # it is there if something failed alone
        # One of a later update could not be read, or training would have gone on behind it.
        self._remove(backup for backup in self.backups() if backup.name > final.name)
        self._remove(self.backups()[KEPT:])
        return final

    def clean(self) -> None:
        """Remove what a process that was killed has left half-written or half-removed."""
        if self.path.is_dir():
            for entry in self.path.iterdir():
                if _ASIDE.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True)

    def remove(self) -> None:
        """Remove all backups, and the folder if nothing else is in it; warn if they cannot be removed."""
        try:
            self._remove(self.backups())
        except OSError as error:
            warn(
                f"Training has ended, and its backups in {self.path} cannot be removed ({type(error).__name__}: "
                f"{error}). Remove the folder yourself: the same call would go on behind them."
            )
        self.clean()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _remove(self, backups: Iterable[Path]) -> None:
        for backup in backups:
            if backup.exists():
                # Under another name first: no half-removed one is ever taken for a backup.
                gone = backup.with_name(f".old-{backup.name}-{os.getpid()}")
                shutil.rmtree(gone, ignore_errors=True)
                backup.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def _flushed(path: Path) -> Iterator[Any]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return  # other systems flush no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
