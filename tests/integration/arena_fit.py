"""Run by the tests, in a process of its own: train the same model plainly, or by autobatch in a limited arena.

``python arena_fit.py plain|limited RESULT.npz``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

import autobatch

LIMIT = "112MiB"
TARGET = 400


def build():
    import keras
    import numpy as np
    from keras import layers

    # In float32 the order in which a convolution sums 230,000 positions alone changes the fifth digit.
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    x = random.normal(size=(900, 24, 24, 3)).astype("float64")
    y = random.integers(0, 10, 900)
    stack = [keras.Input((24, 24, 3))]
    for _ in range(3):
        stack += [layers.Conv2D(16, 3, padding="same", activation="relu")]
    model = keras.Sequential([*stack, layers.GlobalAveragePooling2D(), layers.Dense(10)])
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9), loss, metrics=["accuracy"])
    return model, x, y


def main():
    mode, path = sys.argv[1:]
    if mode == "limited":
        autobatch.limit_memory(LIMIT)
    import keras
    import numpy as np

    model, x, y = build()
    options = {"epochs": 1, "shuffle": False, "verbose": 0, "validation_data": (x[:100], y[:100])}
    told = {}
    before = model.get_weights()
    if mode == "plain":
        history = model.fit(x, y, batch_size=TARGET, **options)
    else:
        history = autobatch.fit(model, x, y, target_batch=TARGET, **options)
        told = {
            "plan": [history.plan.micro_batch, history.plan.accumulation_steps],
            "peaks": [trial.peak_bytes for trial in history.report.trials if trial.fits],
            "limit": history.report.environment.limit_bytes,
            "recoveries": len(history.recoveries),
        }
    told["history"] = {name: [float(value) for value in values] for name, values in history.history.items()}
    told["iterations"] = int(model.optimizer.iterations.numpy())
    np.savez(path, *model.get_weights())
    if mode == "limited":
        # Begin anew, far too large: training itself must run out of memory, for real, and go on.
        model.set_weights(before)
        for variable in model.optimizer.variables:
            variable.assign(keras.ops.zeros_like(variable))
        second = autobatch.fit(model, x, y, target_batch=TARGET, micro_batch=TARGET, **{**options, "verbose": 2})
        told["forced"] = [[r.micro_batch_before, r.micro_batch_after, r.detail] for r in second.recoveries]
        np.savez(path.replace(".npz", "-forced.npz"), *model.get_weights())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
