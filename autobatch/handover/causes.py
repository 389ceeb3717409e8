"""Causes of a restart: why a script was started again, told by ``autobatch run`` and read by ``fit``."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autobatch.handover.folder import causes_file, run_folder


@dataclass(frozen=True, slots=True)
class Death:
    """End of a process for want of memory.

    ``words`` say what was seen. ``training`` is the number of the ``fit`` that was under way in its process, 0 if none
    was. ``doing`` is "trial", "update", "validation" or "". ``micro_batch`` is the size that must not begin again, in
    samples; None if the size is not to blame.
    """

    words: str
    training: int = 0
    doing: str = ""
    micro_batch: int | None = None


@dataclass(frozen=True, slots=True)
class Causes:
    """All that a script is told as it starts again.

    ``deaths`` are those since the last backup that was written. ``host_deaths`` counts all for want of host memory.
    """

    deaths: tuple[Death, ...] = field(default=())
    host_deaths: int = 0

    def sizes(self, training: int, *, in_trials: bool) -> tuple[Death, ...]:
        """Return the deaths, in their order, whose size counts for the ``fit`` of this number, or for its trials."""
        return tuple(
            death
            for death in self.deaths
            if death.micro_batch is not None and death.training == training and (death.doing == "trial") == in_trials
        )


def write_causes(folder: Path, causes: Causes) -> None:
    """Write what the next process is told; it is there whole or not at all."""
    path = causes_file(folder)
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(dataclasses.asdict(causes)), encoding="utf-8")
    os.replace(aside, path)


def told_causes() -> Causes:
    """Return what this process was told; nothing if it was not started again."""
    folder = run_folder()
    if folder is None:
        return Causes()
    try:
        told: dict[str, Any] = json.loads(causes_file(folder).read_text(encoding="utf-8"))
        deaths = tuple(Death(**each) for each in told["deaths"])
        return Causes(deaths, int(told["host_deaths"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Causes()  # the first start, or a folder that another release has made
