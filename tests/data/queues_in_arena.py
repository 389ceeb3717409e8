"""Run by the tests, in a process of its own: what waits in the input queue of a training in a limited CPU arena.

It prints, for each kind of data, how many effective batches more than before training are held after an update, and
what the report calls them.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

import autobatch

autobatch.limit_memory(sys.argv[1])

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from autobatch.data import fit_data  # noqa: E402
from autobatch.memory import limits  # noqa: E402

SAMPLES, TARGET, SIZE = 512, 64, 16 * 1024
X, Y = np.zeros((SAMPLES, SIZE // 4), "float32"), np.zeros(SAMPLES, "float32")


class Held(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.before, self.most = limits.bytes_in_use("CPU:0"), 0

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.1)  # the queue fills
        self.most = max(self.most, limits.bytes_in_use("CPU:0") - self.before)


def batches():
    for start in range(0, SAMPLES, TARGET // 4):
        yield X[start : start + TARGET // 4], Y[start : start + TARGET // 4]


def generated():
    signature = (tf.TensorSpec((None, SIZE // 4), "float32"), tf.TensorSpec((None,), "float32"))
    return (tf.data.Dataset.from_generator(batches, output_signature=signature),)


KINDS = {
    "arrays": lambda: (X, Y),
    "dataset": lambda: (tf.data.Dataset.range(SAMPLES).map(lambda _: (tf.zeros([SIZE // 4]), 0.0)).batch(16),),
    "generated": generated,
}

found = {}
for name, data in KINDS.items():
    model = keras.Sequential([keras.Input((SIZE // 4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    held = Held()
    gc.collect()
    autobatch.fit(model, *data(), target_batch=TARGET, micro_batch=16, epochs=1, verbose=0, callbacks=[held])
    prepared, _ = fit_data.prepare_data(model, *data(), *[None] * (2 - len(data())), target_batch=TARGET, options={})
    use = next(use for use in prepared.host_uses() if "effective batch" in use.name)
    found[name] = {"held": held.most / (TARGET * SIZE), "name": use.name, "told": use.held_bytes / (TARGET * SIZE)}
print(json.dumps(found))
