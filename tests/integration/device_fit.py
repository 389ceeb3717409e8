"""Run by the tests, in a process of its own: search, train and run out of memory in a limited arena on any device.

``python device_fit.py graph|xla``. On a machine without a GPU it runs on the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

import autobatch

TARGET = 256


def build(compiled):
    import keras
    import numpy as np
    from keras import layers

    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    x = random.normal(size=(2 * TARGET, 32, 32, 3)).astype("float32")
    y = random.integers(0, 10, 2 * TARGET)
    stack = [keras.Input((32, 32, 3))]
    stack += [layers.Conv2D(32, 3, padding="same", activation="relu") for _ in range(2)]
    stack += [layers.BatchNormalization(trainable=False), layers.GlobalAveragePooling2D(), layers.Dense(10)]
    model = keras.Sequential(stack)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=compiled == "xla")
    return model, x, y


def main():
    compiled = sys.argv[1]
    # In any order of operations the target needs three layers' outputs at a time, of 32 MiB each.
    autobatch.limit_memory("80MiB")
    import keras
    import numpy as np

    from autobatch import opening
    from autobatch.memory import limits
    from autobatch.records import TrialRequest

    device = limits.default_device()
    model, x, y = build(compiled)
    before = [np.array(variable) for variable in model.variables]
    report = autobatch.tune(model, x, y, target_batch=TARGET)
    after = [np.array(variable) for variable in model.variables]
    changed = [v.path for v, a, b in zip(model.variables, before, after, strict=False) if not np.array_equal(a, b)]

    trials = opening.open_trials(model, x, y, target_batch=None, memory_limit_bytes=None, headroom=0.05)
    trials.run(TrialRequest(4, timed_steps=1))
    held_before = limits.bytes_in_use(device)
    failed = trials.run(TrialRequest(2048, timed_steps=1))
    held_after = limits.bytes_in_use(device)
    smaller = trials.run(TrialRequest(8, timed_steps=1))
    trials.close()
    trials.step.release_accumulators()

    options = {"shuffle": False, "verbose": 0}
    history = autobatch.fit(model, x, y, target_batch=TARGET, **options)
    updates, weights = int(model.optimizer.iterations.numpy()), model.get_weights()
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    for variable in model.optimizer.variables:
        if variable is not model.optimizer._learning_rate:
            variable.assign(keras.ops.zeros_like(variable))
    forced = autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=TARGET, **options)
    errors = [
        float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-12))
        for a, b in zip(weights, model.get_weights(), strict=True)
    ]
    print(
        json.dumps(
            {
                "device": device,
                "trace_left": changed,
                "limit_bytes": report.environment.limit_bytes,
                "searched_largest": report.largest_fit,
                "sizes_that_fit": [trial.micro_batch for trial in report.trials if trial.fits],
                "peaks": [trial.peak_bytes for trial in report.trials if trial.fits],
                "plan": [history.plan.micro_batch, history.plan.accumulation_steps],
                "failed_then_smaller": [failed.outcome.value, smaller.outcome.value],
                "held_before_failure": held_before,
                "held_after_failure": held_after,
                "forced": [[each.micro_batch_before, each.micro_batch_after] for each in forced.recoveries],
                "updates": updates,
                "relative_error": max(errors),
            }
        )
    )


if __name__ == "__main__":
    main()
