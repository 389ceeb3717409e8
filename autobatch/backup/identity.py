"""Identity of a training: what its backup must have in common with the call that goes on behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from autobatch.backup import fingerprint
from autobatch.backup.processes import Processes
from autobatch.backup.settings import BackupSettings
from autobatch.records import Environment, Report

_ALIKE = 0.1
"""Share by which the limit may differ from that of an earlier process on such a device: what is free at the start."""

_SMALLEST = re.compile(r":\d+(?=, the smallest of )")
"""Number of the replicas' device that has the least memory, which may be another one at every start."""


class Identity:
    """Identity of one training.

    ``data`` is the fingerprint of its data, ``chosen`` the micro-batch that was given, and ``limits`` are the limit and
    the headroom that were given.
    """

    def __init__(
        self,
        settings: BackupSettings,
        processes: Processes,
        *,
        data: dict[str, str],
        target_batch: int,
        chosen: int | None,
        limits: Sequence[float | None],
    ) -> None:
        self._folder = settings.folder
        self.as_plain: dict[str, Any] = {
            "data": data,
            "target_batch": target_batch,
            "chosen": chosen,
            "limits": list(limits),
            "replicas": processes.replicas,
            "processes": processes.count,
        }

    def require_same(self, kept: dict[str, Any]) -> None:
        """Refuse a backup of other data, of another target, or of another number of replicas.

        Raises:
            ValueError: names what differs.
        """
        own = self.as_plain
        if kept["target_batch"] != own["target_batch"]:
            self.refuse(
                f"another target: target_batch was {kept['target_batch']} then, and is {own['target_batch']} now"
            )
        different = fingerprint.difference(kept["data"], own["data"])
        if different:
            self.refuse(f"other data: {different}")
        before = kept.get("replicas", 1), kept.get("processes", 1)
        now = own["replicas"], own["processes"]
        if before != now:
            self.refuse(
                f"another number of replicas: {_in_words(*before)} then, {_in_words(*now)} now. Metrics and random "
                "numbers are a replica's own, so that no other number can go on with them. Train on as many as then"
            )

    def require_same_model(self, kept: dict[str, Any], model: dict[str, str]) -> None:
        """Refuse a backup of another model than that of this fingerprint.

        Raises:
            ValueError: names what differs.
        """
        different = fingerprint.difference(kept["model"], model)
        if different:
            self.refuse(f"another model: {different}")

    def refuse(self, why: str) -> NoReturn:
        """Refuse a backup.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"The backup is one of {why}. Give another folder, or remove this one to train from the start. "
            f"Received: backup={str(self._folder)!r}"
        )

    def require_reached(self, kept: dict[str, Any], epochs: int) -> None:
        """Refuse a backup of a later epoch than the last one now.

        Raises:
            ValueError: names both.
        """
        if kept["epoch"] >= epochs:
            raise ValueError(
                f"The backup is one of epoch {kept['epoch'] + 1}, which is not reached with epochs={epochs}: nothing "
                "would be trained. Pass more epochs, give another folder, or remove this one to train from the start. "
                f"Received: epochs={epochs}, backup={str(self._folder)!r}"
            )

    def report_for(self, kept: dict[str, Any], environment: Environment) -> Report | None:
        """Return the report of a backup, if it holds in this ``environment`` too.

        None if another micro-batch, limit or headroom was given, or the device is another.
        """
        if any(kept.get(name) != self.as_plain[name] for name in ("chosen", "limits")):
            return None
        report = Report.from_json(kept["report"])
        before, now = report.environment.limit_bytes, environment.limit_bytes
        is_alike = before == now or (before and now and abs(before - now) <= _ALIKE * before)
        devices = [_SMALLEST.sub("", each.device) for each in (report.environment, environment)]
        return report if is_alike and devices[0] == devices[1] else None


def _in_words(replicas: int, processes: int) -> str:
    in_processes = f" in {processes} processes" if processes > 1 else ""
    return f"{replicas} replica{'s' if replicas > 1 else ''}{in_processes}"
