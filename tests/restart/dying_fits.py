"""A training that dies in a place of each start: ``dying_fits.py FOLDER MODE``. The folder counts the starts.

``kernel``: eats memory in a trial, then in an update; trains on in the third start, and trains once more as if nothing
had been. ``crash``: crashes in an update in a limited arena, and trains on in the second start.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import lean_imports  # noqa: F401 - for its effect

# isort: split

import keras
import numpy as np
import tensorflow as tf

import autobatch

folder, mode = Path(sys.argv[1]), sys.argv[2]
counter = folder / "starts"
start = int(counter.read_text()) + 1 if counter.exists() else 1
counter.write_text(str(start))
if mode == "crash":
    autobatch.limit_memory("64MiB")  # TensorFlow has started no device yet

TARGET, FEATURES = 96, 1200
place = {"in_trial": True, "updates": 0}


def eat():
    held = []
    while True:
        held.append(os.urandom(10**6) * 8)


def look(rows):
    if mode == "kernel":
        if start == 1 and place["in_trial"] and rows >= 48:
            eat()
        if start == 2 and place["updates"] == 5:
            eat()
    elif start == 1 and place["updates"] == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return rows


class Look(keras.layers.Layer):
    """Passes on what it gets, and looks at how much that is."""

    def call(self, inputs):
        rows = tf.numpy_function(look, [tf.shape(inputs)[0]], tf.int32)
        with tf.control_dependencies([rows]):
            return tf.identity(inputs)


class Count(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        place["in_trial"] = False

    def on_train_batch_end(self, batch, logs=None):
        place["updates"] += 1


def train(**options):
    keras.utils.set_random_seed(3)
    random = np.random.default_rng(0)
    x = random.normal(size=(6 * TARGET, FEATURES)).astype("float32")
    y = random.normal(size=(6 * TARGET, 1)).astype("float32")
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((FEATURES,)), Look(), *layers])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    history = autobatch.fit(model, x, y, target_batch=TARGET, callbacks=[Count()], cache=False, **options)
    return model, history


if mode == "kernel":
    model, history = train(epochs=2, verbose=2, backup=folder / "backup", backup_every=1)
    place.update(updates=100)
    whole, _ = train(epochs=2, verbose=0)
    differences = [
        float(np.max(np.abs(one.numpy() - other.numpy())))
        for one, other in zip(model.variables, whole.variables, strict=True)
    ]
else:
    model, history = train(epochs=3, verbose=2, micro_batch=24)
    differences = []
print(
    json.dumps(
        {
            "recoveries": [
                [each.update, each.phase, each.micro_batch_before, each.micro_batch_after, each.detail]
                for each in history.recoveries
            ],
            "largest_trial": max((trial.micro_batch for trial in history.report.trials if trial.peak_bytes), default=0),
            "planned": history.plan.micro_batch,
            "not_run": [trial.detail for trial in history.report.trials if "not run" in trial.detail],
            "difference": max(differences, default=0.0),
        }
    )
)
