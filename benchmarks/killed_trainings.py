"""Trainings that are killed again and again, and end with the bits of one that was not.

``python benchmarks/killed_trainings.py [--kills 300] [--strategy mirrored] [--output results/killed_trainings.json]``

Each training runs in a process of its own, with a backup behind every update or every few. It is killed at a random
moment: by SIGKILL, by SIGTERM, or by SIGABRT, as an allocator that gives up does. Then the same call is made again, and
killed again, until it comes to its end. Its weights, optimizer, seeds and History are compared bit for bit with those
of a training that nobody has killed.

The data count their samples: a metric counts, in a variable, how often each was seen in an epoch, and its value is the
number of those that were seen exactly once. With ``--strategy mirrored`` two replicas share each update, and their
metrics, seeds and statistics are compared apart. TensorFlow runs one operation at a time, so that sums have one order.
Processes are forks of one that has imported TensorFlow and started nothing. POSIX only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np
import tensorflow as tf

import autobatch
from autobatch.tensors.variables import components

SAMPLES, FEATURES, TARGET, EPOCHS = 60, 6, 10, 12
KINDS = ("arrays", "tf.data", "PyDataset")
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM,) * 2 + (signal.SIGABRT,) * 2


class SeenOnce(keras.metrics.Metric):
    """Number of samples that an epoch has seen exactly once, by the numbers in the second column of the targets."""

    def __init__(self):
        super().__init__(name="seen_once")
        self.seen = self.add_weight(shape=(SAMPLES,), initializer="zeros", name="seen")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.assign_add(tf.reduce_sum(tf.one_hot(tf.cast(y_true[:, 1], tf.int32), SAMPLES), 0))

    def result(self):
        return tf.reduce_sum(tf.cast(tf.equal(self.seen, 1.0), tf.float32))


def arrays():
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(SAMPLES, FEATURES)).astype("float32")
    y = np.stack([numbers.normal(size=SAMPLES), np.arange(SAMPLES)], 1).astype("float32")
    return x, y


class Batches(keras.utils.PyDataset):
    """Batches of 7; with ``shuffled`` in an order that NumPy's global numbers change at the end of each epoch."""

    def __init__(self, shuffled: bool) -> None:
        super().__init__()
        self.x, self.y = arrays()
        self.order, self.shuffled = np.arange(SAMPLES), shuffled

    def __len__(self):
        return -(-SAMPLES // 7)

    def __getitem__(self, index):
        rows = self.order[7 * index : 7 * index + 7]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        if self.shuffled:
            np.random.shuffle(self.order)


def data(kind: str, shuffled: bool):
    if kind == "arrays":
        return arrays()
    if kind == "PyDataset":
        return Batches(shuffled)
    samples = tf.data.Dataset.from_tensor_slices(arrays())
    return (samples.shuffle(SAMPLES, seed=4) if shuffled else samples).batch(4)


def model():
    made = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    made.compile(keras.optimizers.Adam(0.01), lambda y, found: tf.square(y[:, :1] - found), metrics=[SeenOnce()])
    return made


def two_replicas():
    cpus = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


class Phase(keras.callbacks.Callback):
    """Notes where a training is, and takes the time of real updates: a few thousandths of a second each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def note(self, phase: str) -> None:
        aside = self.path.with_suffix(".new")
        aside.write_text(phase)
        aside.replace(self.path)

    def on_train_batch_begin(self, batch, logs=None):
        self.note("an update")
        time.sleep(0.005)

    def on_train_batch_end(self, batch, logs=None):
        self.note("between updates")

    def on_test_batch_begin(self, batch, logs=None):
        self.note("validation")
        time.sleep(0.005)

    def on_epoch_begin(self, epoch, logs=None):
        self.note("the beginning of an epoch")


def train(folder: Path, kind: str, shuffled: bool, every: int | None, searches: bool, replicated: bool) -> dict:
    phase = Phase(folder / "phase")
    phase.note("the search" if searches else "compilation")
    keras.utils.set_random_seed(5)
    with two_replicas().scope() if replicated else contextlib.nullcontext():
        made = model()
    options = {"backup": folder / "backup", "backup_every": every} if every else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training with")
        warnings.filterwarnings("error", "The backup")  # one that cannot be read
        history = autobatch.fit(
            made,
            data(kind, shuffled),
            target_batch=TARGET,
            micro_batch="auto" if searches else 2 if replicated else 4,
            cache=False,
            epochs=EPOCHS,
            shuffle=shuffled,
            validation_data=arrays(),
            validation_batch_size=20,
            callbacks=[phase],
            verbose=0,
            **options,
        )
    phase.note("the end")
    digest = hashlib.sha256()
    for variable in components([*made.variables, *made.optimizer.variables]):
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return {"digest": digest.hexdigest(), "history": history.history}


def in_fork(task, output: Path, *, limits: bool = True) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if limits:
            tf.config.threading.set_inter_op_parallelism_threads(1)
            tf.config.threading.set_intra_op_parallelism_threads(1)
        output.write_text(json.dumps(task()))
        status = 0
    except BaseException:  # noqa: BLE001 - the parent reads what it was
        output.write_text(json.dumps({"error": traceback.format_exc()}))
    finally:
        os._exit(status)


def ended(child: int, output: Path, kill_at: float | None = None, by: int = signal.SIGKILL) -> dict:
    """Wait for a process, kill it at ``kill_at``; return its result, or the signal that it died of."""
    sent = False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if kill_at is not None and not sent and time.monotonic() >= kill_at:
            os.kill(child, by)
            sent = True
        time.sleep(0.002)
    return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else json.loads(output.read_text())


def campaign(kills: int, seed: int, seconds: float, replicated: bool) -> dict:
    moments = random.Random(seed)
    places, signals = collections.Counter(), collections.Counter()
    per_case: dict[str, dict] = {}
    whole: dict[tuple, tuple[dict, float]] = {}
    cases = [(kind, shuffled) for kind in KINDS for shuffled in (True, False)]
    begun = time.monotonic()
    done = trainings = different = broken = writing = miscounted = 0
    problems: list[str] = []
    while done < kills and time.monotonic() - begun < seconds:
        kind, shuffled = cases[trainings % len(cases)]
        searches, every = moments.random() < 0.2, moments.choice((1, 1, 3))
        trainings += 1
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            key = kind, shuffled, searches
            if key not in whole:
                since = time.monotonic()
                task = functools.partial(train, folder, kind, shuffled, None, searches, replicated)
                whole[key] = ended(in_fork(task, folder / "out"), folder / "out"), time.monotonic() - since
            expected, lasts = whole[key]
            task = functools.partial(train, folder, kind, shuffled, every, searches, replicated)
            while True:
                by = moments.choice(SIGNALS)
                kill_at = time.monotonic() + moments.uniform(0.05, 1.3) * lasts if done < kills else None
                result = ended(in_fork(task, folder / "out"), folder / "out", kill_at, by)
                if "signal" not in result:
                    break
                done += 1
                phase = folder / "phase"
                places[phase.read_text() if phase.exists() else "the start"] += 1
                signals[signal.Signals(result["signal"]).name] += 1
                if any(path.name.startswith((".new-", ".old-")) for path in folder.glob("backup/.*")):
                    writing += 1
            case = per_case.setdefault(
                f"{kind}, {'shuffled' if shuffled else 'in order'}", {"trainings": 0, "bit-identical": 0}
            )
            case["trainings"] += 1
            if "error" in result:
                broken += 1
                problems.append(f"{key}: {result['error'][-600:]}")
            elif result != expected:
                different += 1
                problems.append(f"{key}: every {every}: {result} instead of {expected}")
            else:
                case["bit-identical"] += 1
            counts = result.get("history", {}).get("seen_once", [])
            miscounted += counts != [float(SAMPLES)] * EPOCHS
            shutil.rmtree(folder / "backup", ignore_errors=True)
        print(f"\r{done} kills, {trainings} trainings, {different + broken} not as they should be", end="", flush=True)
    print()
    return {
        "kills": done,
        "by signal": dict(signals),
        "by place": dict(places.most_common()),
        "while a backup was written or removed": writing,
        "trainings": trainings,
        "trainings that ended with other bits": different,
        "trainings that ended with an error": broken,
        "trainings with a sample lost or seen twice": miscounted,
        "cases": per_case,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "problems": problems,
    }


def side_by_side(jobs: int, kills: int, seed: int, seconds: float, replicated: bool) -> dict:
    """Run ``jobs`` campaigns at a time, each with its share of the kills and a seed of its own; return their sums."""
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name) / str(job) for job in range(jobs)]
        children = [
            in_fork(
                functools.partial(campaign, -(-kills // jobs), seed + job, seconds, replicated), output, limits=False
            )
            for job, output in enumerate(outputs)
        ]
        results = [ended(child, output) for child, output in zip(children, outputs, strict=True)]
    total = results[0]
    for result in results[1:]:
        total = added(total, result)
    return total | {"minutes": max(result["minutes"] for result in results)}


def added(one, other):
    if isinstance(one, dict):
        return {
            key: added(one[key], other[key]) if key in one and key in other else {**other, **one}[key]
            for key in {**one, **other}
        }
    return one + other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60.0, help="end sooner, with the kills made so far")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="campaigns at a time")
    parser.add_argument("--strategy", choices=("mirrored",), help="train on two replicas")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    replicated = arguments.strategy is not None
    result = side_by_side(arguments.jobs, arguments.kills, arguments.seed, 60 * arguments.minutes, replicated)
    about = {"autobatch": autobatch.__version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    about |= {"strategy": arguments.strategy or "none", "python": platform.python_version(), "cores": os.cpu_count()}
    text = json.dumps({"about": about, **result}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
