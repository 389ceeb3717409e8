"""Run by the tests, in a process of its own: an arena that is filled until an update finds no room, and emptied again.

``python refused_update.py whole|accumulated``
"""

from __future__ import annotations

import gc
import json
import sys

import autobatch

LIMIT_BYTES = 96 * 2**20
UNITS = 1024
"""One weight takes 4 MiB; what Adam's update of it needs beside it is twice as much, and samples take next to none."""


def build():
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((UNITS,)), layers.Dense(UNITS, use_bias=False)])
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    return model


def main():
    mode = sys.argv[1]
    autobatch.limit_memory(LIMIT_BYTES)
    import numpy as np
    import tensorflow as tf

    from autobatch.memory import limits
    from autobatch.train.recovery import Transaction
    from autobatch.train.step import AccumulatedStep

    tf.config.threading.set_inter_op_parallelism_threads(1)
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
    filling = []
    gc.collect()  # what a roll-back would find to free
    # Enough for the gradient before the update, not for the update's room (beside the gradient, where nothing sums it).
    left = told["room"] - 3 * 2**20 + (4 * UNITS**2 if mode == "whole" else 0)
    while LIMIT_BYTES - limits.bytes_in_use("CPU:0") - left >= 2**20:
        filling.append(tf.fill([2**18], float(len(filling))))
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
