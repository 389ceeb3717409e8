"""Control groups of a process that limit its memory, of both versions, in a container or not. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**60  # version 1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group on the way from a process's own up to the root; ``is_own`` for the one that it is in."""

    directory: Path
    version: str
    is_own: bool

    @property
    def _files(self) -> tuple[str, str, str, str]:
        if self.version == "v1":
            return "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
        return "memory.max", "memory.current", "inactive_file", "memory.events"

    @property
    def exists(self) -> bool:
        """True if the group is one that counts memory."""
        return (self.directory / self._files[0]).is_file()

    def limit_bytes(self) -> int | None:
        """Return the limit; None if there is none."""
        limit = _read_int(self.directory / self._files[0])
        return None if limit is None or limit >= _NO_LIMIT else limit

    def available_bytes(self) -> int | None:
        """Return the bytes left under the limit; None if there is none."""
        limit = self.limit_bytes()
        if limit is None:
            return None
        # Page cache counts as use but is given back on demand, so what is inactive of it is free.
        use = _read_int(self.directory / self._files[1]) or 0
        return max(limit - max(use - (read_field(self.directory / "memory.stat", self._files[2]) or 0), 0), 0)

    def kills(self) -> int | None:
        """Return how many of its processes the kernel has killed for memory; None if the kernel does not count."""
        return read_field(self.directory / self._files[3], "oom_kill")


def memory_groups(root: Path = Path("/"), process: str = "self") -> list[MemoryGroup]:
    """Return the groups of a process, from its own up to the root, that count memory."""
    try:
        lines = (root / "proc" / process / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, mounts = "v2", ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            version, mounts = "v1", ["sys/fs/cgroup/memory"]
        else:
            continue
        for mount in mounts:
            base = root / mount
            group = base / path.lstrip("/")
            # In a container the path is often the host's and absent here; the mount's root is then the group itself.
            own = next((each for each in (group, *group.parents) if each.is_dir()), group)
            for directory in (group, *group.parents):
                each = MemoryGroup(directory, version, is_own=directory == own)
                if directory.is_relative_to(base) and each.exists:
                    found.append(each)
    return found


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" means no limit


def read_field(path: Path, name: str) -> int | None:
    """Return the number behind ``name`` in a file of the kernel's, one such pair a line; None if it is not there."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None
