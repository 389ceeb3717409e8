"""Run by the tests as each worker of trainings on several processes, joined by ``TF_CONFIG``: one case after the other.

``python worker_fit.py FOLDER CASES`` prints one JSON object for each case; the weights at its end go to
``FOLDER/CASE.npz``. ``CASES`` is a JSON object: by case, its options, and the worker that is its ``victim``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

# isort: split

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from models import MemoryHog, run_out_if

import autobatch

SAMPLES, TARGET, MICRO = 51, 20, 3
INDEX = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": -1}}'))["task"]["index"]


class Asked(layers.Layer):
    """Passes its inputs on; asks ``asked`` at every micro-batch, which may run out of memory or do worse."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def call(self, inputs):
        return inputs + run_out_if(self.asked) if tf.inside_function() else inputs


class Calls:
    """True at the given calls, from 0."""

    def __init__(self, *calls, then=None):
        self.calls, self.count, self.then = set(calls), -1, then

    def __call__(self):
        self.count += 1
        if self.count in self.calls and self.then is not None:
            self.then()
        return self.count in self.calls and self.then is None


def dense(*extra, seed=1):
    if seed is not None:
        keras.utils.set_random_seed(seed)
    stack = [keras.Input((16,)), layers.Dense(8, activation="relu", kernel_regularizer="l2"), *extra, layers.Dense(3)]
    model = keras.Sequential(stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01, clipnorm=0.1), loss, metrics=["accuracy"])
    return model


def masked():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((7,)), layers.Embedding(11, 6, mask_zero=True), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
    return model


def arrays():
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, 16)).astype("float32")
    return x, random.integers(0, 3, SAMPLES), random.random(SAMPLES).astype("float32") + 0.1


def sequences():
    random = np.random.default_rng(0)
    x = random.integers(1, 11, (SAMPLES, 7))
    x[np.arange(7)[None] >= random.integers(1, 8, SAMPLES)[:, None]] = 0
    return x, random.integers(0, 3, (SAMPLES, 7)), random.random((SAMPLES, 7)).astype("float32")


def data_and_options(case):
    if case.startswith("masked"):
        return sequences(), {"epochs": 2}
    x, y, weight = arrays()
    if case == "apart":
        x = x + INDEX
    return (x, y, weight), {"epochs": 2, "validation_data": (x[:23], y[:23], weight[:23])}


def model_for(case, is_victim):
    if case.startswith("masked"):
        return masked()
    if case == "unseeded":
        return dense(seed=None)
    if case == "small":  # one worker has room for 4 samples at a time, the other for any number
        return dense(MemoryHog(lambda samples: is_victim and samples > 4))
    kind, _, when = case.partition("@")
    extra = []
    if when and is_victim:
        deeds = {
            "memory": None,
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "bug": lambda: 1 / 0,
        }
        extra = [Asked(Calls(int(when), then=deeds[kind]))]
    elif when:
        extra = [Asked(lambda: False)]
    return dense(*extra)


def main():
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if INDEX >= 0 else None
    for case, options in cases.items():
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            model = model_for(case, options.pop("victim", None) == INDEX)
        told = trained(model, case, options)
        if "error" not in told:
            np.savez(folder / f"{case}.npz", *model.get_weights())
        print(json.dumps(told), flush=True)


def trained(model, case, options):
    (x, y, weight), fit = data_and_options(case)
    fit = {"shuffle": False, "verbose": 0, **fit}
    backup = options.pop("backup", None)
    if backup:
        fit["callbacks"] = [keras.callbacks.BackupAndRestore(backup, delete_checkpoint=False)]
    fit["epochs"] = options.pop("epochs", fit["epochs"])
    if INDEX < 0:
        history = model.fit(x, y, sample_weight=weight, batch_size=TARGET, **fit)
        told = {}
    else:
        started = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", autobatch.AutobatchWarning)
                if case == "small":
                    options["micro_batch"] = autobatch.tune(model, x, y, target_batch=TARGET).plan.micro_batch
                history = autobatch.fit(
                    model,
                    x,
                    y,
                    sample_weight=weight,
                    target_batch=TARGET,
                    **{"micro_batch": MICRO, **fit, **options},
                )
        except (autobatch.AutobatchError, tf.errors.OpError) as error:
            return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - started}
        told = {
            "plan": [history.plan.micro_batch, history.plan.accumulation_steps, history.plan.replicas],
            "recoveries": [[r.update, r.phase, r.micro_batch_before, r.micro_batch_after] for r in history.recoveries],
            "trials": [[t.micro_batch, t.peak_bytes, t.fits] for t in history.report.trials],
        }
    told["history"] = {name: [float(value) for value in values] for name, values in history.history.items()}
    told["epochs"] = history.epoch
    told["iterations"] = int(model.optimizer.iterations.numpy())
    return told


if __name__ == "__main__":
    main()
