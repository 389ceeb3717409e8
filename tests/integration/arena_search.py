"""Run by the tests: search in a limited arena, where peaks and failures are genuine; each part in a fork of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import forks
import lean_imports  # noqa: F401 - for its effect

import autobatch
from autobatch import opening
from autobatch.memory import held_blocks, limits
from autobatch.records import TrialRequest

LIMIT = "144MiB"
SEARCHES = 3
SAMPLE_BYTES = 24 * 24 * 3 * 4 + 4


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


def samples():
    import numpy as np

    return np.zeros((1000, 24, 24, 3), "float32"), np.zeros(1000, "int32")


def waiting():
    """What trials hold beside them for training; measured where the arena has no gaps, which are given out whole."""
    model, x, y = build(), *samples()
    # An effective batch of 400 samples, 6,912 bytes and a label each, will be under way in training. A trial has two
    # micro-batches of them.
    trials = opening.open_trials(model, x, y, target_batch=400, memory_limit_bytes=None, headroom=0.0)
    hint = trials.fixed_bytes_hint
    result = trials.run(TrialRequest(64, timed_steps=0, record_allocations=True))
    held = limits.bytes_in_use("CPU:0")
    trace, holders = result.allocations, (trials._pipeline, trials._sample)
    recorded, lies_at = (
        dict(trace.held),
        held_blocks.addresses_of([each for one in holders for each in one.tensors], "CPU:0"),
    )
    trials._pipeline.drop()
    beside = held - limits.bytes_in_use("CPU:0")
    trials.close()
    return {
        "batch": 400 * SAMPLE_BYTES,
        "beside_two_micro_batches": (400 - 2 * 64) * SAMPLE_BYTES,
        "told": sum(use.held_bytes for use in trials.host_uses if "effective batch" in use.name),
        "beside_trials": beside,
        "hint": hint,
        "peak": result.peak_bytes,
        "held": [
            (bytes_of_it, recorded.get(address))
            for address, bytes_of_it in lies_at.items()
            if any(start <= address < start + size for start, size in trace.regions)
        ],
    }


def measures():
    """What the trace and trials of three sizes tell."""
    model, x, y = build(), *samples()
    trials = opening.open_trials(model, x, y, target_batch=None, memory_limit_bytes=None, headroom=0.0)
    estimate = trials.estimate_sample()
    fields = ("held_bytes", "sample_peak_bytes", "peak_bytes", "step_seconds", "first_step_seconds")
    measured = {}
    for size in (1, 64, 128):
        result = trials.run(TrialRequest(size, timed_steps=0))
        measured[size] = {name: getattr(result, name) for name in fields}
    recorded = [
        trials.run(TrialRequest(size, timed_steps=0, record_allocations=True)).allocations
        for size in (64, 200, 64, 150)
    ]
    trials.close()
    return {
        "estimate": asdict(estimate),
        "measured": measured,
        "side_by_side": any(trace.in_parallel for trace in recorded),
        "largest_free": [largest_free(trace) for trace in recorded],
    }


def largest_free(trace):
    """The bytes of the largest piece that is free where a trial begins."""
    edges = [(start + size, 0) for start, size in trace.regions]
    blocks = sorted([*trace.held, *edges])
    starts = dict(trace.regions)
    free, end = 0, 0
    for address, size in blocks:
        free = max(free, address - max([end, *(start for start in starts if start <= address)]))
        end = address + size
    return free


def searches():
    """What searches find."""
    model, x, y = build(), *samples()
    reports = [autobatch.tune(model, x, y, headroom=0.0, cache=False) for _ in range(SEARCHES)]
    return {
        "found": [report.largest_fit for report in reports],
        "trials": [[[trial.micro_batch, trial.fits] for trial in report.trials] for report in reports],
    }


def main():
    import keras  # noqa: F401 - before the forks

    def in_arena(part):
        autobatch.limit_memory(LIMIT)
        return part()

    print(json.dumps({part.__name__: forks.told_by(lambda part=part: in_arena(part)) for part in PARTS}))


PARTS = (waiting, measures, searches)

if __name__ == "__main__":
    main()
