"""Runs out of memory for real, in every way that a CPU can, and prints what that looked like.

    python provoke.py plain   no arena, oneDNN off: an allocation that is too large fails at once
    python provoke.py arena   64 MiB arena, oneDNN off: each failure waits ten seconds, so they run side by side

Prints JSON: under "messages" an object a provocation, with its name, the exception's classes and message, and what
`oom.diagnose` makes of the live exception; under "seen" what `limits` says in such a process.
``messages/recorded.json`` holds the classes and messages of one run of both modes.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

MODE = sys.argv[1]
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
if MODE == "arena":
    os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"
    os.environ["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = "64"

import keras  # noqa: E402 - the environment must stand before
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from arena_process import note_statistics, seen  # noqa: E402

from autobatch.memory import oom  # noqa: E402

TOO_MANY = 1 << 44
MIB_OF_FLOATS = 1 << 18


def inject() -> tf.Tensor:
    return tf.random.normal([TOO_MANY])


class Injector(keras.layers.Layer):
    def call(self, inputs):
        return inputs + inject()[0]


def fit(layer: keras.layers.Layer, inputs: np.ndarray, *, jit_compile: bool = False) -> None:
    model = keras.Sequential([layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    model.fit(inputs, np.zeros((len(inputs), 1), "float32"), batch_size=len(inputs), verbose=0)


def numpy_too_large() -> np.ndarray:
    return np.ones(1 << 46, "float32")


def py_function(function: Callable[[], object]) -> None:
    def run():
        function()
        return 0

    tf.py_function(run, [], tf.int32)


def py_function_in_dataset(function: Callable[[], object]) -> None:
    def run(x):
        function()
        return x

    for _ in tf.data.Dataset.range(2).map(lambda x: tf.py_function(run, [x], tf.int64)):
        pass


def dataset_from_generator() -> None:
    def generator():
        numpy_too_large()
        yield 0

    for _ in tf.data.Dataset.from_generator(generator, output_signature=tf.TensorSpec([], tf.int64)):
        pass


def raise_(error: Exception) -> None:
    raise error


def chained(*, explicit: bool) -> None:
    try:
        inject()
    except tf.errors.ResourceExhaustedError as error:
        if explicit:
            raise RuntimeError("the training step failed") from error
        raise RuntimeError("the training step failed")  # noqa: B904 - the implicit chain is what is wanted


def suppressed() -> None:
    try:
        inject()
    except tf.errors.ResourceExhaustedError:
        raise KeyError("a bug") from None


def grouped() -> None:
    try:
        inject()
    except tf.errors.ResourceExhaustedError as error:
        raise ExceptionGroup("two failed", [ValueError("a bug"), error]) from None  # noqa: F821 - from Python 3.11 on


def interrupted() -> None:
    try:
        inject()
    except tf.errors.ResourceExhaustedError:
        raise KeyboardInterrupt  # noqa: B904 - as it comes in the middle of handling


def too_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        tf.io.read_file(__file__)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def mirrored() -> None:
    cpus = tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([cpu.name for cpu in cpus])

    @tf.function
    def step():
        def replica():
            context = tf.distribute.get_replica_context()
            size = tf.where(tf.equal(context.replica_id_in_sync_group, 1), tf.constant(TOO_MANY, tf.int64), 4)
            value = tf.random.normal(tf.reshape(size, [1]))
            return context.all_reduce("sum", tf.reduce_sum(value))

        return strategy.run(replica)

    step()


PLAIN: dict[str, Callable[[], object]] = {
    "eager": inject,
    "tf_function": lambda: tf.function(inject)(),
    "keras_fit": lambda: fit(Injector(), np.zeros((4, 3), "float32")),
    "xla": lambda: tf.function(lambda: tf.zeros([1 << 40]) + 1.0, jit_compile=True)(),
    "py_function_tensor": lambda: py_function(inject),
    "py_function_numpy": lambda: py_function(numpy_too_large),
    "py_function_tensor_in_dataset": lambda: py_function_in_dataset(inject),
    "py_function_numpy_in_dataset": lambda: py_function_in_dataset(numpy_too_large),
    "py_function_chained": lambda: py_function(lambda: chained(explicit=True)),
    "py_function_bug": lambda: py_function(lambda: raise_(RuntimeError("OOM when allocating tensor, says the user"))),
    "py_function_value_error": lambda: py_function(lambda: raise_(ValueError("out of memory, says the user"))),
    "from_generator_numpy": dataset_from_generator,
    "numpy": numpy_too_large,
    "python": lambda: bytearray(1 << 60),
    "mmap": lambda: mmap.mmap(-1, 1 << 60),
    "user_value_error": lambda: raise_(ValueError("OOM when allocating tensor with shape[8] and type float")),
    "user_runtime_error": lambda: raise_(RuntimeError("CUDA out of memory, or so it seems")),
    "shape_overflow": lambda: tf.zeros([1 << 62, 1 << 62]),
    "bad_shapes": lambda: tf.matmul(tf.zeros([2, 3]), tf.zeros([2, 3])),
    "device_full": lambda: tf.io.write_file("/dev/full", "x"),
    "too_many_files": too_many_files,
    "chained": lambda: chained(explicit=True),
    "chained_implicitly": lambda: chained(explicit=False),
    "suppressed": suppressed,
    "interrupted": interrupted,
    "two_replicas": mirrored,
}
if sys.version_info >= (3, 11):
    PLAIN["grouped"] = grouped

ARENA: dict[str, Callable[[], object]] = {
    "arena_eager": lambda: tf.zeros([80 * MIB_OF_FLOATS]),
    "arena_fit_convolution": lambda: fit(keras.layers.Conv2D(64, 3), np.zeros((64, 64, 64, 1), "float32")),
    "arena_dataset_batch": lambda: list(
        tf.data.Dataset.range(100).map(lambda x: tf.zeros([MIB_OF_FLOATS])).batch(100).take(1)
    ),
    "arena_xla": lambda: tf.function(
        lambda x: tf.sort(tf.reshape(x + tf.range(96.0)[:, None], [-1])), jit_compile=True
    )(tf.zeros([MIB_OF_FLOATS])),
}


def without_paths(message: str) -> str:
    for path, name in ((Path(__file__).parent, "."), (sys.prefix, "venv"), (sys.base_prefix, "python")):
        message = message.replace(str(path), name)
    return message


def record(name: str, provoke: Callable[[], object], records: list[dict[str, object]]) -> None:
    try:
        provoke()
    except BaseException as error:  # noqa: BLE001 - every exception is what this is about
        diagnosis = oom.diagnose(error)
        classes = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__[:-1]]
        records.append(
            {
                "name": name,
                "classes": classes,
                "message": without_paths(str(error)),
                "kind": diagnosis.kind.value,
                "requested_bytes": diagnosis.requested_bytes,
                "detail": diagnosis.detail,
            }
        )
    else:
        records.append({"name": name, "kind": "nothing was raised"})


def main() -> None:
    records: list[dict[str, object]] = []
    if MODE == "plain":
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
        note_statistics(tf)
        for name, provoke in PLAIN.items():
            with contextlib.redirect_stdout(sys.stderr):
                record(name, provoke, records)
    else:
        note_statistics(tf)
        # Failed allocations wait for ten seconds in TensorFlow; side by side they wait together.
        threads = [threading.Thread(target=record, args=(name, run, records)) for name, run in ARENA.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    json.dump({"messages": records, "seen": seen}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
