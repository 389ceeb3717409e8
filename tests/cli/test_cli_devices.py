"""``autobatch devices`` and memory limits as a share, with cards made by hand."""

from __future__ import annotations

import pytest

from autobatch.cli import arguments, main, totals
from autobatch.cli.exit_codes import UsageError
from autobatch.memory import nvml
from autobatch.memory.nvml import NvmlAnswer, NvmlCard, NvmlProcess

GIB = 2**30
H100 = NvmlCard(
    0, "NVIDIA H100", "GPU-a", "0000:01", 80 * GIB, 60 * GIB, 20 * GIB, (NvmlProcess(42, "python\x1b", GIB),)
)
T4 = NvmlCard(1, "Tesla T4", "GPU-b", "0000:02", 16 * GIB, 16 * GIB, 0, ())
HIDDEN = NvmlCard(2, "Tesla T4", "GPU-c", "0000:03", 16 * GIB, 16 * GIB, 0, None, mig_enabled=True)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def have(*found: NvmlCard, reason: str = "") -> None:
        monkeypatch.setattr(nvml, "devices", lambda: NvmlAnswer(found, reason))

    return have


def test_cards_and_who_uses_them(cards, capfd):
    cards(H100, T4, HIDDEN, reason="GPU 3 is lost")
    assert main(["devices"]) == 0
    out = capfd.readouterr().out
    assert "GPU 0: NVIDIA H100\n  memory   80 GiB, 60 GiB free\n  used by  python\\x1b (pid 42): 1 GiB\n" in out
    assert "GPU 1: Tesla T4\n  memory   16 GiB, 16 GiB free\n  used by  nobody\n" in out
    assert "split    into MIG instances" in out
    assert "the driver would not tell" in out
    assert "Not all cards answered: GPU 3 is lost." in out
    assert "Host: " in out


def test_no_driver(cards, capfd):
    cards(reason="NVML Shared Library Not Found")
    assert main(["devices"]) == 0
    assert capfd.readouterr().out.startswith("No NVIDIA GPU: NVML Shared Library Not Found.")


def test_limits_in_force(cards, capfd, monkeypatch):
    cards()
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "1")
    monkeypatch.setenv("TF_CPU_BFC_MEM_LIMIT_IN_MB", "64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["devices"]) == 0
    assert "limit    64 MiB" in capfd.readouterr().out


def test_a_share_is_of_the_device_that_will_be_used(cards):
    cards(H100, T4)
    assert totals.total_bytes("GPU:0") == 80 * GIB
    assert totals.total_bytes("GPU:1") == 16 * GIB
    assert totals.total_bytes("CPU") == totals.host_total_bytes()
    with pytest.raises(UsageError, match="cannot be told"):
        totals.total_bytes(None)
    cards(T4)
    assert totals.total_bytes(None) == 16 * GIB
    cards()
    assert totals.total_bytes(None) == totals.host_total_bytes()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "1048576\n"}, 2**20),
        ({"memory/memory.limit_in_bytes": "2097152\n"}, 2**21),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_the_hosts_total_is_the_control_groups_where_that_is_less(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    unlimited = totals.host_total_bytes(tmp_path / "absent")
    assert unlimited > 2**27
    assert totals.host_total_bytes(tmp_path) == (expected or unlimited)


@pytest.mark.parametrize(
    ("text", "value"),
    [("512MiB", 512 * 2**20), ("1.5GB", 1_500_000_000), ("80%", arguments.Share(0.8)), ("100 %", arguments.Share(1.0))],
)
def test_memory_limits(text, value):
    assert arguments.memory_limit(text) == value
