"""What the optimizer's update holds at once, as Keras traces it and as autobatch does, for many optimizers.

``python benchmarks/update_room.py [--output results/update_room.json]``

The model has six weights of one size; all figures are in weights of that size, the most of several updates, in bytes
asked of TensorFlow's allocator beyond what is held before: ``used`` of 5, and ``by_keras`` of 20, for
``optimizer.apply`` in a ``tf.function`` of its own, since what it starts together differs each time. ``room`` is
what autobatch asks for before an update begins, so that none is half done.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import autobatch

WEIGHTS, WIDTH, REPEATS, REPEATS_BY_KERAS = 6, 128, 5, 20


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


def most(run, leaving_out=None, repeats=REPEATS):
    """The most bytes alive at once, in weights."""
    from autobatch.memory import allocations

    run()
    seen = []
    for _ in range(repeats):
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

    from autobatch.step import update_room
    from autobatch.step.accumulated_step import AccumulatedStep

    data = tf.data.Dataset.from_tensors((x, y))
    batch = next(iter(data))
    step = AccumulatedStep(model, data.element_spec)
    step.accumulate(batch, 4)
    used = most(step.apply, update_room.NAME)
    sums = [tf.Variable(accumulator.read_value()) for accumulator in step.accumulators]

    @tf.function(autograph=False)
    def by_keras():
        model.optimizer.apply([total.read_value() for total in sums], model.trainable_variables)

    return {
        "used": used,
        "by_keras": most(by_keras, repeats=REPEATS_BY_KERAS),
        "room": step.update_room_bytes / (WIDTH * WIDTH * 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    autobatch.limit_memory("64MiB")
    import keras
    import numpy as np

    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, WIDTH)).astype("float32"), random.normal(size=(8, WIDTH)).astype("float32")
    found = {name: compared(model_with(optimizer), x, y) for name, optimizer in optimizers().items()}
    tokens = random.integers(0, 1024, (8, 8)).astype("int32")
    table = keras.layers.Embedding(1024, WIDTH // 8)
    found["rows of a table"] = compared(model_with("adam", table), tokens, y)
    print(f"{'optimizer':<20} {'Keras':>6} {'autobatch':>10} {'room':>6}")
    for name, update in found.items():
        print(f"{name:<20} {update['by_keras']:>6.1f} {update['used']:>10.1f} {update['room']:>6.1f}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
