"""Limits on the bytes that may be used on a device, each with its source.

A limit is compared with the peak of TensorFlow's allocator (`peak_bytes`), which counts bytes that this process holds
already. So where a source gives what is *free*, the bytes that the allocator holds are added to it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from autobatch.memory import arena, control_groups, nvml
from autobatch.records import Limit
from autobatch.units import format_bytes

CUDA_CONTEXT_BYTES = 400 * 2**20
"""Allowance for a process's CUDA context and libraries, outside TensorFlow's pool; they take about 300 to 500 MiB."""

_CGROUP_TOTALS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1


def default_device() -> str:
    """Return "GPU:0" if TensorFlow sees a GPU, else "CPU:0". Does not start the devices."""
    return "GPU:0" if _tensorflow().config.get_visible_devices("GPU") else "CPU:0"


def find_limit(device: str, user_limit_bytes: int | None = None) -> Limit:
    """Return the smallest of `all_limits`; its ``limit_bytes`` is None if no limit of ``device`` is known."""
    found = [limit for limit in all_limits(device, user_limit_bytes) if limit.limit_bytes is not None]
    if not found:
        return Limit(None, "no limit known")
    # Of equal limits, the one that the allocator itself holds: its failures need no second opinion.
    return min(found, key=lambda limit: (limit.limit_bytes or 0, not limit.enforced))


def all_limits(device: str, user_limit_bytes: int | None = None) -> tuple[Limit, ...]:
    """Return every limit known for ``device`` ("GPU:0", "CPU:0"), each with its source in words."""
    limits = []
    if user_limit_bytes is not None:
        limits.append(Limit(user_limit_bytes, "the limit that was asked for"))
    on_gpu = device.startswith("GPU")
    arena_bytes = arena.arena_limit_bytes(device)
    if arena_bytes is not None:
        source = "TensorFlow's logical device" if on_gpu else "TensorFlow's limited CPU arena"
        limits.append(Limit(arena_bytes, source, enforced=True))
    if on_gpu:
        limits += _gpu_limits(device)
    else:
        limits += _host_limits(device)
    return tuple(limits)


def peak_bytes(device: str) -> int | None:
    """Return the most bytes that TensorFlow's allocator held on ``device`` since `reset_peak`.

    None where the allocator keeps no count: the CPU with oneDNN off and no arena. Starts TensorFlow's devices.
    """
    return _memory_info(device, "peak")


def bytes_in_use(device: str) -> int | None:
    """Return what TensorFlow's allocator holds on ``device`` now, in bytes; None where it keeps no count."""
    return _memory_info(device, "current")


def reset_peak(device: str) -> None:
    """Let `peak_bytes` start again from what is in use now; do nothing where the allocator keeps no count."""
    try:
        _tensorflow().config.experimental.reset_memory_stats(device)
    except ValueError as error:
        _require_device(device, error)


def _memory_info(device: str, field: str) -> int | None:
    try:
        info = _tensorflow().config.experimental.get_memory_info(device)
    except ValueError as error:
        _require_device(device, error)
        return None
    return int(info[field])


def _require_device(device: str, error: ValueError) -> None:
    """Refuse a wrong device name. ``error`` may also come from an allocator without statistics, which is no fault."""
    if "stats" not in str(error):
        raise ValueError(f'A device is written as "GPU:0" or "CPU:0", and must exist. Received: {device!r}') from error


def _gpu_limits(device: str) -> list[Limit]:
    card = nvml.devices().for_tensorflow(physical_device(device), device_name=tensorflow_device_name(device))
    if card is None:
        return []
    limits = [Limit(card.total_bytes, f"all memory of {card.name}")]
    if not arena.devices_started():
        usable = max(card.free_bytes - CUDA_CONTEXT_BYTES, 0)
        limits.append(Limit(usable, f"free on {card.name} by NVML, less {format_bytes(CUDA_CONTEXT_BYTES)} for CUDA"))
        return limits
    pool = _pool_bytes(card)
    if pool is not None:
        usable = card.free_bytes + max(pool, _bytes_held(device))
        limits.append(Limit(usable, f"free on {card.name} by NVML, and what this process's pool holds"))
    return limits


def _pool_bytes(card: nvml.NvmlCard) -> int | None:
    """Return the bytes that TensorFlow's pool took from the card, in use or free within it; None if that is unknown.

    TensorFlow reports only what is in use within the pool; the driver reports what the process holds. Inside a
    container a process does not know its pid outside, so a card's only process is taken to be this one.
    """
    processes = card.processes or ()
    own = [each for each in processes if each.pid == os.getpid()] or (processes if len(processes) == 1 else [])
    if not own or own[0].used_bytes is None:
        return None
    return max(own[0].used_bytes - CUDA_CONTEXT_BYTES, 0)


def physical_device(device: str) -> str:
    """Return the name of the physical device behind the logical ``device``: "GPU:1" may be half of "GPU:0"."""
    tf: Any = sys.modules.get("tensorflow")
    if tf is None:
        return device
    behind = []
    physical = tf.config.list_physical_devices("GPU")
    for gpu in tf.config.get_visible_devices("GPU"):
        parts = tf.config.get_logical_device_configuration(gpu)
        behind += [physical.index(gpu)] * (1 if parts is None else len(parts))
    index = int(device.rpartition(":")[2])
    return f"GPU:{behind[index]}" if index < len(behind) else device


def tensorflow_device_name(device: str) -> str | None:
    """Return the card model that TensorFlow sees behind ``device``; None if it is not loaded or does not say."""
    tf: Any = sys.modules.get("tensorflow")
    if tf is None:
        return None
    gpus = tf.config.list_physical_devices("GPU")
    index = int(physical_device(device).rpartition(":")[2])
    if index >= len(gpus):
        return None
    name = tf.config.experimental.get_device_details(gpus[index]).get("device_name")
    return None if name is None else str(name)


def _host_limits(device: str) -> list[Limit]:
    held = _bytes_held(device)
    limits = []
    available = _mem_available_bytes()
    if available is not None:
        limits.append(Limit(available + held, "MemAvailable of /proc/meminfo, and what this process's allocator holds"))
    group = _cgroup_available_bytes()
    if group is not None:
        limits.append(Limit(group[0] + held, group[1]))
    return limits


def _bytes_held(device: str) -> int:
    if "tensorflow" not in sys.modules or not arena.devices_started():
        return 0
    return bytes_in_use(device) or 0


def _mem_available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available_bytes(root: Path = Path("/")) -> tuple[int, str] | None:
    """Return the bytes left under the tightest memory limit from this process's control group up to the root.

    The limit's source in words comes second. The result is None if no group on the way has a limit.
    """
    found = [
        (available, f"cgroup {group.version} limit at {group.directory}")
        for group in control_groups.memory_groups(root)
        if (available := group.available_bytes()) is not None
    ]
    return min(found, default=None)


def host_total_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the machine's memory in bytes, or the control group's limit if that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _CGROUP_TOTALS:
        try:
            text = (cgroup / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():  # "max" is no limit
            total = min(total, int(text))
    return total


def _tensorflow() -> Any:
    import tensorflow

    return tensorflow
