"""Run by the tests, in a process of its own: an arena that is filled until an update finds no room, and emptied again.

``python refused_update.py whole|accumulated``
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

import autobatch

LIMIT_BYTES = 96 * 2**20
UNITS = 1024
"""One weight takes 4 MiB; what Adam's update of it needs beside it is twice as much, and samples take next to none."""

WEIGHT_BYTES = 4 * UNITS**2
LEFT_BYTES = 3 * 2**19
"""What is left beside the blocks of a weight's size, for samples and the like: in pieces, where that happens to be."""


def build():
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((UNITS,)), layers.Dense(UNITS, use_bias=False)])
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    return model


def take_region():
    """Make the arena one region of memory: several cannot be joined, and depend on where the process's memory lies."""
    import tensorflow as tf

    tf.zeros([LIMIT_BYTES - 2 * WEIGHT_BYTES], tf.uint8)  # a region that grows doubles, up to the limit


def fill_all_but(blocks):
    """Fill the arena until only these blocks, each of a weight's size, and ``LEFT_BYTES`` are free; return what fills.

    That so many bytes are free would not be enough: they might be in pieces that a gradient does not fit into.
    """
    import tensorflow as tf

    from autobatch.memory import limits

    def free():
        return LIMIT_BYTES - limits.bytes_in_use("CPU:0")

    kept_free, filling = [], []
    while len(kept_free) < blocks:
        before = free()
        taken = tf.zeros([WEIGHT_BYTES], tf.uint8)
        # The allocator gives the whole of a gap that is not much larger.
        (kept_free if before - free() == WEIGHT_BYTES else filling).append(taken)
    while free() > LEFT_BYTES:
        filling.append(tf.zeros([2**14], tf.uint8))
    return filling


def main():
    mode = sys.argv[1]
    autobatch.limit_memory(LIMIT_BYTES)
    import numpy as np
    import tensorflow as tf

    from autobatch.recovery.transaction import Transaction
    from autobatch.step.accumulated_step import AccumulatedStep

    take_region()
    # One sample at a time, so that there is no smaller size to go on with.
    target = 1 if mode == "whole" else 2
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(8 * target, UNITS)).astype("float32") for _ in range(2))
    batches = list(tf.data.Dataset.from_tensor_slices((x, y)).batch(target))
    spec = tf.data.Dataset.from_tensors(batches[0]).element_spec

    def transaction_of(model):
        step = AccumulatedStep(model, spec)
        return step, Transaction(step, 1, device="CPU:0", effective_batch=target)

    def state(model):
        return [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]

    model = build()
    step, transaction = transaction_of(model)
    transaction._keeper.ran_out_beside_copies = True  # they are kept on the host then, until the update is proven
    for batch in batches[:6]:
        transaction.train(batch)
    before, told = state(model), {"room": step.update_room.bytes}
    gc.collect()  # what a roll-back would find to free
    # One block is for the gradient (or for the zeros that take the place of what was summed), and nothing sums it where
    # it is whole: then another is for the first half of the update's room. For the other half there is none.
    filling = fill_all_but(2 if mode == "whole" else 1)
    try:
        transaction.train(batches[6])
        told["ended"] = "trained"
    except autobatch.AutobatchError as error:
        told["ended"], told["message"] = type(error).__name__, str(error)
    after = state(model)
    told["same bits"] = all((one == other).all() for one, other in zip(after, before, strict=True))
    filling.clear()
    transaction.train(batches[7])
    reference = build()
    _, undisturbed = transaction_of(reference)
    for batch in (*batches[:6], batches[7]):
        undisturbed.train(batch)
    weights = zip(model.get_weights(), reference.get_weights(), strict=True)
    told["apart"] = max(float(np.max(np.abs(one - other)) / np.max(np.abs(other))) for one, other in weights)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
