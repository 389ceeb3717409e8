"""Trainings in processes of their own, killed at chosen places and started again; it prints what became of each.

``python killed_fits.py FOLDER NAME...`` runs the cases of these names, or all. Each process is a fork of this one, made
before TensorFlow has started anything: importing it takes longer than a training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import autobatch
from autobatch.data import economy
from autobatch.tensors.variables import components

SAMPLES, FEATURES = 44, 6
NUMBERS = np.arange(SAMPLES)


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, FEATURES)).astype("float32")
    return x, random.normal(size=(SAMPLES, 1)).astype("float32")


def model(**compiled):
    made = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(1),
        ]
    )
    made.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **compiled)
    return made


def digest(trained):
    found = hashlib.sha256()
    for variable in components([*trained.variables, *trained.optimizer.variables, *trained.metrics_variables]):
        found.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return found.hexdigest()[:16]


class KillAt(keras.callbacks.Callback):
    """Kills its process behind an update, or at another place, counted from the start of this process."""

    def __init__(self, update=None, *, by=signal.SIGKILL, place="update"):
        super().__init__()
        self.update, self.by, self.place = update, by, place
        self.seen = 0

    def _at(self, place):
        if place == self.place:
            if self.seen == self.update:
                os.kill(os.getpid(), self.by)
            self.seen += 1

    def on_train_batch_end(self, batch, logs=None):
        self._at("update")

    def on_test_batch_end(self, batch, logs=None):
        self._at("validation")

    def on_epoch_end(self, epoch, logs=None):
        self._at("epoch")


class Numbers(keras.callbacks.Callback):
    """Draws a random number in every update and epoch, as callbacks of users' may."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def on_train_batch_end(self, batch, logs=None):
        self.drawn.append((batch, float(np.random.uniform())))

    def get_state(self):
        return {"drawn": self.drawn}

    def set_state(self, state):
        self.drawn = [tuple(pair) for pair in state["drawn"]]


class Batches(keras.utils.PyDataset):
    """Batches of 7 in an order that changes at the end of each epoch, by NumPy's global numbers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = data()
        self.order = NUMBERS.copy()

    def __len__(self):
        return -(-SAMPLES // 7)

    def __getitem__(self, index):
        rows = self.order[7 * index : 7 * index + 7]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        np.random.shuffle(self.order)


def seeded_dataset():
    return tf.data.Dataset.from_tensor_slices(data()).shuffle(SAMPLES, seed=5).batch(5).map(lambda x, y: (x + 0.0, y))


def of_unknown_length():
    return seeded_dataset().unbatch().filter(lambda x, y: x[0] > -1.0).batch(3)


def generated():
    def samples():
        yield from zip(*data(), strict=True)

    spec = (tf.TensorSpec([FEATURES], tf.float32), tf.TensorSpec([1], tf.float32))
    return tf.data.Dataset.from_generator(samples, output_signature=spec).shuffle(8, seed=3).batch(4)


def augmented(cached):
    """Numbers drawn from variables in the dataset; in a cache they are those of the first pass for ever."""
    generator, crop = tf.random.Generator.from_seed(7), layers.RandomCrop(FEATURES, 1, seed=3)

    def augment(x, y):
        wide = tf.concat([x, tf.zeros([2])], 0)[:, None, None]
        return tf.squeeze(crop(wide, training=True), [1, 2]) + generator.normal([]), y

    made = tf.data.Dataset.from_tensor_slices(data()).shuffle(SAMPLES, seed=2).map(augment)
    return (made.cache() if cached else made).shuffle(8, seed=4).batch(5)


def mapped(folder):
    path = folder / "x.npy"
    if not path.exists():
        np.save(path, data()[0])
    return np.load(path, mmap_mode="r"), data()[1]


DATA = {
    "arrays": lambda folder: data(),
    "mapped": mapped,
    "tf.data": lambda folder: seeded_dataset(),
    "unknown length": lambda folder: of_unknown_length(),
    "generated": lambda folder: generated(),
    "augmented": lambda folder: augmented(cached=False),
    "augmented once": lambda folder: augmented(cached=True),
    "PyDataset": lambda folder: Batches(),
    "PyDataset of workers": lambda folder: Batches(workers=2),
    "PyDataset of four workers": lambda folder: Batches(workers=4),
}


def mirrored(replicas):
    cpus = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(replicas)])


def train(
    folder,
    *,
    kind="arrays",
    killed=None,
    every=2,
    seed=11,
    epochs=3,
    callbacks=lambda folder: [],
    compiled=(),
    validation=None,
    replicas=1,
    **options,
):
    """One process of a training: the digest of its weights, its History, and what it warned of."""
    if seed is not None:
        keras.utils.set_random_seed(seed)
    with contextlib.nullcontext() if replicas == 1 else mirrored(replicas).scope():
        built = model(**dict(compiled))
    kind = DATA[kind](folder)
    if validation is not None:
        options["validation_data"] = DATA[validation](folder)
    numbers = Numbers()
    made = [numbers, *callbacks(folder)]
    settings = {"backup": folder / "backup", "backup_every": every} if every else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = autobatch.fit(
            built,
            kind,
            target_batch=10,
            micro_batch=4,
            epochs=epochs,
            verbose=0,
            callbacks=[*made, *([] if killed is None else [KillAt(**killed)])],
            **settings,
            **options,
        )
    return {
        "digest": digest(built),
        "history": history.history,
        "epochs": history.epoch,
        "numbers": numbers.drawn,
        "warnings": [str(each.message) for each in caught if each.category is autobatch.errors.AutobatchWarning],
        "left": sorted(path.name for path in folder.glob("backup/*")),
    }


def stopping(folder):
    return [
        keras.callbacks.EarlyStopping("loss", patience=1, min_delta=0.5, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=0.5),
        keras.callbacks.ModelCheckpoint(
            folder / "best.weights.h5", "loss", save_best_only=True, save_weights_only=True
        ),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
    ]


VALIDATION = {"validation_split": 0.25, "validation_batch_size": 4}
TERMINATED = {"update": 3, "by": signal.SIGTERM}
CASES = {
    "arrays": {"killed": [3, TERMINATED, {"update": 0, "place": "epoch"}], "every": 1},
    "mapped": {"kind": "mapped", "killed": [7]},
    "tf.data": {"kind": "tf.data", "killed": [7, TERMINATED], "every": 3},
    "unknown length": {"kind": "unknown length", "killed": [9], "every": 1},
    "generated": {"kind": "generated", "killed": [8]},
    "augmented": {"kind": "augmented", "killed": [7, 3], "validation": "tf.data", "validation_steps": 2},
    "augmented once": {"kind": "augmented once", "killed": [6, 3]},
    "PyDataset": {"kind": "PyDataset", "killed": [2, TERMINATED, 3], "every": 1},
    "PyDataset of workers": {"kind": "PyDataset of workers", "killed": [7]},
    "steps_per_epoch": {"kind": "tf.data", "killed": [4], "steps_per_epoch": 2, "epochs": 4},
    "callbacks": {
        "killed": [
            {"update": 4, "place": "validation"},
            {"update": 4, "place": "validation", "by": signal.SIGTERM},
            {"update": 0, "place": "epoch", "by": signal.SIGTERM},
        ],
        "callbacks": stopping,
        **VALIDATION,
        "epochs": 6,
        "every": 3,
    },
    # The process that goes on reads in another way than those that were killed.
    "arrays, then by rows": {"killed": [3], "every": 1, "economy": 1},
    "generated, then short queues": {"kind": "generated", "killed": [8], "economy": 2},
    "PyDataset of workers, then of fewer": {"kind": "PyDataset of four workers", "killed": [7], "economy": 2},
    "steps_per_execution": {"killed": [4], "compiled": {"steps_per_execution": 2}, "shuffle": False},
}

ON_REPLICAS = {
    "arrays on two": {
        "killed": [TERMINATED, {"update": 0, "place": "epoch"}],
        "every": 1,
        "replicas": 2,
        **VALIDATION,
    },
    "tf.data on three": {"kind": "tf.data", "killed": [7], "every": 3, "replicas": 3},
}

WHOLE = {
    "mapped": "arrays",
    "arrays, then by rows": "arrays",
    "generated, then short queues": "generated",
    "PyDataset of workers, then of fewer": "PyDataset of workers",
}
"""Cases whose uninterrupted training is that of another."""


def in_fork(task, output):
    """Run a task in a fork; return its result, or the signal that it died of."""
    child = os.fork()
    if not child:
        status = 1
        try:
            tf.config.threading.set_inter_op_parallelism_threads(1)
            tf.config.threading.set_intra_op_parallelism_threads(1)
            output.write_text(json.dumps(task()))
            status = 0
        except BaseException:  # noqa: BLE001 - the parent reads what it was
            output.write_text(json.dumps({"error": traceback.format_exc()}))
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return json.loads(output.read_text())


def run(name, folder, whole_runs):
    """A case: the uninterrupted training without backups, and the one that was killed and started again.

    Mapped files are trained as arrays in memory are, and it makes no difference how a process that goes on reads.
    """
    case = dict((CASES | ON_REPLICAS)[name])
    kills = [{"update": kill} if isinstance(kill, int) else kill for kill in case.pop("killed")]
    level = case.pop("economy", 0)
    whole, parts = folder / "whole", folder / "parts"
    whole.mkdir(parents=True)
    parts.mkdir()
    if name not in WHOLE:
        whole_runs[name] = in_fork(lambda: train(whole, **{**case, "every": None}), folder / "whole.json")
    result = {"whole": whole_runs[WHOLE.get(name, name)], "killed": []}
    for kill in kills:
        result["killed"].append(in_fork(lambda kill=kill: train(parts, killed=kill, **case), folder / "killed.json"))
        result["kept"] = sorted(path.name for path in parts.glob("backup/*"))
    newest = max(parts.glob("backup/update-*"))
    result["names"] = sorted(json.loads((newest / "state.json").read_text())["state"]["dict"]["variables"]["dict"])

    def resume():
        economy._SMALL_BYTES = 0  # these arrays are small
        with economy.economising(level):
            return train(parts, **case)

    result["resumed"] = in_fork(resume, folder / "resumed.json")
    for each, place in (("whole", whole), ("resumed", parts)):
        log = place / "log.csv"
        result[each]["log"] = log.read_text() if log.exists() else ""
    return result


def main():
    folder, *names = sys.argv[1:]
    results, whole_runs = {}, {}
    for place, name in enumerate(names or CASES):
        results[name] = run(name, Path(folder) / str(place), whole_runs)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
