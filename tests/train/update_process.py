"""Run by the tests, in a process of its own: what the updates of many optimizers hold at once, in weights of a size.

``python update_process.py`` prints, for each optimizer, the temporaries of its update as autobatch traces it (``used``)
and as Keras does (``by_keras``), and the room that is asked for before it begins, all in weights.
"""

from __future__ import annotations

import json
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import autobatch

WEIGHTS, WIDTH, REPEATS = 6, 128, 5


def optimizers():
    from keras.optimizers import (
        SGD,
        Adadelta,
        Adafactor,
        Adagrad,
        Adam,
        Adamax,
        AdamW,
        Ftrl,
        Lamb,
        Lion,
        LossScaleOptimizer,
        Muon,
        Nadam,
        RMSprop,
    )

    return {
        "SGD": SGD(1e-3, momentum=0.9, nesterov=True),
        "Adam": Adam(),
        "Adam, AMSGrad": Adam(amsgrad=True),
        "AdamW": AdamW(),
        "Lion": Lion(),
        "Adafactor": Adafactor(),
        "Muon": Muon(1e-3),
        "RMSprop": RMSprop(centered=True, momentum=0.9),
        "Nadam": Nadam(),
        "Adamax": Adamax(),
        "Adadelta": Adadelta(),
        "Adagrad": Adagrad(),
        "Ftrl": Ftrl(),
        "Lamb": Lamb(),
        "clipnorm": Adam(clipnorm=1.0),
        "global_clipnorm": Adam(global_clipnorm=1.0),
        "clipvalue": Adam(clipvalue=0.5),
        "EMA": Adam(use_ema=True, ema_overwrite_frequency=2),
        "LossScaleOptimizer": LossScaleOptimizer(Adam()),
    }


def most(run, leaving_out=None):
    """The median of the most bytes alive at once, in weights."""
    from autobatch.memory import allocations

    run()
    seen = []
    for _ in range(REPEATS):
        with allocations.recording("CPU:0", []) as recorded:
            run()
        seen.append(recorded.most_bytes(leaving_out=leaving_out) / (WIDTH * WIDTH * 4))
    return max(seen)


def model_with(optimizer, table=None):
    import keras

    keras.utils.set_random_seed(0)
    first = [keras.Input((8,), dtype="int32"), table, keras.layers.Flatten()] if table else [keras.Input((WIDTH,))]
    layers = [keras.layers.Dense(WIDTH, use_bias=False) for _ in range(WEIGHTS)]
    model = keras.Sequential([*first, *layers])
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def compared(model, x, y):
    import tensorflow as tf

    from autobatch.train import update_room
    from autobatch.train.step import AccumulatedStep

    data = tf.data.Dataset.from_tensors((x, y))
    batch = next(iter(data))
    step = AccumulatedStep(model, data.element_spec)
    step.accumulate(batch, 4)
    used = most(step.apply, update_room.NAME)
    sums = [tf.Variable(accumulator.read_value()) for accumulator in step.accumulators]

    @tf.function(autograph=False)
    def by_keras():
        model.optimizer.apply([total.read_value() for total in sums], model.trainable_variables)

    return {"used": used, "by_keras": most(by_keras), "room": step.update_room_bytes / (WIDTH * WIDTH * 4)}


def main():
    autobatch.limit_memory("64MiB")
    import keras
    import numpy as np

    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, WIDTH)).astype("float32"), random.normal(size=(8, WIDTH)).astype("float32")
    found = {name: compared(model_with(optimizer), x, y) for name, optimizer in optimizers().items()}
    tokens = random.integers(0, 1024, (8, 8)).astype("int32")
    table = keras.layers.Embedding(1024, WIDTH // 8)
    found["rows of a table"] = compared(model_with("adam", table), tokens, y)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
