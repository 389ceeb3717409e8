"""Which limit counts. Files of /proc and /sys are read from a copy; NVML's answers are given."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from autobatch.memory import arena, limits, nvml
from autobatch.memory.nvml import NvmlAnswer, NvmlCard, NvmlProcess
from autobatch.records import Limit

GIB = 2**30
MIB = 2**20


@pytest.fixture(autouse=True)
def no_arena(monkeypatch):
    for name in ("TF_CPU_ALLOCATOR_USE_BFC", "TF_CPU_BFC_MEM_LIMIT_IN_MB"):
        monkeypatch.delenv(name, raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def test_the_users_limit_is_the_smallest():
    assert limits.find_limit("CPU:0", 5 * MIB) == Limit(5 * MIB, "the limit that was asked for")


def test_the_arena_is_a_limit_that_is_enforced(monkeypatch):
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "1")
    monkeypatch.setenv("TF_CPU_BFC_MEM_LIMIT_IN_MB", "64")
    expected = Limit(64 * MIB, "TensorFlow's limited CPU arena", enforced=True)
    assert limits.find_limit("CPU:0") == expected
    assert limits.find_limit("CPU:0", 64 * MIB) == expected  # of equals, the enforced one
    assert limits.find_limit("CPU:0", 63 * MIB).limit_bytes == 63 * MIB
    assert expected not in limits.all_limits("GPU:0")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_the_host_has_a_limit():
    limit = limits.find_limit("CPU:0")
    assert 0 < limit.limit_bytes < 2**50
    assert not limit.enforced


def test_meminfo(tmp_path):
    write(tmp_path, {"meminfo": "MemTotal:       16 kB\nMemFree:   1 kB\nMemAvailable:      8 kB\n"})
    assert limits._mem_available_bytes(tmp_path / "meminfo") == 8192
    assert limits._mem_available_bytes(tmp_path / "absent") is None


def test_cgroup_v2_takes_the_tightest_on_the_way_up(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "100\n",
            "sys/fs/cgroup/outer/memory.max": "1000\n",
            "sys/fs/cgroup/outer/memory.current": "700\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 400\ninactive_file 200\n",
        },
    )
    assert limits._cgroup_available_bytes(root) == (500, f"cgroup v2 limit at {root}/sys/fs/cgroup/outer")


def test_cgroup_v1_inside_a_container_is_the_mount_itself(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/docker/absent\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "300\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 50\n",
        },
    )
    assert limits._cgroup_available_bytes(root) == (750, f"cgroup v1 limit at {root}/sys/fs/cgroup/memory")


def test_no_cgroup_limit(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "300\n",
        },
    )
    assert limits._cgroup_available_bytes(root) is None
    assert limits._cgroup_available_bytes(tmp_path / "elsewhere") is None


@pytest.fixture
def card(monkeypatch):
    def put(*processes: NvmlProcess, started: bool = False) -> None:
        held = NvmlCard(0, "H100", "GPU-0", "0000:00:00.0", 80 * GIB, 20 * GIB, 60 * GIB, processes)
        monkeypatch.setattr(nvml, "devices", lambda: NvmlAnswer((held,), environ={}))
        monkeypatch.setattr(arena, "devices_started", lambda: started)
        monkeypatch.setattr(limits, "_bytes_held", lambda device: GIB)

    return put


def test_a_gpu_before_the_start_pays_for_its_context(card):
    card()
    assert limits.find_limit("GPU:0").limit_bytes == 20 * GIB - 400 * MIB


def test_a_gpus_pool_can_be_used_again(card):
    card(NvmlProcess(os.getpid(), "python", 10 * GIB), NvmlProcess(1, "other", 50 * GIB), started=True)
    assert limits.find_limit("GPU:0").limit_bytes == 30 * GIB - 400 * MIB


def test_the_only_process_of_a_card_is_this_one(card):
    card(NvmlProcess(1, "python", 60 * GIB), started=True)
    assert limits.find_limit("GPU:0").limit_bytes == 80 * GIB - 400 * MIB


def test_a_pool_that_cannot_be_told_sets_no_limit_below_the_card(card):
    card(NvmlProcess(1, "python", 30 * GIB), NvmlProcess(2, "python", 30 * GIB), started=True)
    assert limits.find_limit("GPU:0") == Limit(80 * GIB, "all memory of H100")


def test_a_gpu_without_a_driver(monkeypatch):
    monkeypatch.setattr(nvml, "devices", lambda: NvmlAnswer(reason="no driver"))
    assert limits.find_limit("GPU:0") == Limit(None, "no limit known")
    assert limits.find_limit("GPU:0", MIB).limit_bytes == MIB


def fake_tensorflow(visible: list[str], logical: dict[str, list[int | None]]) -> types.SimpleNamespace:
    """What of ``tf.config`` tells which card is behind a name; no machine here has two."""
    devices = {name: types.SimpleNamespace(name=name) for name in ("a", "b", "c")}
    parts = {
        name: [types.SimpleNamespace(memory_limit=limit) for limit in limits_mib]
        for name, limits_mib in logical.items()
    }
    config = types.SimpleNamespace(
        list_physical_devices=lambda kind: list(devices.values()),
        get_visible_devices=lambda kind: [devices[name] for name in visible],
        get_logical_device_configuration=lambda gpu: parts.get(gpu.name),
        experimental=types.SimpleNamespace(get_device_details=lambda gpu: {"device_name": f"model {gpu.name}"}),
    )
    return types.SimpleNamespace(config=config)


def test_a_logical_device_is_traced_to_its_card(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", fake_tensorflow(["b", "c"], {"b": [512, 256]}))
    assert [limits.physical_device(f"GPU:{index}") for index in range(3)] == ["GPU:1", "GPU:1", "GPU:2"]
    assert limits.tensorflow_device_name("GPU:2") == "model c"
    assert [arena.arena_limit_bytes(f"GPU:{index}") for index in range(4)] == [512 * MIB, 256 * MIB, None, None]
    assert arena.arena_limit_bytes() == 512 * MIB
