"""Two worker processes train one model: a ``MultiWorkerMirroredStrategy`` on loopback, started by this one script.

On several machines there is nothing to start here: each runs the part of :func:`work` with a ``TF_CONFIG`` of its own,
which names all workers and which of them it is.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

WORKERS = 2
TARGET = 128


def work() -> None:
    """What every worker runs: nothing but the strategy's scope differs from a training on one device."""
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    import autobatch

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else of TensorFlow
    keras.utils.set_random_seed(1)
    digits = load_digits()
    x, y = digits.images[..., None].astype("float32") / 16, digits.target
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(32, 3, activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])
    # Every worker is given all of the data, and reads its part of each effective batch.
    history = autobatch.fit(
        model, x[:1500], y[:1500], target_batch=TARGET, epochs=8, validation_data=(x[1500:], y[1500:]), verbose=0
    )
    plan = history.plan
    print(
        f"{plan.replicas} replicas x {plan.accumulation_steps} x micro-batch {plan.micro_batch} = {TARGET} samples an "
        f"update; validation accuracy {history.history['val_accuracy'][-1]:.1%}",
        flush=True,
    )


def start_all() -> int:
    """Start the workers, wait for them, and return how many failed."""
    sockets = [socket.socket() for _ in range(WORKERS)]
    for each in sockets:
        each.bind(("localhost", 0))
    addresses = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    workers = []
    for index in range(WORKERS):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "3"}
        output = None if index == 0 else subprocess.DEVNULL
        workers.append(subprocess.Popen([sys.executable, __file__], env=environment, stdout=output))
    return sum(worker.wait() != 0 for worker in workers)


if __name__ == "__main__":
    if "TF_CONFIG" in os.environ:
        work()
    else:
        sys.exit(start_all())
