"""Run by the tests, in processes of their own: what TensorFlow's allocator does, and what the model of it does.

``python allocator_process.py random|busy|broken|step ...`` runs each mode in a fork of its own.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import forks
import lean_imports  # noqa: F401 - for its effect

import autobatch

LIMIT = "64MiB"


def empty(size):
    import tensorflow as tf

    return tf.raw_ops.Empty(shape=[size], dtype=tf.uint8)


def compared():
    """A thousand random allocations and releases: where each block really went, and where it does in the model."""
    import tensorflow as tf

    from autobatch.memory import allocations, arena
    from autobatch.search.replay import Allocator

    rng = random.Random(1)
    held = [tf.Variable(tf.zeros([rng.randint(1, 50_000)])) for _ in range(20)]
    del held[::3]
    taken_at_once = arena.reserve_in_one_piece()
    live = []
    with allocations.recording("CPU:0", held) as seen:
        for _ in range(1000):
            if live and rng.random() < 0.48:
                del live[rng.randrange(len(live))]
            else:
                live.append(empty(rng.choice((10, 3000, 70_000, 400_000, 1_500_000))))
    with allocations._silenced():
        os.write(2, b"a message of another's\n")
    told = allocations.trace_of(seen, 7, ())
    allocator = Allocator(told.regions, told.held)
    known = {address for address, _ in told.held}
    blocks, same, different, peak = {}, 0, 0, 0
    for event in seen.events:
        peak = max(peak, event.in_use_bytes)
        if event.allocated:
            blocks[event.address] = allocator.allocate(event.requested_bytes)
            if event.requested_bytes >= 70_000:
                same += blocks[event.address] == event.address
                different += blocks[event.address] != event.address
        elif event.address in blocks or event.address in known:
            allocator.release(blocks.pop(event.address, event.address))
    return {
        "taken_at_once": taken_at_once,
        "held_known": len(seen.held),
        "same": same,
        "different": different,
        "peak": peak,
        "replayed_peak": allocator.peak_bytes,
    }


def beside_another_profile():
    import tensorflow as tf

    from autobatch.memory import allocations

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        with allocations.recording("CPU:0", []) as seen:
            empty(1000)
        tf.profiler.experimental.stop(save=False)
    told_beside = allocations.trace_of(seen, 1, ())
    with allocations.recording("CPU:0", []) as seen:
        empty(1000)
    try:
        with allocations.recording("CPU:0", []) as failed:
            raise KeyError("of the block's own")
    except KeyError:
        with allocations.recording("CPU:0", []) as again:
            empty(1000)
    os.environ[allocations.SWITCH] = "0"
    with allocations.recording("CPU:0", []) as off:
        empty(1000)
    return {
        "switched_off": len(off.events),
        "beside_another": told_beside is None,
        "afterwards": len(seen.events),
        "after_a_failure": len(again.events),
        "failed": len(failed.events),
        "of_the_block": len([event for event in seen.events if event.requested_bytes == 1000]),
    }


def broken():
    """A profile that was cut off or garbled on its way, and a profiler that will not start or end."""
    import tensorflow as tf

    from autobatch.memory import allocations, profile_reader

    rng = random.Random(0)
    read = profile_reader.read
    told = []

    def damage(folder, device):
        (file,) = folder.rglob("*.xplane.pb")
        content = bytearray(file.read_bytes())
        if len(told) % 2:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(20):
                content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
        return read(folder, device)

    profile_reader.read = damage
    for _ in range(12):
        with allocations.recording("CPU:0", []) as seen:
            empty(1000)
        trace = allocations.trace_of(seen, 1, ())
        told.append(None if trace is None else len(trace.order))
    profile_reader.read = read

    def refuse(*_, **__):
        raise PermissionError("CUPTI: not for you")

    start, stop = tf.profiler.experimental.start, tf.profiler.experimental.stop
    tf.profiler.experimental.start = refuse
    with allocations.recording("CPU:0", []) as unstarted:
        empty(1000)
    tf.profiler.experimental.start, tf.profiler.experimental.stop = start, refuse
    with allocations.recording("CPU:0", []) as unended:
        empty(1000)
    tf.profiler.experimental.stop = stop
    stop(save=False)
    return {"told": told, "unstarted": len(unstarted.events), "unended": len(unended.events)}


def step():
    """A trial's trace, replayed at the size of another, against what that one measured."""
    import keras
    import numpy as np
    import tensorflow as tf
    from keras import layers

    from autobatch import opening
    from autobatch.records import TrialRequest
    from autobatch.search import replay

    tf.config.threading.set_inter_op_parallelism_threads(1)
    stack = [keras.Input((24, 24, 3))]
    for _ in range(3):
        stack += [layers.Conv2D(16, 3, padding="same", activation="relu"), layers.BatchNormalization()]
    model = keras.Sequential([*stack, layers.GlobalAveragePooling2D(), layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = np.zeros((64, 24, 24, 3), "float32"), np.zeros(64, "int32")
    trials = opening.open_trials(model, *data, target_batch=None, memory_limit_bytes=None, headroom=0.0)
    plain = trials.run(TrialRequest(5, timed_steps=0))
    small = trials.run(TrialRequest(13, timed_steps=1, record_allocations=True))
    limit = trials.environment.limit_bytes
    largest = replay.largest_that_fits(small.allocations, limit, at_most=4096)
    sizes = (int(0.95 * largest), 2 * largest)
    outcomes = {size: trials.run(TrialRequest(size, timed_steps=0, record_allocations=True)) for size in sizes}
    trials.close()
    near = next(iter(outcomes.values()))
    return {
        "unasked": plain.allocations is None,
        "failed_tells_nothing": outcomes[2 * largest].allocations is None,
        "outcomes": [trial.outcome.value for trial in outcomes.values()],
        "self": replay.replayed_peak_bytes(small.allocations, 13) / small.peak_bytes,
        "near": replay.replayed_peak_bytes(small.allocations, near.micro_batch) / near.peak_bytes,
        "largest": largest,
    }


MODES = {"random": compared, "busy": beside_another_profile, "broken": broken, "step": step}


def in_arena(mode):
    autobatch.limit_memory(LIMIT)
    return MODES[mode]()


def main():
    import keras  # noqa: F401 - before the forks

    print(json.dumps({mode: forks.told_by(lambda mode=mode: in_arena(mode)) for mode in sys.argv[1:]}))


if __name__ == "__main__":
    main()
