"""Run by the tests, in a process of its own: searches and a training compiled by XLA, in a limited arena.

What XLA compiles is counted by what TensorFlow says of it on standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

os.environ.update(TF_CPP_MIN_LOG_LEVEL="0", TF_CPP_VMODULE="device_compilation_profiler=1", TF_ENABLE_ONEDNN_OPTS="0")

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

import autobatch

LIMIT = "48MiB"
TARGET = 480


def build():
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    stack = [keras.Input((16, 16, 3))]
    for _ in range(2):
        stack += [layers.Conv2D(16, 3, padding="same"), layers.ReLU()]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(256), layers.Dense(10)]
    model = keras.Sequential(stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=True)
    return model


def search(x, y, headroom):
    """Return what a search found and ran, and if 4 % more samples fit."""
    from autobatch import opening
    from autobatch.records import TrialRequest
    from autobatch.sizing.search_trials import search_with

    trials = opening.open_trials(build(), x, y, target_batch=None, memory_limit_bytes=None, headroom=headroom)
    report = search_with(trials, target_batch=None, objective="largest")
    more = trials.run(TrialRequest(int(1.04 * report.largest_fit) + 1))
    trials.close()
    ran = [(trial.micro_batch, trial.fits, trial.peak_bytes, trial.allocated_peak_bytes) for trial in report.trials]
    return {"found": report.largest_fit, "trials": ran, "more_fits": more.fits}


def train(x, y):
    """Train twice for two epochs with a tail; return what was planned, tried, and compiled according to the log."""
    said = []
    log = logging.getLogger("autobatch.step.compilations")
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    print("training begins", file=sys.stderr, flush=True)
    model = build()
    tried = set()
    for _ in range(2):
        history = autobatch.fit(model, x, y, target_batch=TARGET, epochs=2, verbose=0, cache=True)
        tried.update(trial.micro_batch for trial in history.report.trials)
    log.removeHandler(handler)
    print("training ends", file=sys.stderr, flush=True)
    plan = history.plan
    return {
        "micro_batch": plan.micro_batch,
        "said": said,
        "trials": sorted(tried),
        "recoveries": len(history.recoveries),
    }


def main():
    autobatch.limit_memory(LIMIT)
    import numpy as np

    random = np.random.default_rng(0)
    x = random.normal(size=(2 * TARGET + 100, 16, 16, 3)).astype("float32")
    y = random.integers(0, 10, len(x))
    trained = train(x, y)
    print(json.dumps({"trained": trained, "searches": [search(x, y, headroom) for headroom in (0.05, 0.0)]}))


if __name__ == "__main__":
    main()
