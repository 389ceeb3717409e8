"""The parts of benchmarks/gpu.py, each run in a process of its own; the last line of JSON printed is the answer.

Every part runs on a GPU where TensorFlow sees one, and in a limited arena on the CPU otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("AUTOBATCH_CACHE_DIR", os.devnull)
sys.path.insert(0, str(Path(__file__).parent))

import autobatch

MIB = 2**20


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def on_gpu() -> bool:
    """Whether TensorFlow sees a GPU; asked of the driver, before TensorFlow is imported."""
    from autobatch.memory import nvml

    return bool(nvml.devices().cards) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def about() -> None:
    import keras
    import tensorflow as tf

    from autobatch.memory import limits

    device = limits.default_device()
    name = limits.tensorflow_device_name(device) or f"CPU, {os.cpu_count()} cores"
    say(
        device=device,
        device_name=name,
        on_gpu=device.startswith("GPU"),
        tensorflow=tf.__version__,
        keras=keras.__version__,
        build={key: str(value) for key, value in tf.sysconfig.get_build_info().items()},
    )


# -- 1: every way to run out ------------------------------------------------------------------------------------------


def provoke(name: str) -> None:
    """Run out of memory in the way of that name; then a smaller step in the same process."""
    limit_bytes = (1024 if on_gpu() else 128) * MIB
    another = None
    if name == "another_process":
        if not on_gpu():
            say(said="needs a GPU: an arena on the CPU is nobody else's")
            return
        free_bytes = _free_bytes()
        another = _hold(free_bytes - 3 * 1024 * MIB)
        autobatch.configure_memory(growth=True)
        limit_bytes = _free_bytes()
    elif name == "library_handle":
        if not on_gpu():
            say(said="needs a GPU: cuBLAS and cuDNN take their handles outside TensorFlow's pool")
            return
        # A pool of the whole card leaves no room beside it.
        limit_bytes = _free_bytes() - 300 * MIB
        autobatch.limit_memory(limit_bytes)
    else:
        autobatch.limit_memory(limit_bytes)
    if name != "eager_with_wait":
        from autobatch.memory import arena

        arena.without_allocation_wait()
    import tensorflow as tf

    from autobatch.memory import limits, oom

    device = limits.default_device()
    floats = limit_bytes // 4
    run = _PROVOCATIONS[name](floats)
    started = time.perf_counter()
    try:
        run()
    except Exception as error:  # noqa: BLE001 - which exceptions there are is the question
        seconds = time.perf_counter() - started
        diagnosis = oom.diagnose(error)
        classes = [f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__[:-1]]
        message = _without_paths(str(error))
        error.__traceback__ = None
    else:
        say(said="nothing was raised")
        if another is not None:
            another.kill()
        return
    del run
    smaller_fits = True
    try:
        float(tf.reduce_sum(tf.zeros([floats // 16])))
    except tf.errors.OpError:
        smaller_fits = False
    held = limits.bytes_in_use(device)
    if another is not None:
        another.kill()
    answer = {
        "classes": classes,
        "message": message,
        "kind": diagnosis.kind.value,
        "requested_bytes": diagnosis.requested_bytes,
    }
    extra = {
        "limit_bytes": limit_bytes,
        "failed_after_seconds": seconds,
        "smaller_fits": smaller_fits,
        "held_after_bytes": held,
    }
    say(**answer, **extra, record=answer)


def _without_paths(message: str) -> str:
    return re.sub(r'File "[^"]*/', 'File "', message)


def _eager(floats: int) -> Callable[[], Any]:
    import tensorflow as tf

    return lambda: tf.zeros([2 * floats])


def _graph(floats: int) -> Callable[[], Any]:
    import tensorflow as tf

    inputs = tf.ones([1024])
    step = tf.function(lambda x: tf.reduce_sum(tf.random.normal([2 * floats // 1024, 1024]) * x))
    return lambda: float(step(inputs))


def _xla(floats: int) -> Callable[[], Any]:
    import tensorflow as tf

    inputs = tf.ones([floats // 8])

    @tf.function(jit_compile=True)
    def step(x: Any) -> Any:
        # Sorted, so that the whole of it must stand in memory.
        return tf.sort(tf.stack([x * factor for factor in range(1, 17)], axis=1), axis=0)

    return lambda: step(inputs)


def _fit(*, jit_compile: bool) -> Callable[[int], Callable[[], Any]]:
    def prepare(floats: int) -> Callable[[], Any]:
        import keras
        import numpy as np
        from keras import layers

        model = keras.Sequential([keras.Input((64, 64, 3)), layers.Conv2D(64, 3), layers.Flatten(), layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=jit_compile)
        samples = floats // (62 * 62 * 64) * 2
        x = np.zeros((samples, 64, 64, 3), "float32")
        return lambda: model.fit(x, np.zeros((samples, 1), "float32"), batch_size=samples, verbose=0)

    return prepare


def _convolution_workspace(floats: int) -> Callable[[], Any]:
    """Input, filter and output fit; the fast algorithms' workspaces do not, and what is left is taken bit by bit."""
    import tensorflow as tf

    step = tf.function(lambda x, f: tf.reduce_sum(tf.nn.conv2d(x, f, 1, "SAME")))
    filters = tf.ones([5, 5, 64, 64])
    samples = max(floats // (128 * 128 * 64) // 4, 1)
    inputs = tf.ones([samples, 128, 128, 64])

    def run() -> None:
        kept = []
        for _ in range(64):
            float(step(inputs, filters))
            kept.append(tf.ones([floats // 32]))

    return run


def _update(optimizer: str, tenths: int) -> Callable[[int], Callable[[], Any]]:
    """One update of a layer whose weights take so many tenths of the limit."""

    def prepare(floats: int) -> Callable[[], Any]:
        import keras
        import numpy as np
        from keras import layers

        width = floats * tenths // 10 // 1024
        layer = layers.Dense(width, use_bias=False, kernel_initializer="zeros")
        model = keras.Sequential([keras.Input((1024,)), layer])
        model.compile(optimizer, "mse", jit_compile=False)
        x, y = np.zeros((1, 1024), "float32"), np.zeros((1, width), "float32")
        return lambda: model.fit(x, y, batch_size=1, verbose=0)

    return prepare


def _copy_to_device(floats: int) -> Callable[[], Any]:
    import numpy as np
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        raise SystemExit(say(said="needs a GPU: on the CPU there is nothing to copy"))
    host = np.ones([2 * floats], "float32")
    return lambda: tf.constant(host) + 1.0


def _library_handle(floats: int) -> Callable[[], Any]:
    import tensorflow as tf

    left = tf.zeros([floats - (64 * MIB) // 4])

    def run() -> float:
        a = tf.random.normal([512, 512])
        image = tf.random.normal([4, 64, 64, 32])
        total = tf.reduce_sum(tf.matmul(a, a)) + tf.reduce_sum(tf.nn.conv2d(image, tf.ones([3, 3, 32, 32]), 1, "SAME"))
        return float(total + tf.reduce_sum(tf.linalg.svd(a)[0]) + left[0])

    return run


_PROVOCATIONS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "eager": _eager,
    "eager_with_wait": _eager,
    "graph": _graph,
    "xla": _xla,
    "keras_fit": _fit(jit_compile=False),
    "keras_fit_xla": _fit(jit_compile=True),
    "convolution_workspace": _convolution_workspace,
    "optimizer_slots": _update("adam", 3),  # the weights fit, and Adam's first slot
    "gradients": _update("sgd", 6),  # the weights fit; their gradient is as large
    "copy_to_device": _copy_to_device,
    "library_handle": _library_handle,
    "another_process": _eager,
}


# -- another process that holds memory --------------------------------------------------------------------------------


def _free_bytes() -> int:
    from autobatch.memory import nvml

    card = nvml.devices().for_tensorflow("GPU:0") or nvml.devices().cards[0]
    return card.free_bytes


def _hold(held_bytes: int) -> subprocess.Popen[str]:
    """A process that holds so many bytes of the card until it is killed; they are held when this returns."""
    process = subprocess.Popen(
        [sys.executable, __file__, "hold", str(held_bytes)],
        stdin=subprocess.PIPE,  # it ends when this process does
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError(f"the process that was to hold {held_bytes} bytes ended with {process.wait()}")
    return process


def hold(held_bytes: str) -> None:
    autobatch.limit_memory(int(held_bytes))
    import tensorflow as tf

    # Two dimensions, for each is an int32; allocated and not written to.
    kept = tf.raw_ops.Empty(shape=[int(held_bytes) * 9 // 10 // MIB, MIB], dtype=tf.uint8)
    say(held_bytes=int(held_bytes), shape=kept.shape.as_list())
    sys.stdin.read()


# -- 2: the search ----------------------------------------------------------------------------------------------------


def search(name: str, precision: str, xla: str, seconds: str) -> None:
    """Autobatch's searches and the peers' over the same trials of one model; an answer after each of them."""
    ends = time.perf_counter() + float(seconds) * 0.9
    warnings.simplefilter("ignore")
    stretch = 4 if on_gpu() else 1
    limits_mib = {
        "transformer_encoder": 128,
        "resnet50": 420,
        "vae": 112,
        "unet": 128,
        "gpt": 192,
        "mobilenet_v3_small": 200,
    }
    limit_mib = limits_mib[name] * stretch + (256 if on_gpu() else 0)
    autobatch.limit_memory(limit_mib * MIB)
    from autobatch.memory import arena

    arena.without_allocation_wait()
    import keras

    keras.config.set_dtype_policy(precision)
    from models import MODELS
    from search_cost import SEARCHERS, Charged, Measurements

    from autobatch import opening
    from autobatch.records import TrialRequest
    from autobatch.search import replay

    entry = MODELS[name]
    started = time.perf_counter()
    model = entry.build()
    model.jit_compile = bool(int(xla))
    x, y = entry.data()
    trials = opening.open_trials(model, x, y, target_batch=None, memory_limit_bytes=None, headroom=0.0)

    class Live(Measurements):
        """Trials in this very process."""

        def _run(self, micro_batch: int, *, record: bool) -> dict[str, Any]:
            begun = time.perf_counter()
            result = trials.run(TrialRequest(micro_batch, record_allocations=record))
            seconds = time.perf_counter() - begun
            fields = {field: getattr(result, field) for field in type(result).__dataclass_fields__}
            trace = fields.pop("allocations")
            if trace is not None:
                self.traces[micro_batch] = trace
            if record:
                again = None if trace is None else replay.replayed_peak_bytes(trace, micro_batch)
                answer["recordings"].append(
                    {
                        "micro_batch": micro_batch,
                        "outcome": result.outcome.value,
                        "peak_bytes": result.peak_bytes,
                        "replayed_peak_bytes": again,
                        "steps": None if trace is None else len(trace.order),
                        "replayed_largest": None
                        if trace is None
                        else replay.largest_that_fits(trace, trials.environment.budget_bytes or 0, at_most=top),
                        "seconds": seconds,
                    }
                )
            return fields | {"outcome": result.outcome.value, "seconds": seconds}

    top = entry.largest_considered * stretch * 2
    measurements = Live(name, limit_mib, top)
    measurements.take(1)
    measurements.greeting = {
        "start_seconds": time.perf_counter() - started,
        "fixed_bytes_hint": trials.fixed_bytes_hint,
        "budget_bytes": trials.environment.budget_bytes,
        "estimate": None if (estimate := trials.estimate_sample()) is None else dataclasses.asdict(estimate),
    }
    del measurements.taken[1]
    answer: dict[str, Any] = {
        "limit_mib": limit_mib,
        "largest_considered": top,
        "start_seconds": measurements.greeting["start_seconds"],
        "true_largest": None,
        "searches": {},
        "recordings": [],
    }
    asked = ["autobatch", "autobatch exact", "Accelerate", "Lightning power", "Lightning binsearch"]
    for searcher in asked:
        if time.perf_counter() > ends:
            break
        charged = Charged(measurements)
        try:
            returned = SEARCHERS[searcher](charged)
        except ImportError as error:
            answer.setdefault("not_installed", []).append(f"{searcher}: {error.name}")
            continue
        answer["searches"][searcher] = {
            "returned": returned,
            "trials": len(charged.asked),
            "failures": sum(not measurements.fits(size) for size in charged.asked),
            "seconds": charged.trial_seconds,
            "sizes_in_order": charged.asked,
            "returned_was_run_and_fits": returned in charged.asked and measurements.fits(returned or 0),
        }
        say(**answer)
        if searcher == "autobatch exact":
            answer["true_largest"] = measurements.true_largest()
            answer["measurements"] = [measurements.taken[size] for size in sorted(measurements.taken)]
            say(**answer)


# -- 3: an intruder ---------------------------------------------------------------------------------------------------


def intruder() -> None:
    """Train at a target that does not fit; in the middle another process takes memory and the model needs more."""
    gpu = on_gpu()
    outer = None
    if gpu:
        # A card of 12 GiB, whatever it is: kernels count the elements of a tensor in 32 bits.
        if _free_bytes() > 14 * 1024 * MIB:
            outer = _hold(_free_bytes() - 12 * 1024 * MIB)
        autobatch.configure_memory(growth=True)
    else:
        autobatch.limit_memory("256MiB")
    import keras
    import numpy as np
    import tensorflow as tf
    from keras import layers

    from autobatch.memory import limits

    device = limits.default_device()
    limit_bytes = limits.find_limit(device).limit_bytes
    assert limit_bytes is not None
    taken = {"bytes": 0}
    target, updates, at_update = 256, 8, 3
    # Activations of a quarter of what there is at a quarter of the target, so that the target does not fit.
    width = max(limit_bytes // 4 // 4 // (target // 4) // 3, 1024)

    class Longer(layers.Layer):
        """Needs little until it is told otherwise; then as much again, a sample, as two thirds of the rest."""

        def build(self, input_shape: Any) -> None:
            self.floats = self.add_weight(shape=(), dtype="int64", initializer="zeros", trainable=False, name="floats")

        def call(self, inputs: Any) -> Any:
            count = tf.cast(tf.shape(inputs)[0], tf.int64) * self.floats.value + 1
            return inputs + 0.0 * tf.random.normal(tf.reshape(count, [1]))[0]

    class Grows(keras.callbacks.Callback):
        def __init__(self, layer: Any, micro_batch: int) -> None:
            super().__init__()
            self.layer, self.micro_batch, self.another, self.seen = layer, micro_batch, None, 0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if self.seen == at_update:
                free = _free_bytes() if gpu else limit_bytes - (limits.bytes_in_use(device) or 0)
                if gpu:
                    taken["bytes"] = free // 2
                    self.another = _hold(taken["bytes"])
                self.layer.floats.assign(int((0.7 if gpu else 1.1) * free) // 4 // self.micro_batch)
            self.seen += 1

        def on_train_end(self, logs: Any = None) -> None:
            if self.another is not None:
                self.another.kill()

    def build() -> tuple[Any, Any]:
        keras.utils.set_random_seed(0)
        longer = Longer()
        model = keras.Sequential([keras.Input((16,)), longer, layers.Dense(width, activation="relu"), layers.Dense(10)])
        model.compile(
            keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
        )
        return model, longer

    random = np.random.default_rng(0)
    x = random.normal(size=(target * updates, 16)).astype("float32")
    y = random.integers(0, 10, target * updates)
    model, longer = build()
    plan = autobatch.tune(model, x, y, target_batch=target).plan
    assert plan is not None
    callback = Grows(longer, plan.micro_batch)
    history = autobatch.fit(
        model,
        x,
        y,
        target_batch=target,
        micro_batch=plan.micro_batch,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
        memory_watch=False,
    )
    final = history.recoveries[-1].micro_batch_after if history.recoveries else plan.micro_batch
    trained = model.get_weights()
    iterations = int(model.optimizer.iterations.numpy())
    again, _ = build()
    autobatch.fit(again, x, y, target_batch=target, micro_batch=final, shuffle=False, verbose=0, memory_watch=False)
    errors = [
        float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-12))
        for a, b in zip(trained, again.get_weights(), strict=True)
        if np.issubdtype(a.dtype, np.floating)
    ]
    if outer is not None:
        outer.kill()
    say(
        plan=f"{plan.accumulation_steps} x {plan.micro_batch}",
        effective_batch=plan.effective_batch,
        intruder_bytes=taken["bytes"],
        intruder_at_update=at_update,
        recoveries=[(each.update, each.micro_batch_before, each.micro_batch_after) for each in history.recoveries],
        updates=iterations,
        updates_expected=updates,
        relative_error=max(errors),
    )


# -- 5: NVML ----------------------------------------------------------------------------------------------------------


def nvml() -> None:
    """The driver's library as autobatch reads it, beside the command that users know."""
    from autobatch.memory import nvml as ours

    if not on_gpu():
        say(ours=f"no card: {ours.devices().reason}", nvidia_smi=_nvidia_smi("--query-gpu=name"))
        return
    holder = _hold(2048 * MIB)
    cards = [
        {
            "index": card.index,
            "name": card.name,
            "uuid": card.uuid,
            "total_mib": card.total_bytes // MIB,
            "used_mib": card.used_bytes // MIB,
            "free_mib": card.free_bytes // MIB,
            "processes": [
                [each.pid, None if each.used_bytes is None else each.used_bytes // MIB] for each in card.processes or ()
            ],
        }
        for card in ours.devices().cards
    ]
    query = "--query-gpu=index,name,uuid,memory.total,memory.used,memory.free"
    say(
        held_mib=2048,
        ours=cards,
        nvidia_smi=_nvidia_smi(query),
        nvidia_smi_processes=_nvidia_smi("--query-compute-apps=pid,used_memory"),
    )
    holder.kill()


def _nvidia_smi(query: str) -> str | list[str]:
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.splitlines() or done.stderr.strip()
    return "there is no nvidia-smi"


PARTS = {
    "about": about,
    "provoke": provoke,
    "hold": hold,
    "search": search,
    "intruder": intruder,
    "nvml": nvml,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*sys.argv[2:])
