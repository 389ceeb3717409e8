"""Run by the tests as each worker of a training with a backup on several processes, joined by ``TF_CONFIG``.

``python killed_workers.py FOLDER RUN`` trains once and prints one JSON object. ``RUN`` is a JSON object: ``victim`` is
the worker that sends itself ``signal`` at its ``update`` or ``validation`` batch of this number, if it is given; with
SIGABRT it says that memory is why. One that is started again does no such thing. The backup is in
``FOLDER/backup-INDEX``, so that no worker sees another's; without ``every`` there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import lean_imports  # noqa: F401 - for its effect

# isort: split

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import autobatch
from autobatch.tensors.variables import components

SAMPLES, FEATURES = 44, 6
INDEX = json.loads(os.environ["TF_CONFIG"])["task"]["index"]


class Numbers(keras.callbacks.Callback):
    """Draws a number in every update, of this worker's own, and ends its process where it is told to."""

    def __init__(self, run):
        super().__init__()
        self.drawn, self.run, self.seen = [], {}, 0
        if run.get("victim") == INDEX and not Path(sys.argv[1], "has died").exists():
            self.run = run

    def at(self, place):
        if place in self.run:
            self.seen += 1
            if self.seen == self.run[place]:
                Path(sys.argv[1], "has died").touch()
                if self.run["signal"] == signal.SIGABRT:
                    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
                os.kill(os.getpid(), self.run["signal"])

    def on_train_batch_end(self, batch, logs=None):
        self.drawn.append(float(np.random.uniform()))
        self.at("update")

    def on_test_batch_end(self, batch, logs=None):
        self.at("validation")

    def get_state(self):
        return {"drawn": self.drawn}

    def set_state(self, state):
        self.drawn = list(state["drawn"])


def main():
    folder, run = Path(sys.argv[1]), json.loads(sys.argv[2])
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(11)
    np.random.seed(100 + INDEX)
    with strategy.scope():
        stack = [layers.Dense(8, activation="relu"), layers.BatchNormalization(), layers.Dropout(0.3)]
        model = keras.Sequential([keras.Input((FEATURES,)), *stack, layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", metrics=["mae"])
    random = np.random.default_rng(0)
    x, y = random.normal(size=(SAMPLES, FEATURES)), random.normal(size=(SAMPLES, 1))
    numbers, every = Numbers(run), run.get("every")
    settings = {} if every is None else {"backup": folder / f"backup-{INDEX}", "backup_every": every}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", autobatch.AutobatchWarning)
            history = autobatch.fit(
                model,
                x.astype("float32"),
                y.astype("float32"),
                target_batch=12,
                micro_batch=2,
                epochs=3,
                validation_split=0.25,
                validation_batch_size=4,
                callbacks=[numbers],
                verbose=0,
                worker_timeout=100,
                **settings,
            )
    except (autobatch.AutobatchError, ValueError) as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
        raise
    digest = hashlib.sha256()
    for variable in components([*model.variables, *model.optimizer.variables, *model.metrics_variables]):
        digest.update(variable.numpy().tobytes())
    told = {"digest": digest.hexdigest(), "history": history.history, "epochs": history.epoch, "drawn": numbers.drawn}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
