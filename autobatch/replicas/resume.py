"""Resumption after a restart: the plan kept beside the backup.

Keras's ``BackupAndRestore`` keeps weights, optimizer and epoch. Two micro-batches are kept beside them. The plan's
spares a restart the search, and a restart begins with the one that training had come to. On several workers the chief
alone writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from autobatch.handover.status import note_backup, note_backups_removed
from autobatch.records import Plan
from autobatch.recovery.abstract_transaction import AnyTransaction

FILE_NAME = "autobatch_plan.json"


@dataclass(frozen=True, slots=True)
class KeptPlan:
    """Sizes kept of a run: the micro-batch that was planned, and the one that was used last, at most as large."""

    planned: int
    micro_batch: int


def backup_of(callbacks: Any) -> Any:
    """Return the ``BackupAndRestore`` among what was given as ``callbacks``; None if there is none."""
    if callbacks is None:
        return None
    if not isinstance(callbacks, Iterable):
        callbacks = getattr(callbacks, "callbacks", [callbacks])
    return next((each for each in callbacks if isinstance(each, keras.callbacks.BackupAndRestore)), None)


def remembered(
    callbacks: Any, gather: Callable[[list[float], str], Any], *, target_batch: int, replicas: int
) -> KeptPlan | None:
    """Return what an earlier run of the same training has kept, as the chief finds it; None if there is none.

    ``gather`` gives numbers to all processes of the training, and returns the numbers of all, the chief's first.
    """
    backup = backup_of(callbacks)
    if backup is None:
        return None
    found = _read(Path(backup.backup_dir) / FILE_NAME, target_batch, replicas)
    numbers = [0.0, 0.0] if found is None else [float(found.planned), float(found.micro_batch)]
    planned, micro_batch = map(int, gather(numbers, "the plan of an earlier run")[0, :2])
    return KeptPlan(planned, micro_batch) if planned else None


def _read(path: Path, target_batch: int, replicas: int) -> KeptPlan | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # none was kept, or its writer was killed before the first one was whole
    same = isinstance(kept, dict) and (kept.get("target_batch"), kept.get("replicas")) == (target_batch, replicas)
    micro_batch = kept.get("micro_batch") if same else None
    if not isinstance(micro_batch, int) or micro_batch < 1:
        return None
    planned = kept.get("planned")
    return KeptPlan(planned if isinstance(planned, int) and planned > micro_batch else micro_batch, micro_batch)


class PlanBackup(keras.callbacks.Callback):  # type: ignore[misc]
    """Callback that keeps the micro-batches in the backup's directory, for as long as the directory exists."""

    def __init__(self, backup_dir: str, plan: Plan, transaction: AnyTransaction) -> None:
        super().__init__()
        self._path = Path(backup_dir) / FILE_NAME
        self._plan = plan
        self._transaction = transaction
        self._written: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._write()
        note_backup(self._transaction.updates)  # Keras's callback stands before this one, and has written its own

    def on_train_end(self, logs: Any = None) -> None:
        if not self._path.parent.exists():  # Keras's callback has removed what it kept
            note_backups_removed()

    def _write(self) -> None:
        micro_batch = self._transaction.policy.micro_batch * self._plan.samples_in_portion
        if micro_batch == self._written or not self._path.parent.exists():
            return
        kept = {
            "planned": self._plan.micro_batch,
            "micro_batch": micro_batch,
            "target_batch": self._plan.effective_batch,
            "replicas": self._plan.replicas,
        }
        aside = self._path.with_suffix(f".{os.getpid()}.new")
        aside.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        aside.replace(self._path)
        self._written = micro_batch
