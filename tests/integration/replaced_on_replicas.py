"""Run by the tests, in a process of its own: replacements on the threads on which two replicas are traced.

``python replaced_on_replicas.py`` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lean_imports  # noqa: F401 - for its effect

# isort: split

import keras
import tensorflow as tf
from models import arrays, classifier, relative_error

import autobatch
from autobatch.seams.losses import added_losses_noted, losses_unscaled
from autobatch.seams.patching import replaced


def traced_by_hand(strategy):
    """Both replicas are within a replacement at once: a replica is left for the next one where it merges."""

    class Owner:
        def words(self):
            return ["own"]

    def saying(word):
        return lambda original: lambda self: [word, *original(self)]

    seen = []

    def merge(_):
        seen.append(Owner().words())

    def replica():
        number = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
        seen.append(Owner().words())
        with replaced(Owner, "words", saying(f"replica {number}")):
            tf.distribute.get_replica_context().merge_call(merge)
            seen.append(Owner().words())
        return tf.constant(number)

    original = Owner.words
    with replaced(Owner, "words", saying("outside")):
        tf.function(lambda: strategy.run(replica))()
    return {"seen": sorted(seen), "put_back": vars(Owner)["words"] is original}


def fitted(strategy):
    """The relative error of weights trained inside of replacements that the fit makes as well."""
    x, y = arrays()
    with strategy.scope():
        model = classifier(keras.optimizers.SGD(0.1))
    expected = classifier(keras.optimizers.SGD(0.1))
    expected.fit(x, y, batch_size=24, shuffle=False, verbose=0)
    noted = []
    with added_losses_noted(lambda *added: noted.append(added)), losses_unscaled():
        autobatch.fit(model, x, y, target_batch=24, micro_batch=6, shuffle=False, verbose=0)
    return {"weights": relative_error(model.get_weights(), expected.get_weights()), "noted": len(noted)}


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    print(json.dumps({"by_hand": traced_by_hand(mirrored), "fit": fitted(mirrored)}))
