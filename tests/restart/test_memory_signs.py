"""Signs of memory that ran out, read from files as the kernel writes them."""

import os

import pytest

from autobatch.restart.memory_signs import MemorySigns

GIB = 2**20  # in KiB, as /proc/meminfo has it


class Host:
    """The file systems of a machine, in a folder."""

    def __init__(self, root):
        self.root = root
        (root / "proc/7").mkdir(parents=True)
        (root / "dev").mkdir()
        self.memory(available=20 * GIB)
        self.vmstat(3)

    def memory(self, *, available, total=32 * GIB):
        (self.root / "proc/meminfo").write_text(f"MemTotal:   {total} kB\nMemAvailable:   {available} kB\n")

    def vmstat(self, kills):
        (self.root / "proc/vmstat").write_text(f"pgfault 12\noom_kill {kills}\n")

    def group(self, version, kills, *, limit=None, use=0, inactive=0):
        if version == "v2":
            (self.root / "proc/7/cgroup").write_text("0::/job\n")
            directory = self.root / "sys/fs/cgroup/job"
            names = ("memory.max", "memory.current", "inactive_file", "memory.events")
        else:
            (self.root / "proc/7/cgroup").write_text("4:memory:/job\n0::/\n")
            directory = self.root / "sys/fs/cgroup/memory/job"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control")
        directory.mkdir(parents=True, exist_ok=True)
        no_limit = "max" if version == "v2" else 2**63 - 4096
        (directory / names[0]).write_text(f"{no_limit if limit is None else limit}\n")
        (directory / names[1]).write_text(f"{use}\n")
        (directory / "memory.stat").write_text(f"{names[2]} {inactive}\n")
        (directory / names[3]).write_text(f"oom 9\noom_kill {kills}\n")
        return directory

    def watched(self):
        signs = MemorySigns(self.root)
        signs.begin(7)
        return signs


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_counter_of_the_processes_own_group_decides(host, version):
    directory = host.group(version, 2)
    signs = host.watched()
    host.vmstat(9)  # somebody else's process
    assert signs.kernels_kill() == ""
    host.group(version, 3)
    assert signs.kernels_kill() == f"oom_kill of {directory}: 2 -> 3"


def test_without_a_group_the_hosts_counter_decides(host):
    signs = host.watched()
    assert signs.kernels_kill() == ""
    host.vmstat(4)
    assert signs.kernels_kill() == "oom_kill of /proc/vmstat: 3 -> 4"


def test_memory_that_was_nearly_gone_before_counts(host):
    signs = host.watched()
    assert signs.nearly_gone() == ""
    host.memory(available=GIB // 2)
    signs.look()
    host.memory(available=25 * GIB)  # what a dying process gives back
    signs.look()
    assert signs.nearly_gone() == "512 MiB of 32 GiB were left of the host's memory"
    signs.begin(7)
    assert signs.nearly_gone() == ""


def test_a_page_cache_that_fills_a_group_is_no_want_of_memory(host):
    directory = host.group("v2", 0, limit=2**30, use=2**30, inactive=2**29)
    assert host.watched().nearly_gone() == ""
    host.group("v2", 0, limit=2**30, use=2**30, inactive=2**20)
    assert host.watched().nearly_gone() == (f"1 MiB of 1 GiB were left of the limit of the control group {directory}")


def test_a_machine_that_says_nothing(tmp_path):
    signs = MemorySigns(tmp_path)
    signs.begin(os.getpid())
    assert (signs.kernels_kill(), signs.nearly_gone(), signs.shared_memory_is_full()) == ("", "", "")
    assert signs.as_words() == "how much memory there was is not known"
