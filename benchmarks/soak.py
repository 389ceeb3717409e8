"""A long training that runs out of memory at random places, and what it holds and ends with.

``python benchmarks/soak.py [--updates 10000] [--failures 100] [--intrusions 40] [--output results/soak.json]``

A dense model over sequences of changing length trains in a limited CPU arena, where failures are TensorFlow's
own. In some updates, chosen at random, a layer asks for more than there is, above a number of samples, in its forward
or in its backward pass. An intruder takes most of the arena's free memory for a few updates, and gives it back. After
each update it is noted what the device's allocator holds and which micro-batches ran; after each epoch, in which every
sample must have been seen once, also the process's memory, and how many tensors are alive, of how many bytes.

Then another process trains on the same samples with the micro-batches that were noted, and nothing fails. Both must end
with the same weights. Each failed allocation waits ten seconds, so that 100 of them take 17 minutes. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

RESULTS = Path(__file__).parent / "results" / "soak.json"
MIB = 2**20
LIMIT_MIB = 128
TARGET, PER_EPOCH, FEATURES = 32, 50, 16
LENGTHS = tuple(range(32, 321, 32))
TOO_MANY = 1 << 44
WARM_UP = 100
"""Updates before memory is looked at: slots, accumulators and traces are made in the first ones."""


# -- model and data, alike in both processes --------------------------------------------------------------------------


def samples_of(update: Any) -> tuple[Any, Any]:
    """Return the effective batch of one update in each epoch; behind the target stands the sample's number.

    It is made by TensorFlow alone: in a full arena a value that Python hands over to ``tf.data`` ends the process.
    """
    import tensorflow as tf

    update = tf.cast(update, tf.int32)
    length = LENGTHS[0] * (1 + update * 7 % len(LENGTHS))
    x = tf.random.stateless_normal(tf.stack([TARGET, length, FEATURES]), tf.stack([update, 1]))
    x = tf.ensure_shape(x, [TARGET, None, FEATURES])
    numbers = tf.cast(update * TARGET + tf.range(TARGET), tf.float32)
    return x, tf.stack([tf.reduce_mean(x[:, :, 0], 1), numbers], 1)


def build() -> Any:
    """The model, compiled; ``model.hungry`` is the layer that can be told to run out of memory."""
    import keras
    import tensorflow as tf

    def beside(values: Any, asks: Any) -> Any:
        """``values``, beside a tensor that no machine has room for if ``asks``."""
        wanted = tf.where(asks, TOO_MANY, 4)
        return values + 0.0 * tf.random.normal(tf.reshape(wanted, [1]))[0]

    class Hungry(keras.layers.Layer):
        """Runs out of memory for more samples than ``most``: one number for the forward pass, one for the backward."""

        def build(self, shape: Any) -> None:
            self.most = self.add_weight(shape=(2,), dtype="int32", initializer="zeros", trainable=False)
            self.most.assign([TARGET, TARGET])

        def call(self, inputs: Any) -> Any:
            asks = tf.shape(inputs)[0] > tf.convert_to_tensor(self.most)

            @tf.custom_gradient
            def through(values: Any) -> Any:
                return beside(values, asks[0]), lambda gradient: beside(gradient, asks[1])

            return through(inputs)

    class SeenOnce(keras.metrics.Metric):
        """Number of samples that an epoch has seen exactly once."""

        def __init__(self) -> None:
            super().__init__(name="seen_once")
            self.seen = self.add_weight(shape=(PER_EPOCH * TARGET,), initializer="zeros", name="seen")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.seen.assign_add(tf.reduce_sum(tf.one_hot(tf.cast(y_true[:, 1], tf.int32), PER_EPOCH * TARGET), 0))

        def result(self) -> Any:
            return tf.reduce_sum(tf.cast(tf.equal(self.seen, 1.0), tf.float32))

    keras.utils.set_random_seed(0)
    layers = keras.layers
    hungry = Hungry()
    model = keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            layers.Dense(192, activation="relu"),
            hungry,
            layers.BatchNormalization(),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.2, seed=1),
            layers.GlobalAveragePooling1D(),
            layers.Dense(256, activation="relu"),
            layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), lambda y, found: tf.square(y[:, :1] - found), metrics=[SeenOnce()])
    model.hungry = hungry
    return model


def values_of(model: Any) -> dict[str, Any]:
    """Weights, statistics, seeds and slots by their paths."""
    variables = [*model.variables, *model.optimizer.variables]
    return {f"{number} {each.path}": each.numpy() for number, each in enumerate(variables) if "seen" not in each.path}


# -- the training that things happen to -------------------------------------------------------------------------------


def train(folder: Path, updates: int, failures: int, intrusions: int) -> None:
    """Train and note what happens, as JSON and an .npz file in ``folder``."""
    import autobatch

    autobatch.limit_memory(LIMIT_MIB * MIB)
    import keras
    import numpy as np
    import tensorflow as tf

    from autobatch.memory import limits
    from autobatch.step.accumulated_step import AccumulatedStep
    from autobatch.watch import live_objects

    warnings.simplefilter("ignore")
    chosen = random.Random(0).sample(range(WARM_UP, updates), failures + intrusions)
    forward, backward = chosen[: failures // 2], chosen[failures // 2 : failures]
    intruded = {update: 1 + update % 6 for update in chosen[failures:]}
    sizes: list[int] = []
    ran: list[int] = []

    class Noting(AccumulatedStep):
        """The step that training runs, with the size of each pass noted."""

        def plain(self, data: Any) -> Any:
            ran.append(0)
            return super().plain(data)

        def accumulate(self, data: Any, micro_batch: int) -> Any:
            ran.append(micro_batch)
            return super().accumulate(data, micro_batch)

    class Trouble(keras.callbacks.Callback):
        """What happens in each update, and what is held behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.update = 0
            self.until = 0
            self.blocks: list[Any] = []
            self.device: list[int] = []
            self.host: list[int] = []
            self.alive: list[dict[str, Any]] = []
            self.seen: list[float] = []
            self.intrusions = 0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            few = 1 + self.update % (TARGET - 1)
            self.model.hungry.most.assign([few if self.update in which else TARGET for which in (forward, backward)])
            if self.update in intruded:
                self.until, self.blocks = self.update + intruded[self.update], []
                free = LIMIT_MIB * MIB - (limits.bytes_in_use("CPU:0") or 0)
                # A few samples still fit beside it, and the batches that wait. In blocks, since the allocator gives a
                # free piece whole to a block of more than half of it.
                taken = max(0, free // MIB - 5 - self.update % 16)
                self.blocks = [tf.zeros([MIB], tf.uint8) for _ in range(taken)]
                self.intrusions += 1
            elif self.update >= self.until:
                self.blocks = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            sizes.append(ran[-1])
            ran.clear()
            self.device.append((limits.bytes_in_use("CPU:0") or 0) - MIB * len(self.blocks))
            self.update += 1

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seen.append(float((logs or {})["seen_once"]))
            self.host.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            gc.collect()
            found, taken = live_objects.census(), len(self.blocks)
            tensors = {"tensors": found.tensors - taken, "tensor_bytes": found.host_tensor_bytes - MIB * taken}
            self.alive.append({"functions": found.functions, **tensors, "arrays": found.arrays})

    from autobatch.trial import live_trials

    live_trials.AccumulatedStep = Noting  # type: ignore[attr-defined]
    model, trouble = build(), Trouble()
    begun = time.perf_counter()
    history = autobatch.fit(
        model,
        tf.data.Dataset.range(PER_EPOCH).map(samples_of),
        target_batch=TARGET,
        epochs=updates // PER_EPOCH,
        shuffle=False,
        callbacks=[trouble],
        cache=False,
        verbose=0,
    )
    np.savez(folder / "trained.npz", **values_of(model))
    told = {
        "seconds": time.perf_counter() - begun,
        "planned": history.plan.micro_batch,
        "sizes": sizes,
        "recoveries": len(history.recoveries),
        "beside_copies": sum(each.micro_batch_before == each.micro_batch_after for each in history.recoveries),
        "forward": len(forward),
        "backward": len(backward),
        "intrusions": trouble.intrusions,
        "iterations": int(model.optimizer.iterations),
        "seen_once": trouble.seen,
        "device_bytes": trouble.device,
        "host_bytes": trouble.host,
        "alive": trouble.alive,
    }
    (folder / "trained.json").write_text(json.dumps(told))


# -- the training that nothing happens to -----------------------------------------------------------------------------


def replay(folder: Path) -> None:
    """Train with the micro-batches that were noted, in an arena that is large enough for anything."""
    import autobatch

    autobatch.limit_memory(8 * LIMIT_MIB * MIB)
    import numpy as np
    import tensorflow as tf

    from autobatch.step.accumulated_step import AccumulatedStep

    warnings.simplefilter("ignore")
    model = build()
    spec = (tf.TensorSpec((None, None, FEATURES), tf.float32), tf.TensorSpec((None, 2), tf.float32))
    step = AccumulatedStep(model, spec, effective_batch=TARGET, every_batch=TARGET)
    for update, size in enumerate(json.loads((folder / "trained.json").read_text())["sizes"]):
        batch = samples_of(update % PER_EPOCH)
        if size:
            step.accumulate(batch, size)
            step.apply()
        else:
            step.plain(batch)
    np.savez(folder / "replayed.npz", **values_of(model))


# -- what is printed --------------------------------------------------------------------------------------------------


def summary(folder: Path) -> dict[str, Any]:
    import numpy as np

    told = json.loads((folder / "trained.json").read_text())
    trained, replayed = np.load(folder / "trained.npz"), np.load(folder / "replayed.npz")
    assert trained.files == replayed.files
    differing = [name for name in trained.files if not np.array_equal(trained[name], replayed[name])]
    error = max(
        float(np.max(np.abs(trained[name] - replayed[name])) / max(1e-12, np.max(np.abs(replayed[name]))))
        for name in trained.files
        if trained[name].dtype.kind == "f"
    )
    device = np.array(told["device_bytes"][WARM_UP:])
    host = np.array(told["host_bytes"][WARM_UP // PER_EPOCH :])
    ends = device[PER_EPOCH - 1 :: PER_EPOCH]
    half = len(ends) // 2
    alive = told["alive"][WARM_UP // PER_EPOCH :]
    return {
        "updates": len(told["sizes"]),
        "iterations": told["iterations"],
        "planned": told["planned"],
        "told_to_fail_in_a_forward_pass": told["forward"],
        "told_to_fail_in_a_backward_pass": told["backward"],
        "intrusions": told["intrusions"],
        "recoveries": told["recoveries"],
        "of_them_beside_copies": told["beside_copies"],
        "sizes_run": {str(size): told["sizes"].count(size) for size in sorted(set(told["sizes"]))},
        "epochs_that_saw_each_sample_once": sum(seen == PER_EPOCH * TARGET for seen in told["seen_once"]),
        "epochs": len(told["seen_once"]),
        "device_bytes_least_and_most": [int(device.min()), int(device.max())],
        "device_bytes_at_ends_of_epochs": [int(ends.min()), int(ends.max())],
        "device_bytes_median_of_both_halves": [int(np.median(ends[:half])), int(np.median(ends[half:]))],
        "alive_at_ends_of_epochs_least_and_most": {
            name: [min(each[name] for each in alive), max(each[name] for each in alive)] for name in alive[0]
        },
        "host_bytes_first_and_last": [int(host[0]), int(host[-1])],
        "host_bytes_median_of_both_halves": [
            int(np.median(host[: len(host) // 2])),
            int(np.median(host[len(host) // 2 :])),
        ],
        "variables_that_differ_from_the_replay": len(differing),
        "largest_relative_difference": error,
        "seconds": round(told["seconds"], 1),
    }


def run(folder: Path, *given: str) -> None:
    done = subprocess.run([sys.executable, __file__, "--folder", str(folder), *given], check=False)
    if done.returncode:
        raise SystemExit(f"the process with {' '.join(given)} ended with {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10_000, help=f"whole epochs of {PER_EPOCH} (%(default)s)")
    parser.add_argument("--failures", type=int, default=100, help="how often memory runs out on purpose (%(default)s)")
    parser.add_argument("--intrusions", type=int, default=40, help="how often an intruder takes memory (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=("train", "replay"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.updates % PER_EPOCH or options.updates <= WARM_UP + 2 * PER_EPOCH:
        parser.error(
            f"--updates must be whole epochs of {PER_EPOCH}, and more than {WARM_UP + 2 * PER_EPOCH}. "
            f"Received: {options.updates}"
        )
    if options.part == "train":
        train(options.folder, options.updates, options.failures, options.intrusions)
    elif options.part == "replay":
        replay(options.folder)
    else:
        counts = ["--updates", str(options.updates), "--failures", str(options.failures)]
        counts += ["--intrusions", str(options.intrusions)]
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), "--part", "train", *counts)
            run(Path(folder), "--part", "replay", *counts)
            found = {
                "about": {"python": platform.python_version(), "system": platform.system()},
                **summary(Path(folder)),
            }
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
