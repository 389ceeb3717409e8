"""Run by the tests: steps compiled by XLA that run out of memory, and what comes after; each in a fork of its own."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")

sys.path.insert(0, str(Path(__file__).parents[1]))

import forks
import lean_imports  # noqa: F401 - for its effect

import autobatch

SAMPLES, FEATURES = 16_384, 40


def built():
    import keras

    keras.utils.set_random_seed(1)
    stack = [keras.Input((FEATURES,)), keras.layers.Dense(3000, activation="relu"), keras.layers.Dense(1)]
    model = keras.Sequential(stack)
    model.compile("adam", "mse", jit_compile=True)
    return model


def whole(x, y):
    """A trial of a whole batch that does not fit, one that does, and the weights as before."""
    from autobatch.data import fit_data
    from autobatch.records import TrialRequest
    from autobatch.trial.live_trials import LiveTrials

    model = built()
    batches, _ = fit_data.prepare_data(model, x, y, target_batch=SAMPLES, options={})
    trials = LiveTrials(model, batches, target_batch=SAMPLES, user_limit_bytes=None, headroom=0.0)
    before = [weight.tobytes() for weight in model.get_weights()]
    outcomes = [trials.run(TrialRequest(size)).outcome.value for size in (SAMPLES, 64)]
    trials.close()
    return f"{outcomes} {[weight.tobytes() for weight in model.get_weights()] == before}"


def accumulated(x, y):
    """Two updates of which the first runs out of memory, against the same with the smaller size from the start."""
    import tensorflow as tf

    from autobatch.recovery.transaction import Transaction
    from autobatch.step.accumulated_step import AccumulatedStep

    batch = tf.constant(x), tf.constant(y)
    spec = tf.data.Dataset.from_tensors(batch).element_spec
    model, reference = built(), built()
    transaction = Transaction(AccumulatedStep(model, spec), SAMPLES - 1, device="CPU:0", effective_batch=SAMPLES)
    step = AccumulatedStep(reference, spec)
    for _ in range(2):
        transaction.train(batch)
    recovered, micro_batch = len(transaction.recoveries) > 0, transaction.policy.micro_batch
    trained = model.get_weights()
    del transaction, model  # the reference needs the room that they hold, in one piece
    gc.collect()
    for _ in range(2):
        step.accumulate(batch, micro_batch)
        step.apply()
    pairs = zip(trained, reference.get_weights(), strict=True)
    return f"{recovered} {all((left == right).all() for left, right in pairs)}"


def later(x, y):
    """An update that fits, what is held behind it, and one that runs out of memory; against the same without that."""
    import tensorflow as tf

    from autobatch.memory.allocations import recording
    from autobatch.recovery.transaction import Transaction
    from autobatch.step.accumulated_step import AccumulatedStep
    from autobatch.tensors.variables import bytes_of

    batch = tf.constant(x), tf.constant(y)
    small = batch[0][:256], batch[1][:256]
    spec = tf.data.Dataset.from_tensors(batch).element_spec
    model, reference = built(), built()
    for each in (model, reference):
        each.optimizer.build(each.trainable_variables)
    variables = [each.value for each in (*model.variables, *model.optimizer.variables)]
    with recording("CPU:0", variables) as recorded:
        transaction = Transaction(AccumulatedStep(model, spec), SAMPLES - 1, device="CPU:0", effective_batch=SAMPLES)
        transaction.train(small)
        gc.collect()
    # By what was asked for: a chunk may be nearly twice as large as its block.
    alive = dict(recorded.held)
    for event in recorded.events:
        if event.allocated:
            alive[event.address] = event.requested_bytes
        else:
            alive.pop(event.address, None)
    held = (sum(alive.values()) - sum(recorded.held.values())) / bytes_of(model.trainable_variables)
    transaction.train(batch)
    recovered, micro_batch = len(transaction.recoveries) > 0, transaction.policy.micro_batch
    trained = model.get_weights()
    del transaction, model, each  # the reference needs the room that they hold, in one piece
    gc.collect()
    step = AccumulatedStep(reference, spec)
    for one in (small, batch):
        step.accumulate(one, micro_batch)
        step.apply()
    pairs = zip(trained, reference.get_weights(), strict=True)
    same = all((left == right).all() for left, right in pairs)
    holds = "the sums alone" if 0.9 < held < 1.1 else f"{held:.1f} times the weights"
    return f"{recovered} {same} {holds}"


def in_arena(steps):
    autobatch.limit_memory("180MiB")  # 8192 samples need 188 MiB and more, 4096 need 98 in one piece
    import numpy as np

    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, FEATURES)).astype("float32")
    y = random.normal(size=(SAMPLES, 1)).astype("float32")
    return steps(x, y)


def main():
    import keras  # noqa: F401 - before the forks

    told = {steps.__name__: forks.told_by(lambda steps=steps: in_arena(steps)) for steps in (whole, accumulated, later)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
