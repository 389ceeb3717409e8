"""How much memory a device has in all, asked for without TensorFlow: what "80%" is a share of."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from autobatch.cli.exits import UsageError
from autobatch.memory import nvml
from autobatch.trial.worker import visible_devices

_CGROUP_FILES = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1


def total_bytes(device: str | None) -> int:
    """The total of ``device`` ("CPU", "GPU:1"), or of what TensorFlow would choose: the first GPU, else the host."""
    answer = nvml.devices()
    # As the worker's environment will be: there, the card that was asked for is the only one, and GPU:0.
    environ = {**answer.environ, **({} if device is None else visible_devices(device))}
    if device == "CPU" or not nvml.visible_cards(answer.cards, environ):
        return host_total_bytes()
    card = dataclasses.replace(answer, environ=environ).for_tensorflow("GPU:0")
    if card is None:
        raise UsageError(
            "--memory-limit as a share: it cannot be told which of several kinds of GPU TensorFlow will take. "
            "Give the limit as a size, or name the GPU with --device."
        )
    return card.total_bytes


def host_total_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The machine's memory, or the control group's limit where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _CGROUP_FILES:
        try:
            text = (cgroup / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():  # "max" is no limit
            total = min(total, int(text))
    return total
