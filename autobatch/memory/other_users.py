"""Common causes of a card that is full before the first sample is on it, found and put into sentences."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from autobatch.memory import arena, limits, nvml
from autobatch.units import format_bytes

_NOTABLE_BYTES = 64 * 2**20  # less than this explains nothing
_POOL_SHARE = 0.7  # TensorFlow takes nearly all of a card where growth is off; torch and JAX rarely that much
_FRAMEWORKS = ("torch", "jax", "cupy")

HOW_TO_FREE = (
    "Where they are no longer needed, delete what refers to them and call keras.backend.clear_session() first. The "
    "weights of a model that Keras's own fit has trained stay in memory all the same, until the process ends: start a "
    "new one."
)
"""Remedy where this process itself holds much of a device's memory."""


def explain_pressure(device: str, answer: nvml.NvmlAnswer | None = None) -> list[str]:
    """Return sentences that name what else takes memory on ``device`` ("GPU:0"); the list is empty on a CPU.

    Other processes come first, the largest user at the top. ``answer`` is the result of `nvml.devices`, which is called
    if it is None.
    """
    if not device.startswith("GPU"):
        return []
    causes: list[str] = []
    answer = nvml.devices() if answer is None else answer
    card = answer.for_tensorflow(limits.physical_device(device), device_name=limits.tensorflow_device_name(device))
    if card is None:
        causes.append(f"What else uses {device} cannot be told: {answer.reason or 'its card is not known to NVML'}.")
    else:
        causes += _other_processes(card)
    limit_bytes = arena.arena_limit_bytes(device)
    if limit_bytes is not None:
        causes.append(
            f"This process limited itself to {format_bytes(limit_bytes)} of {device}: raise that limit, or drop it."
        )
    elif _growth_is_off(device):
        frameworks = [name for name in _FRAMEWORKS if name in sys.modules]
        if frameworks:
            causes.append(
                f"Memory growth is off, so TensorFlow takes nearly all of {device} at its start, and {frameworks[0]} "
                "is loaded in the same process: call autobatch.configure_memory() first thing in the program."
            )
    return causes


def _other_processes(card: nvml.NvmlCard) -> list[str]:
    if card.processes is None:
        return [f"{format_bytes(card.used_bytes)} of {card.name} are in use, and the driver does not say by whom."]
    causes = []
    listed_bytes = 0
    for process in card.processes:
        listed_bytes += process.used_bytes or 0
        if _is_ours(process.pid):
            continue
        if process.used_bytes is not None and process.used_bytes < _NOTABLE_BYTES:
            continue
        used = "an unknown share" if process.used_bytes is None else format_bytes(process.used_bytes)
        text = f"Another process holds {used} of {card.name}: pid {process.pid} ({process.name or 'name unknown'})"
        if process.used_bytes is not None and process.used_bytes > _POOL_SHARE * card.total_bytes:
            text += (
                ", which looks like a TensorFlow pool taken whole at the start, by an earlier run or a notebook: end "
                "it, or let it call autobatch.configure_memory() first thing"
            )
        causes.append(text + ".")
    # The driver's own share, which no process is charged for, is a few hundred MiB.
    unlisted_bytes = card.used_bytes - listed_bytes
    if all(each.used_bytes is not None for each in card.processes) and unlisted_bytes > 0.05 * card.total_bytes:
        causes.append(
            f"{format_bytes(unlisted_bytes)} of {card.name} are in use by no process that can be seen from here: "
            "another container or user, or a process that ended without giving them back."
        )
    return causes


def _is_ours(pid: int) -> bool:
    """Return True if ``pid`` is this process, or one that it started: a worker that runs its trials."""
    if pid == os.getpid():
        return True
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return f"PPid:\t{os.getpid()}" in lines


def _growth_is_off(device: str) -> bool:
    tf: Any = sys.modules.get("tensorflow")
    if tf is None or os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() in ("1", "true"):
        return False
    gpus = tf.config.list_physical_devices("GPU")
    index = int(limits.physical_device(device).rpartition(":")[2])
    return index < len(gpus) and not tf.config.experimental.get_memory_growth(gpus[index])
