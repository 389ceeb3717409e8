"""Limits given to real TensorFlow processes; conftest.py starts them, arena_process.py is what they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from autobatch.memory import arena

MIB = 2**20
SCRIPT = str(Path(__file__).with_name("arena_process.py"))


@pytest.fixture(scope="module")
def first(processes):
    return processes["first"].result()


def test_limited_before_tensorflow_is_imported(first):
    assert first["arena"] == 64 * MIB  # rounded down
    assert first["onednn"] is False
    assert first["default_device"] == "CPU:0"
    assert (first["limit"], first["enforced"]) == (64 * MIB, True)


def test_limiting_does_not_start_the_devices(first):
    assert first["started_by_limit"] is False
    assert first["still_not_started"] is True


def test_the_arena_keeps_count(first):
    assert 4 * MIB <= first["in_use"] < 5 * MIB
    assert first["in_use"] <= first["peak"] < 5 * MIB
    assert first["peak_after_reset"] < MIB
    assert first["wrong_device"][0] == "ValueError"
    assert first["wrong_device"][1].endswith("Received: 'CPU:7'")


def test_what_lies_in_the_middle_of_free_memory_is_laid_anew(first):
    assert first["room_beside_it"] is False
    assert first["room_when_laid_anew"] is True
    assert first["value_kept"] is True


def test_laying_anew_ends_at_the_first_failed_allocation(first):
    """Each waits ten seconds: what is free lies in small pieces then, for the larger values behind as well."""
    assert first["tried_until_a_failure"] == [0, 1]
    assert first["moved_before_it"] is True
    assert first["values_kept"] is True


def test_too_late_is_said_and_changes_nothing(first):
    assert first["started"] is True
    kind, message = first["too_late"]
    assert kind == "RuntimeError"
    assert "too late" in message
    assert "Call autobatch.limit_memory first thing" in message
    assert "autobatch.configure_memory" in first["too_late_to_configure"][1]
    assert first["environment_kept"] is True


def test_below_one_mib_is_refused_and_changes_nothing(first):
    kind, message = first["bad"]
    assert kind == "ValueError"
    assert "at least 1 MiB" in message
    assert "Received: " in message
    assert first["environment_after_bad"] is None


def test_the_wait_is_turned_off_through_the_private_configuration(first):
    """Fails where TensorFlow moves it: then trials on a GPU only lose ten seconds per failed allocation."""
    assert first["no_wait"] is True
    assert first["retry_disallowed"] is True
    assert first["too_late_not_to_wait"] is False


@pytest.mark.slow
def test_limited_after_keras_was_imported(processes):
    seen = processes["after_import"].result()
    assert seen["started_by_import"] is False
    assert seen["failure"][:2] == ["device", 80 * MIB]
    assert "bfc_cpu_allocator" in seen["failure"][2]
    assert (seen["limit"], seen["enforced"]) == (64 * MIB, True)
    for kind, message, file in seen["warnings"]:  # none where TensorFlow was built without oneDNN, or it was off
        assert kind == "AutobatchWarning"
        assert "TF_ENABLE_ONEDNN_OPTS=0" in message
        assert file == SCRIPT


@pytest.mark.slow
def test_started_by_hand_under_the_variables(processes):
    seen = processes["provoked_in_arena"].result()["seen"]
    assert seen["arena"] == 64 * MIB
    assert (seen["limit"], seen["enforced"]) == (64 * MIB, True)
    assert seen["peak"] >= 4 * MIB


def test_nothing_limited(processes):
    seen = processes["no_limit"].result()
    assert seen["arena"] is None
    assert seen["enforced"] is False
    # oneDNN's allocator keeps count, the plain one does not; which is the default depends on the processor.
    assert seen["peak"] is None or seen["peak"] >= 4 * MIB


def test_configuring_without_a_gpu_is_no_error(processes):
    seen = processes["no_limit"].result()
    assert seen["started_by_configure"] is False
    if seen["limit"] is not None and seen["configure_log"]:
        assert seen["configure_log"] == ["configure_memory: TensorFlow sees no GPU; nothing to configure"] * 2
    (growth_kind, growth_text), (limit_kind, _) = seen["configure_bad"]
    assert (growth_kind, limit_kind) == ("TypeError", "ValueError")
    assert growth_text.endswith("Received: 'yes' (of type str)")


def test_an_allocator_that_keeps_no_count(processes):
    seen = processes["provoked"].result()["seen"]
    assert seen["arena"] is None
    assert seen["peak"] is None
    assert seen["in_use"] is None
    assert seen["peak_after_reset"] is None
    assert seen["wrong_device"][0] == "ValueError"


def test_the_environment_of_a_worker(monkeypatch):
    monkeypatch.delenv("TF_NUM_INTEROP_THREADS", raising=False)
    assert arena.arena_environment(512 * MIB + 5) == {
        "TF_CPU_ALLOCATOR_USE_BFC": "1",
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": "512",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "TF_NUM_INTEROP_THREADS": "1",
    }
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "4")  # somebody has chosen
    assert arena.arena_environment(MIB)["TF_NUM_INTEROP_THREADS"] == "4"


def test_an_environment_below_one_mib():
    with pytest.raises(ValueError, match=r"at least 1 MiB.*Received: 1048575"):
        arena.arena_environment(MIB - 1)


@pytest.mark.parametrize(
    ("use", "limit", "expected"),
    [
        (None, "64", None),
        ("0", "64", None),
        ("1", "64", 64 * MIB),
        ("true", "64", 64 * MIB),
        ("1", None, 2**16 * MIB),  # TensorFlow's own default
    ],
)
def test_the_variables_are_recognised(monkeypatch, use, limit, expected):
    for name, value in (("TF_CPU_ALLOCATOR_USE_BFC", use), ("TF_CPU_BFC_MEM_LIMIT_IN_MB", limit)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert arena.arena_limit_bytes("CPU:0") == expected
    assert arena.arena_limit_bytes("GPU:0") is None


@pytest.mark.parametrize("limit", ["lots", 0, -1, "0MiB"])
def test_what_is_no_limit_is_refused(limit):
    with pytest.raises(ValueError, match="Received: "):
        arena.limit_memory(limit)


@pytest.mark.parametrize("limit", [None, True, 1.5])
def test_what_is_no_size_is_refused(limit):
    with pytest.raises(TypeError, match="Received: "):
        arena.limit_memory(limit)
