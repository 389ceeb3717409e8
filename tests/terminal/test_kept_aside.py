"""Windows in which TensorFlow's lines are kept aside, in processes of their own: what is on standard error then."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autobatch.terminal import kept_aside

HERE = Path(__file__).parent
DUMP = HERE / "allocator_dump.txt"


def run(case, *arguments, **environment):
    """Return the exit status, standard output, and standard error without the dump, and how often that was there."""
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    process = subprocess.run(
        [sys.executable, str(HERE / "windows.py"), case, str(DUMP), *map(str, arguments)],
        capture_output=True,
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        timeout=60,
        check=False,
    )
    dump = DUMP.read_bytes()
    error = process.stderr
    return process.returncode, process.stdout.decode(), error.replace(dump, b"").decode(), error.count(dump)


def test_prints_come_through_in_order_and_the_dumps_do_not():
    lines = [f"{where} {i}" for i in range(50) for where in ("outside", "inside", "and at once")]
    assert run("order") == (0, "", "\n".join([*lines, "no failure, no dump", ""]), 0)


def test_an_interrupt_leaves_standard_error_as_it_was():
    assert run("interrupted") == (0, "", "left 0 times for ever, seldom until the next\ninside\noutside\n", 0)


def test_lines_of_any_thread_come_through_beside_two_trainings():
    assert run("threads") == (0, "", "".join(f"line {i}\n" for i in range(200)), 0)


def test_what_nobody_has_dealt_with_is_printed():
    assert run("shown") == (0, "", "end\n", 2)


def test_at_its_debug_level_the_logger_gets_the_lines():
    code, told, error, dumps = run("logged")
    assert (code, error, dumps) == (0, "", 0)
    assert "autobatch DEBUG TensorFlow's lines of a failure that was expected:\nW0000" in told
    assert DUMP.read_text() in told


@pytest.mark.parametrize(
    ("case", "number", "words"),
    [
        ("segfault", signal.SIGSEGV, "last words\nFatal Python error: Segmentation fault"),
        (
            "abort",
            signal.SIGABRT,
            "F0000 00:00:1795964932.742629   20763 bfc_allocator.cc:411] Check failed: it is broken\n",
        ),
        ("crash_beside_a_child", signal.SIGKILL, ""),
    ],
)
def test_a_crash_shows_everything(case, number, words):
    code, _, error, dumps = run(case)
    assert code == -number
    assert dumps == 1
    assert error.startswith(words)


def test_children_are_heard_and_have_windows_of_their_own():
    code, _, error, dumps = run("children")
    assert (code, dumps) == (0, 0)
    assert sorted(error.splitlines()) == ["child: 0", "in the child", "late"]


def test_standard_error_may_be_replaced_or_closed_between_windows(tmp_path):
    assert run("replaced", tmp_path / "second") == (0, "", "first\nthird\n", 0)
    assert (tmp_path / "second").read_text() == "second\n"


def test_nothing_is_lost_or_raised_where_the_process_between_is_killed():
    assert run("relay_killed") == (0, "", "before\nbetween\nin the pipe of nobody\nafter\n", 0)


@pytest.mark.parametrize(
    "environment",
    [{"AUTOBATCH_KEEP_ASIDE": "0"}, {"TF_CPP_MIN_LOG_LEVEL": "0"}, {"TF_CPP_MAX_VLOG_LEVEL": "1"}],
    ids=str,
)
def test_whoever_asks_for_all_gets_all(environment):
    code, _, error, dumps = run("shown", **environment)
    assert (code, error, dumps) == (0, "end\n", 2)
    code, _, error, dumps = run("order", **environment)
    assert dumps == 51


def test_a_window_without_output_costs_next_to_nothing(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    seconds = []
    for _ in range(300):
        started = time.perf_counter()
        with kept_aside.window():
            pass
        seconds.append(time.perf_counter() - started)
    kept_aside.end()
    # 12 microseconds on a quiet machine; a step takes a millisecond or more.
    assert sorted(seconds)[30] < 2e-4


def test_the_process_serves_several_trainings_and_ends_when_nobody_needs_it(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    kept_aside.end()
    with kept_aside.window():
        first = kept_aside._relay
    kept_aside.end_soon()
    kept_aside._timer.cancel()
    with kept_aside.window():
        kept_aside._end_if_idle()
        assert kept_aside._relay is first, "it was used just now"
        monkeypatch.setattr(kept_aside, "_IDLE_SECONDS", 0.0)
        kept_aside._timer.cancel()
        kept_aside._end_if_idle()
        assert kept_aside._relay is first, "a window is open"
        kept_aside._timer.cancel()
    kept_aside._timer.join()
    kept_aside._end_if_idle()
    assert kept_aside._relay is None
    assert kept_aside._timer is None
    assert first._process.wait(10) == 0


def test_start_up_noise_is_left_out_of_a_workers_last_words():
    from autobatch.terminal.start_up_noise import without_start_up_noise

    noise = (
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
        "I0000 00:00:1795964147.732719    1443 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU "
        "will not be used.\n"
        "2025-11-29 14:56:06.113828: I tensorflow/core/platform/cpu_feature_guard.cc:210] This TensorFlow binary is "
        "optimized to use available CPU instructions in performance-critical operations.\n"
        "To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with the appropriate "
        "compiler flags.\n"
        "E0000 00:00:1795964152.527505    1443 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error\n"
        "E0000 00:00:1795964152.527505    1443 cuda_fft.cc:477] Unable to register cuFFT factory: Attempting\n"
    )
    words = "Traceback\n  of the user's\nF0000 00:00:1 1 x.cc:1] Check failed\nWARNING: mine"
    assert without_start_up_noise(noise + words) == words
    assert without_start_up_noise(words + "\n" + noise) == words + "\n"
