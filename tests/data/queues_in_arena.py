"""Run by the tests, in processes of their own: what waits in the input queue of a training in a limited CPU arena.

``python queues_in_arena.py LIMIT...`` prints a line for each limit. It has, for each kind of data, how many effective
batches more than before training are held after an update, what the report calls them and which prefetches it names,
and how many samples a generator has made between two updates. Each arena is in a fork of this process, made before
TensorFlow has started anything.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # as limit_memory has it, which here comes behind the import

import keras
import numpy as np
import tensorflow as tf

import autobatch
from autobatch.data import fit_data
from autobatch.memory import limits

SAMPLES, TARGET, SIZE = 512, 64, 16 * 1024
X, Y = np.zeros((SAMPLES, SIZE // 4), "float32"), np.zeros(SAMPLES, "float32")


class Held(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.before, self.most = limits.bytes_in_use("CPU:0"), 0
        self.read = []

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.1)  # a queue would be filled
        self.read.append(READ[0])
        self.most = max(self.most, limits.bytes_in_use("CPU:0") - self.before)


READ = [0]  # samples that a generator has made


def batches():
    for start in range(0, SAMPLES, TARGET // 4):
        READ[0] += TARGET // 4
        yield X[start : start + TARGET // 4], Y[start : start + TARGET // 4]


def generated():
    signature = (tf.TensorSpec((None, SIZE // 4), "float32"), tf.TensorSpec((None,), "float32"))
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


KINDS = {
    "arrays": lambda: (X, Y),
    "dataset": lambda: (tf.data.Dataset.range(SAMPLES).map(lambda _: (tf.zeros([SIZE // 4]), 0.0)).batch(16),),
    "generated": lambda: (generated().prefetch(tf.data.AUTOTUNE),),
    "in batches": lambda: (generated().unbatch().batch(TARGET).prefetch(2),),
}


def measured():
    found = {}
    for name, data in KINDS.items():
        model = keras.Sequential([keras.Input((SIZE // 4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        held = Held()
        gc.collect()
        autobatch.fit(model, *data(), target_batch=TARGET, micro_batch=16, epochs=1, verbose=0, callbacks=[held])
        rest = [None] * (2 - len(data()))
        prepared, _ = fit_data.prepare_data(model, *data(), *rest, target_batch=TARGET, options={})
        uses = {use.name: use for use in prepared.host_uses()}
        use = next(use for each, use in uses.items() if "effective batch" in each)
        told = use.held_bytes / (TARGET * SIZE)
        read = np.diff(held.read)[-5:].tolist()  # before these, what has looked at the data may not have ended
        found[name] = {"held": held.most / (TARGET * SIZE), "name": use.name, "told": told, "read": read}
        found[name]["prefetches"] = [each for each in uses if "prefetch" in each]
    return found


def main():
    for limit in sys.argv[1:]:
        process = os.fork()
        if not process:
            try:
                autobatch.limit_memory(limit)
                print(json.dumps(measured()), flush=True)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - its text is all that the parent gets
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(process, 0)
        if status:
            sys.exit(f"The arena of {limit} failed.")


if __name__ == "__main__":
    main()
