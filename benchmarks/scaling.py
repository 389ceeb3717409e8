"""What an update costs on 1, 2 and 4 replicas at a fixed global batch: its time, and the bytes that are reduced.

``python benchmarks/scaling.py [--output results/scaling.json] [--updates 12]``

Three ways to make one update of the same samples: autobatch, which sums on each replica and reduces once;
accumulation that reduces the gradients of every micro-batch (what a loop around ``strategy.run`` with an all-reduce
in it does); and plain Keras with the whole global batch at once, which needs the memory for it. Replicas are logical
devices of one CPU, so that they share its cores: times do not fall with their number here, and what they show is the
overhead. Bytes are what each replica hands to the all-reduces of one update, counted when they are traced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

TARGET, MICRO, FEATURES, WIDTH = 256, 16, 128, 1024
WAYS = ("autobatch", "reduce every micro-batch", "plain Keras")


class Reduced:
    """Bytes that one replica hands to all-reduces, and how many of these there are, counted as they are traced."""

    def __init__(self):
        import tensorflow as tf

        self.bytes = self.calls = 0
        original = tf.distribute.ReplicaContext.all_reduce

        def all_reduce(context, reduce_op, value, options=None):
            if tf.get_static_value(context.replica_id_in_sync_group) == 0:
                self.calls += 1
                self.bytes += sum(part.shape.num_elements() * part.dtype.size for part in tf.nest.flatten(value))
            return original(context, reduce_op, value, options)

        tf.distribute.ReplicaContext.all_reduce = all_reduce

    def restart(self):
        self.bytes = self.calls = 0


def build():
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    stack = [keras.Input((FEATURES,)), *(layers.Dense(WIDTH, activation="relu") for _ in range(3)), layers.Dense(10)]
    model = keras.Sequential(stack)
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def samples(updates):
    import numpy as np

    random = np.random.default_rng(0)
    count = TARGET * updates
    return random.normal(size=(count, FEATURES)).astype("float32"), random.integers(0, 10, count)


def clock_of_updates():
    import keras

    class Clock(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seconds = []

        def on_train_batch_begin(self, batch, logs=None):
            self.started = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            self.seconds.append(time.perf_counter() - self.started)

    return Clock()


def in_a_loop(strategy, model, x, y):
    """Accumulation as it is mostly written: each micro-batch's gradients are reduced, then added."""
    import tensorflow as tf

    loss = keras_loss()
    with strategy.scope():
        sums = [tf.Variable(tf.zeros(variable.shape), trainable=False) for variable in model.trainable_variables]
        model.optimizer.build(model.trainable_variables)
    share, steps = MICRO * strategy.num_replicas_in_sync, TARGET // (MICRO * strategy.num_replicas_in_sync)

    def micro_step(x, y):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(loss(y, model(x, training=True))) / TARGET
        gradients = tape.gradient(value, model.trainable_variables)
        context = tf.distribute.get_replica_context()
        reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients) if context else gradients
        for total, gradient in zip(sums, reduced, strict=True):
            total.assign_add(gradient)

    def update():
        context = tf.distribute.get_replica_context()
        del context
        model.optimizer.apply([total.read_value() for total in sums], model.trainable_variables)
        for total in sums:
            total.assign(tf.zeros_like(total))

    model.optimizer.__dict__["_all_reduce_sum_gradients"] = lambda pairs: list(pairs)

    @tf.function
    def run_micro(parts_x, parts_y):
        def on_replica():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            micro_step(tf.gather(parts_x, replica), tf.gather(parts_y, replica))

        strategy.run(on_replica)

    run_update = tf.function(lambda: strategy.run(update))
    seconds = []
    for start in range(0, len(x), TARGET):
        begun = time.perf_counter()
        for step in range(steps):
            rows = slice(start + step * share, start + (step + 1) * share)
            run_micro(x[rows].reshape(-1, MICRO, FEATURES), y[rows].reshape(-1, MICRO))
        run_update()
        model.trainable_variables[0].numpy()
        seconds.append(time.perf_counter() - begun)
    return seconds, steps


def keras_loss():
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)


def measure(way, replicas, updates):
    """Seconds of each update, and what one reduces; the first two are left out: they trace."""
    import tensorflow as tf

    import autobatch

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(replicas)])
    with strategy.scope():
        model = build()
    x, y = samples(updates + 2)
    reduced, clock, times = Reduced(), clock_of_updates(), 1
    if way == "autobatch":
        micro_batch = min(MICRO, TARGET // replicas)
        fit = {"target_batch": TARGET, "micro_batch": micro_batch, "callbacks": [clock], "memory_watch": False}
        autobatch.fit(model, x, y, shuffle=False, verbose=0, **fit)
        seconds = clock.seconds
    elif way == "plain Keras":
        model.fit(x, y, batch_size=TARGET, shuffle=False, verbose=0, callbacks=[clock])
        seconds = clock.seconds
    else:
        seconds, times = in_a_loop(strategy, model, x, y)
    print(
        json.dumps(
            {
                "way": way,
                "replicas": replicas,
                "update_seconds": statistics.median(seconds[2:]),
                "reduced_bytes": reduced.bytes * times,
                "weights_bytes": sum(v.shape.num_elements() * 4 for v in model.trainable_variables),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "REPLICAS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], int(options.one[1]), options.updates)
        return
    rows = []
    print(f"{'replicas':>8}  {'way':<26} {'ms an update':>12} {'MiB reduced':>12} {'x weights':>10}")
    for replicas in (1, 2, 4):
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, str(replicas), "--updates", str(options.updates)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            times = row["reduced_bytes"] / row["weights_bytes"]
            print(
                f"{replicas:>8}  {way:<26} {1e3 * row['update_seconds']:>12.1f} "
                f"{row['reduced_bytes'] / 2**20:>12.2f} {times:>10.3f}",
                flush=True,
            )
    if options.output:
        import keras
        import tensorflow as tf

        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "python": platform.python_version()}
        head = {"command": "python benchmarks/scaling.py", "machine": machine, "versions": versions}
        options.output.write_text(json.dumps({**head, "updates": options.updates, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
