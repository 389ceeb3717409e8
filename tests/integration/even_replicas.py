"""Run by the tests, in a process of its own: the sizes of the micro-batches on each of two logical CPU devices.

``python even_replicas.py`` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

# isort: split

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from models import arrays, relative_error, run_out_if

import autobatch


class Noting(layers.Layer):
    """Notes the size of each micro-batch on each replica; the first replica runs out of memory where ``fails()``."""

    supports_masking = True

    def __init__(self, fails=lambda: False):
        super().__init__()
        self.fails = fails
        self.seen = {True: [[], []], False: [[], []]}

    def call(self, inputs, training=False):
        context = tf.distribute.get_replica_context()
        here = tf.get_static_value(context.replica_id_in_sync_group) if context is not None else 0

        def note(samples):
            self.seen[bool(training)][here].append(int(samples))
            return samples

        noted = tf.numpy_function(note, [tf.shape(inputs)[0]], tf.int32)
        inputs = inputs + 0.0 * tf.cast(tf.ensure_shape(noted, []), tf.float32)
        return inputs + run_out_if(self.fails) if here == 0 else inputs


def dense(*extra):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((16,)), *extra, layers.Dense(10)])
    model.compile(keras.optimizers.SGD(0.3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def masked(*extra):
    keras.utils.set_random_seed(1)
    embedding = layers.Embedding(11, 6, mask_zero=True)
    model = keras.Sequential([keras.Input((7,)), embedding, *extra, layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main():
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    warnings.simplefilter("ignore", autobatch.AutobatchWarning)

    def both(build, x, y, noting, **options):
        with strategy.scope():
            ours = build(noting)
        common = {"shuffle": False, "verbose": 0, **options}
        history = autobatch.fit(ours, x, y, target_batch=20, micro_batch=4, **common)
        plain = build()
        plain.fit(x, y, batch_size=20, **common)
        return history, relative_error(ours.get_weights(), plain.get_weights())

    x, y = arrays(samples=20 + 17)
    noting = Noting()
    validation = {"validation_data": (x[:19], y[:19]), "validation_batch_size": 19}
    _, weights = both(dense, x, y, noting, **validation)

    random = np.random.default_rng(0)
    counted = Noting()
    ids, labels = random.integers(0, 11, (37, 7)), random.integers(0, 3, (37, 7))
    _, masked_weights = both(masked, ids, labels, counted)

    calls = iter(range(100))
    failing = Noting(lambda: next(calls) == 3)  # the tail's first micro-batch
    history, failed_weights = both(dense, x, y, failing)

    found = {
        "passed": noting.seen[True],
        "validation": noting.seen[False],
        "weights": max(weights, failed_weights),
        "masked": [list(dict.fromkeys(seen)) for seen in counted.seen[True]],
        "masked_weights": masked_weights,
        "recoveries": [[r.update, r.phase, r.micro_batch_before, r.micro_batch_after] for r in history.recoveries],
        "after": failing.seen[True][1][-5:],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
