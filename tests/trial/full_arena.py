"""Run by the tests: searches in arenas that are nearly full, or too small, each in a fork of its own."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import forks
import lean_imports  # noqa: F401 - for its effect

import autobatch


def too_small():
    """A search under XLA that finds nothing while waiting batches fill the arena, and what it leaves."""
    import keras
    import numpy as np

    autobatch.limit_memory("100MiB")
    x, y = np.zeros((4096, 1000), "float32"), np.zeros(4096, "int32")
    stack = [keras.Input((1000,))] + [keras.layers.Dense(1500, activation="relu") for _ in range(2)]
    model = keras.Sequential([*stack, keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=True)
    before = model.get_weights()
    try:
        autobatch.fit(model, x, y, target_batch=2048, verbose=0, cache=False)
    except autobatch.NoFeasibleBatchError as error:
        same = all((one == other).all() for one, other in zip(before, model.get_weights(), strict=True))
        return {"error": str(error), "same": same}
    return {"error": None}


def nearly_full():
    """One sample's workspace is within the limit and over the budget; before that, a model is dropped in a cycle."""
    import keras
    import numpy as np
    from keras import layers

    from autobatch.memory import limits

    autobatch.limit_memory("64MiB")

    def wide(outputs):
        inputs = keras.Input((4,))
        return keras.Model(inputs, [layers.Dense(100_000)(inputs) for _ in range(outputs)])

    gc.disable()
    dropped = wide(3)
    dropped.itself = dropped
    held = limits.bytes_in_use("CPU:0")
    del dropped
    uncollected = limits.bytes_in_use("CPU:0")
    x, y = np.zeros((64, 32, 32, 3), "float32"), np.zeros(64, "int32")
    stack = [layers.Conv2D(filters, 3, activation="relu") for filters in (8, 16)]
    model = keras.Sequential([keras.Input((32, 32, 3)), *stack, layers.Flatten(), layers.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", autobatch.AutobatchWarning)
        report = autobatch.tune(model, x, y, target_batch=16, headroom=0.6, objective="largest", cache=False)
    kept = wide(9)
    with warnings.catch_warnings(record=True) as caught_again:
        warnings.simplefilter("always", autobatch.AutobatchWarning)
        try:
            autobatch.tune(model, x, y, target_batch=16, cache=False)
            error = ""
        except autobatch.NoFeasibleBatchError as none:
            error = str(none)
    return {
        "held": held,
        "uncollected": uncollected,
        "by_others": report.environment.held_by_others_bytes,
        "headroom": report.environment.headroom,
        "plan": report.plan.micro_batch,
        "peak": max(trial.peak_bytes or 0 for trial in report.trials),
        "why": report.stopped_because,
        "warned": [str(each.message) for each in caught],
        "warned_again": [str(each.message) for each in caught_again],
        "error": error,
        "kept": kept.count_params(),
    }


def main():
    import keras  # noqa: F401 - before the forks

    print(json.dumps({search.__name__: forks.told_by(search) for search in (too_small, nearly_full)}))


if __name__ == "__main__":
    main()
