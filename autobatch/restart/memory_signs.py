"""Signs that a process died for want of host memory: the kernel's own counters, and how little was left before.

What was left is looked at while the process lives, since it gives everything back as it dies.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from autobatch.memory.control_groups import MemoryGroup, memory_groups, read_field
from autobatch.units import format_bytes

NEARLY_GONE = 0.05
"""Share of the memory that is left when a program as earlyoom or systemd-oomd kills; the kernel itself waits longer."""

LOOKED_BACK_SECONDS = 5.0
"""Seconds before a death in which memory must have been nearly gone to count."""


@dataclass(frozen=True, slots=True)
class _Left:
    """Bytes that were left of a total, at a time."""

    seconds: float
    left_bytes: int
    total_bytes: int
    where: str

    @property
    def share(self) -> float:
        return self.left_bytes / self.total_bytes if self.total_bytes else 1.0


class MemorySigns:
    """Watch over the memory that the process ``pid`` has; :meth:`look` is to be called every now and then.

    ``root`` is where the file systems ``proc``, ``sys`` and ``dev`` are found.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._pid = 0
        self._counted: dict[MemoryGroup, int] = {}
        self._kills_of_host: int | None = None
        self._seen: deque[_Left] = deque()

    def begin(self, pid: int) -> None:
        """Begin to watch another process."""
        self._pid = pid
        self._counted.clear()
        self._seen.clear()
        self._kills_of_host = self._host_kills()
        self.look()

    def look(self) -> None:
        """Note what is left now, and which control group the process is in: it may have moved."""
        now = time.monotonic()
        for group in memory_groups(self._root, str(self._pid)):
            kills = group.kills() if group.is_own else None
            if kills is not None:
                self._counted.setdefault(group, kills)
            limit, available = group.limit_bytes(), group.available_bytes()
            if limit is not None and available is not None:
                self._seen.append(_Left(now, available, limit, f"the limit of the control group {group.directory}"))
        available, total = self._host_memory()
        if total:
            self._seen.append(_Left(now, available, total, "the host's memory"))
        while self._seen and now - self._seen[0].seconds > LOOKED_BACK_SECONDS:
            self._seen.popleft()

    def kernels_kill(self) -> str:
        """Return in words by how much a counter of the kernel's kills for memory has risen; "" if none has.

        The counter of the process's own control group decides where there is one. The host's counts strangers too.
        """
        for group, before in self._counted.items():
            now = group.kills()
            if now is not None and now > before:
                return f"oom_kill of {group.directory}: {before} -> {now}"
        if self._counted:
            return ""
        before_of_host, now_of_host = self._kills_of_host, self._host_kills()
        if before_of_host is None or now_of_host is None or now_of_host <= before_of_host:
            return ""
        return f"oom_kill of /proc/vmstat: {before_of_host} -> {now_of_host}"

    def nearly_gone(self) -> str:
        """Return in words how little memory was left before the process died; "" if there was enough."""
        least = min(self._seen, key=lambda left: left.share, default=None)
        if least is None or least.share > NEARLY_GONE:
            return ""
        return f"{format_bytes(least.left_bytes)} of {format_bytes(least.total_bytes)} were left of {least.where}"

    def shared_memory_is_full(self) -> str:
        """Return in words that ``/dev/shm`` is full, as a SIGBUS of a process that writes there means; "" if not."""
        try:
            found = os.statvfs(self._root / "dev/shm")
        except OSError:
            return ""
        total, left = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        return f"/dev/shm of {format_bytes(total)} is full" if total and left <= 2**16 else ""

    def as_words(self) -> str:
        """Return what is known of memory in words, for a death that it does not explain."""
        least = min(self._seen, key=lambda left: left.share, default=None)
        if least is None:
            return "how much memory there was is not known"
        counts = bool(self._counted) or self._kills_of_host is not None
        counted = "the kernel counts no kill for memory, and " if counts else ""
        return f"{counted}at least {format_bytes(least.left_bytes)} were left of {least.where}"

    def _host_kills(self) -> int | None:
        return read_field(self._root / "proc/vmstat", "oom_kill")

    def _host_memory(self) -> tuple[int, int]:
        path = self._root / "proc/meminfo"
        available, total = read_field(path, "MemAvailable:"), read_field(path, "MemTotal:")
        return (0, 0) if available is None or total is None else (available * 1024, total * 1024)
