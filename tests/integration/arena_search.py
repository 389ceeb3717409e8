"""Run by the tests, in a process of its own: search in a limited arena, where peaks and failures are genuine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import autobatch

LIMIT = "144MiB"


def build():
    import keras
    from keras import layers

    stack = [keras.Input((24, 24, 3))]
    for _ in range(6):
        stack += [layers.Conv2D(16, 3, padding="same"), layers.ReLU()]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(1024), layers.Dense(1024), layers.Dense(10)]
    model = keras.Sequential(stack)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main():
    autobatch.limit_memory(LIMIT)
    import numpy as np

    from autobatch import api
    from autobatch.records import TrialRequest

    model = build()
    x, y = np.zeros((1000, 24, 24, 3), "float32"), np.zeros(1000, "int32")
    trials = api.open_trials(model, x, y, target_batch=None, memory_limit_bytes=None, headroom=0.0)
    estimate = trials.estimate_sample()
    fields = ("held_bytes", "sample_peak_bytes", "peak_bytes", "step_seconds", "first_step_seconds")
    measured = {}
    for size in (1, 64, 128):
        result = trials.run(TrialRequest(size, timed_steps=0))
        measured[size] = {name: getattr(result, name) for name in fields}
    trials.close()
    report = autobatch.tune(model, x, y, headroom=0.0)
    print(
        json.dumps(
            {
                "estimate": asdict(estimate),
                "measured": measured,
                "found": report.largest_fit,
                "trials": [[trial.micro_batch, trial.fits] for trial in report.trials],
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
