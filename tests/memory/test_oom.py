"""Out of memory as it really looks: recorded messages, messages from upstream's source, and fresh provocations."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autobatch.memory import oom
from autobatch.memory.oom import FailureKind
from autobatch.memory.requested_bytes import requested_bytes

HERE = Path(__file__).parent
MESSAGES = HERE / "messages"

TENSOR = 4 << 44  # the fault injector's float32 tensor
ARRAY = 4 << 46  # NumPy's
MIB = 2**20

# What each of provoke.py's provocations is, whatever oom.py says.
EXPECTED: dict[str, tuple[FailureKind, int | None]] = {
    "eager": (FailureKind.DEVICE, TENSOR),
    "tf_function": (FailureKind.DEVICE, TENSOR),
    "keras_fit": (FailureKind.DEVICE, TENSOR),
    "xla": (FailureKind.DEVICE, 4 << 40),
    "py_function_tensor": (FailureKind.DEVICE, TENSOR),
    "py_function_numpy": (FailureKind.HOST, ARRAY),
    "py_function_tensor_in_dataset": (FailureKind.DEVICE, TENSOR),
    "py_function_numpy_in_dataset": (FailureKind.HOST, ARRAY),
    "py_function_chained": (FailureKind.DEVICE, TENSOR),
    "py_function_bug": (FailureKind.NOT_MEMORY, None),
    "py_function_value_error": (FailureKind.NOT_MEMORY, None),
    "from_generator_numpy": (FailureKind.HOST, ARRAY),
    "numpy": (FailureKind.HOST, ARRAY),
    "python": (FailureKind.HOST, None),
    "mmap": (FailureKind.HOST, None),
    "user_value_error": (FailureKind.NOT_MEMORY, None),
    "user_runtime_error": (FailureKind.NOT_MEMORY, None),
    "shape_overflow": (FailureKind.NOT_MEMORY, None),
    "bad_shapes": (FailureKind.NOT_MEMORY, None),
    "device_full": (FailureKind.NOT_MEMORY, None),
    "too_many_files": (FailureKind.NOT_MEMORY, None),
    "chained": (FailureKind.DEVICE, TENSOR),
    "chained_implicitly": (FailureKind.DEVICE, TENSOR),
    "suppressed": (FailureKind.NOT_MEMORY, None),
    "interrupted": (FailureKind.NOT_MEMORY, None),
    "two_replicas": (FailureKind.DEVICE, TENSOR),
    "grouped": (FailureKind.DEVICE, TENSOR),
    "arena_eager": (FailureKind.DEVICE, 80 * MIB),
    "arena_xla": (FailureKind.DEVICE, 96 * MIB),
    "arena_fit_convolution": (FailureKind.DEVICE, 64 * 62 * 62 * 64 * 4),
    "arena_dataset_batch": (FailureKind.HOST, None),
}
IN_THE_CHAIN = {"chained", "chained_implicitly", "grouped", "suppressed"}  # what counts is not in their own message


def load(name: str) -> Any:
    return json.loads((MESSAGES / name).read_text(encoding="utf-8"))


RECORDED = [each for each in load("recorded.json")["messages"] if each["name"] not in IN_THE_CHAIN]
# What benchmarks/gpu.py provoked: every one of those is memory.
RECORDED_BY_BENCHMARK = [
    each | {"name": f"{path.stem}: {each['name']}"}
    for path in sorted(MESSAGES.glob("recorded_*.json"))
    for each in load(path.name)["messages"]
]


def rebuild(classes: list[str], message: str) -> BaseException:
    """An exception with the names of a recorded one, for the reader of names and messages that `diagnose` is."""
    base: type[BaseException] = BaseException if "builtins.Exception" not in classes else Exception
    for full_name in reversed(classes):
        module, _, name = full_name.rpartition(".")
        if module != "builtins":
            base = type(name, (base,), {"__module__": module, "__qualname__": name})
        elif name not in ("Exception", "BaseException"):
            base = getattr(__import__("builtins"), name)
    error = base(message)
    assert str(error) == message
    return error


@pytest.mark.parametrize("record", RECORDED, ids=lambda record: record["name"])
def test_a_recorded_message_is_told_for_what_it_was(record):
    diagnosis = oom.diagnose(rebuild(record["classes"], record["message"]))
    assert (diagnosis.kind, diagnosis.requested_bytes) == EXPECTED[record["name"]]


@pytest.mark.parametrize("record", RECORDED_BY_BENCHMARK, ids=lambda record: record["name"])
def test_what_the_benchmark_provoked_is_memory(record):
    diagnosis = oom.diagnose(rebuild(record["classes"], record["message"]))
    assert diagnosis.is_memory
    assert (diagnosis.kind.value, diagnosis.requested_bytes) == (record["kind"], record["requested_bytes"])


@pytest.mark.parametrize("record", load("from_source.json"), ids=lambda record: record["name"])
def test_a_message_from_upstream_is_told_for_what_it_is(record):
    diagnosis = oom.diagnose(rebuild(record["classes"], record["message"]))
    assert diagnosis.kind.value == record["kind"]
    assert diagnosis.requested_bytes == record["requested_bytes"]


@pytest.mark.parametrize("record", load("exits.json"), ids=lambda record: record["name"])
def test_the_end_of_a_process_is_told_for_what_it_was(record):
    diagnosis = oom.diagnose_exit(record["returncode"], record["stderr_tail"], arena=record["arena"])
    assert diagnosis.kind.value == record["kind"]
    assert diagnosis.requested_bytes == record["requested_bytes"]


def test_provoked_without_an_arena(processes):
    records = {each["name"]: each for each in processes["provoked"].result()["messages"]}
    expected = {name: EXPECTED[name] for name in EXPECTED if not name.startswith("arena")}
    if sys.version_info < (3, 11):
        del expected["grouped"]
    assert {name: (FailureKind(each["kind"]), each["requested_bytes"]) for name, each in records.items()} == expected


@pytest.mark.slow
def test_provoked_in_the_arena(processes):
    records = {each["name"]: each for each in processes["provoked_in_arena"].result()["messages"]}
    expected = {name: EXPECTED[name] for name in EXPECTED if name.startswith("arena")}
    assert {name: (FailureKind(each["kind"]), each["requested_bytes"]) for name, each in records.items()} == expected


def test_every_recorded_message_is_expected_and_the_other_way_round():
    assert {each["name"] for each in load("recorded.json")["messages"]} == set(EXPECTED)


def test_every_row_decides_some_message():
    """A row that no message reaches is dead, or hidden by one above it."""
    deciding = set()
    for record in [*RECORDED, *load("from_source.json")]:
        error = rebuild(record["classes"], record["message"])
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__]
        for row in oom.EXCEPTION_ROWS:
            if any(row.classes.match(name) for name in names) and row.message.search(record["message"]):
                deciding.add(row.source)
                break
    assert [row.source for row in oom.EXCEPTION_ROWS if row.source not in deciding] == []


@pytest.mark.parametrize("record", RECORDED, ids=lambda record: record["name"])
def test_the_detail_is_one_short_line(record):
    detail = oom.diagnose(rebuild(record["classes"], record["message"])).detail
    assert detail
    assert "\n" not in detail
    assert len(detail) < 300


def test_a_poisoned_device_outweighs_the_memory_around_it():
    base = "tensorflow.python.framework.errors_impl."
    error = rebuild([f"{base}ResourceExhaustedError", "builtins.Exception"], "OOM when allocating tensor")
    error.__cause__ = rebuild([f"{base}InternalError", "builtins.Exception"], "CUDA_ERROR_ILLEGAL_ADDRESS")
    diagnosis = oom.diagnose(error)
    assert diagnosis.kind is FailureKind.POISONED
    assert not diagnosis.is_memory


def test_a_chain_that_goes_in_a_circle_ends():
    first, second = ValueError("one"), KeyError("two")
    first.__cause__, second.__cause__ = second, first
    assert oom.diagnose(first).kind is FailureKind.NOT_MEMORY


def test_a_users_class_of_the_same_name_is_the_users_own():
    error = rebuild(["models.ResourceExhaustedError", "builtins.Exception"], "OOM when allocating tensor")
    assert oom.diagnose(error).kind is FailureKind.NOT_MEMORY


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("OOM when allocating tensor with shape[8,128,1024] and type float on /job", 4 * MIB),
        ("OOM when allocating tensor with shape[2,3] and type bfloat16 on /job", 12),
        ("OOM when allocating tensor with shape[] and type complex128 on /job", 16),
        ("OOM when allocating tensor with shape[5] and type variant on /job", None),
        ("Out of memory while trying to allocate 123456 bytes.", 123456),
        ("Out of memory while trying to allocate 1.5GiB", 3 * 2**29),
        ("ran out of memory trying to allocate 400.00MiB (rounded to 419430400)requested by op Fill", 419430400),
        ("Unable to allocate 128. TiB for an array with shape (17592186044416,) and data type float64", 2**47),
        ("Failed to allocate memory for the batch of component 0", None),
        ("Limit: 64.00MiB", None),
    ],
)
def test_requested_bytes(message, size):
    assert requested_bytes(message) == size


def ended(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr[-2000:]


def test_killed():
    code, stderr = ended("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert code == -signal.SIGKILL
    assert oom.diagnose_exit(code, stderr).kind is FailureKind.HOST


@pytest.mark.skipif(sys.platform != "linux", reason="names the C++ library's file")
def test_bad_alloc():
    code, stderr = ended("import ctypes; ctypes.CDLL('libstdc++.so.6')._Znwm(ctypes.c_size_t(1 << 62))")
    assert code == -signal.SIGABRT
    diagnosis = oom.diagnose_exit(code, stderr)
    assert diagnosis.kind is FailureKind.HOST
    assert re.search("SIGABRT.*bad_alloc", diagnosis.detail)


def test_a_traceback_of_a_memory_error_and_one_of_a_bug():
    code, stderr = ended("bytearray(1 << 60)")
    assert oom.diagnose_exit(code, stderr).kind is FailureKind.HOST
    code, stderr = ended("import numpy; numpy.ones(1 << 46)")
    diagnosis = oom.diagnose_exit(code, stderr)
    assert (diagnosis.kind, diagnosis.requested_bytes) == (FailureKind.HOST, 8 << 46)
    code, stderr = ended("raise ValueError('OOM when allocating tensor with shape[8] and type float')")
    diagnosis = oom.diagnose_exit(code, stderr)
    assert (diagnosis.kind, diagnosis.requested_bytes) == (FailureKind.NOT_MEMORY, None)
    assert diagnosis.detail.startswith("ValueError: ")


def test_tensorflow_is_not_imported():
    code = "import sys; from autobatch.memory import arena, limits, nvml, oom, other_users; nvml.devices()\n"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code + "print('tensorflow' in sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )
    assert done.stdout.strip() == "False"
