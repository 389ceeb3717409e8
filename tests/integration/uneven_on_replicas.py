"""Run by the tests, in a process of its own: two streams, a rest and graphs on two logical CPU devices.

``python uneven_on_replicas.py`` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

# isort: split

import tensorflow as tf


def main():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import uneven

    import autobatch

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def trained(loss, data, **sizes):
        plain = uneven.made(loss)
        start = plain.get_weights()
        expected = plain.fit(data(), validation_data=data(), verbose=0)
        with strategy.scope():
            model = uneven.made(loss)
        model.set_weights(start)
        try:
            history = autobatch.fit(model, data(), validation_data=data(), verbose=0, **sizes)
        except ValueError as error:
            return {"error": str(error), "updates": int(model.optimizer.iterations.numpy())}
        return {
            "off": uneven.off(model, plain, start),
            "val_loss": [each.history["val_loss"][0] for each in (expected, history)],
            "micro_batches": history.plan.micro_batches,
        }

    def streams(**sizes):
        return lambda: uneven.zipped((uneven.labelled(**sizes), uneven.unlabelled()))

    found = {
        "streams": trained(uneven.side_by_side, streams(), target_batch=8, micro_batch=3),
        "two to three": trained(uneven.mean_teacher, streams(size=16), target_batch=16, micro_batch="auto"),
        "rest": trained(uneven.mean_teacher, streams(samples=60, drop=False), target_batch=8, micro_batch=3),
        "graphs": trained(uneven.graph, lambda: uneven.graphs((4, 9), (6, 6)), target_batch=8, micro_batch=3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
