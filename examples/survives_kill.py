"""A training that kills its own process twice, is started again, and ends with the bits of one that nobody killed.

Run it: ``python examples/survives_kill.py`` (needs scikit-learn, as ``pip install "autobatch[examples]"`` brings it).

``train`` is the script that a scheduler would start again: each time the same call of ``autobatch.fit`` with the same
``backup``. What stands below it is the scheduler.
"""

import os
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

TARGET_BATCH = 64
KILLS = (9, 20)
"""Updates, counted from the start of a process, behind which it is killed."""


def train(backup, kill_behind):
    """Train on scikit-learn's digits, with a backup behind every third update; print a digest of what was learnt."""
    import hashlib

    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    import autobatch

    # One operation at a time: sums of floats depend on the order in which they are added.
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    keras.utils.set_random_seed(0)
    digits = load_digits()
    model = keras.Sequential([keras.Input((64,))])
    model.add(keras.layers.Dense(64, activation="relu"))
    model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.Dropout(0.2))
    model.add(keras.layers.Dense(10, activation="softmax"))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])

    class Kill(keras.callbacks.Callback):
        """What a machine does to a process, unannounced."""

        updates = 0

        def on_train_batch_end(self, batch, logs=None):
            self.updates += 1
            if self.updates == kill_behind:
                print(f"killed in update {int(model.optimizer.iterations.numpy())}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    autobatch.fit(
        model,
        digits.data.astype("float32") / 16,
        digits.target,
        target_batch=TARGET_BATCH,
        micro_batch=32,
        epochs=2,
        verbose=0,
        callbacks=[Kill()],
        backup=backup,
        backup_every=3,
    )
    learnt = b"".join(variable.numpy().tobytes() for variable in [*model.variables, *model.optimizer.variables])
    print(f"{int(model.optimizer.iterations.numpy())} updates, digest {hashlib.sha256(learnt).hexdigest()[:16]}")


def run(backup, kill_behind=0):
    """Run ``train`` in a process of its own; return False if it was killed."""
    done = subprocess.run([sys.executable, __file__, backup, str(kill_behind)], check=False)
    if done.returncode not in (0, -signal.SIGKILL):
        sys.exit(done.returncode)
    return done.returncode == 0


def main():
    with tempfile.TemporaryDirectory() as folder:
        print("without a kill: ", flush=True)
        run(os.path.join(folder, "whole"))
        print("with two kills: ", flush=True)
        kills = iter(KILLS)
        while not run(os.path.join(folder, "killed"), next(kills, 0)):
            print("... started again", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        main()
