"""The same promises on a GPU, where there is one that TensorFlow sees."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from autobatch.memory import nvml, oom
from autobatch.memory.oom import FailureKind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not nvml.devices().cards, reason=f"no GPU: {nvml.devices().reason}"),
]

MIB = 2**20

SCENARIO = """
import json, sys, time
from autobatch.memory import arena, limits, oom, nvml
arena.limit_memory("1GiB")
no_wait = arena.without_allocation_wait()
import tensorflow as tf
if not tf.config.list_physical_devices("GPU"):
    print(json.dumps(None)); sys.exit()
limit = limits.find_limit("GPU:0")
begin = time.perf_counter()
try:
    with tf.device("GPU:0"):
        tf.zeros([512 << 20])
    kind = None
except tf.errors.ResourceExhaustedError as error:
    found = oom.diagnose(error)
    kind = [found.kind.value, found.requested_bytes]
seconds = time.perf_counter() - begin
card = nvml.devices().for_tensorflow("GPU:0", device_name=limits.tensorflow_device_name("GPU:0"))
print(json.dumps({
    "no_wait": no_wait, "limit": limit.limit_bytes, "enforced": limit.enforced, "kind": kind, "seconds": seconds,
    "in_use": limits.bytes_in_use("GPU:0"), "card": card is not None and card.name,
    "device": limits.tensorflow_device_name("GPU:0"), "default": limits.default_device(),
}))
"""


def test_a_logical_limit_fails_cleanly_and_at_once():
    done = subprocess.run([sys.executable, "-c", SCENARIO], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    if seen is None:
        pytest.skip("the driver sees a GPU, TensorFlow does not")
    assert seen["default"] == "GPU:0"
    assert (seen["limit"], seen["enforced"]) == (1024 * MIB, True)
    assert seen["kind"] == ["device", 2048 * MIB]
    assert seen["no_wait"] is True
    assert seen["seconds"] < 8
    assert seen["in_use"] < 64 * MIB
    assert seen["card"] == seen["device"]


def test_the_failure_of_an_unlimited_gpu_is_the_devices():
    code = (
        "from autobatch.memory import arena; arena.configure_memory()\n"
        "import tensorflow as tf\n"
        "assert tf.config.list_physical_devices('GPU')\n"
        "tf.random.normal([1 << 44])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    if "AssertionError" in done.stderr:
        pytest.skip("the driver sees a GPU, TensorFlow does not")
    diagnosis = oom.diagnose_exit(done.returncode, done.stderr[-8000:])
    assert (diagnosis.kind, diagnosis.requested_bytes) == (FailureKind.DEVICE, 4 << 44)
