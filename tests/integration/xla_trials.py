"""Run by the tests, in a process of its own: a trial of a whole batch under XLA runs out of memory, then one fits."""

from __future__ import annotations

import os

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")

import autobatch

SAMPLES = 16_384


def main():
    autobatch.limit_memory("150MiB")
    import keras
    import numpy as np

    from autobatch.records import TrialRequest
    from autobatch.train import session
    from autobatch.trial.in_process import LiveTrials

    keras.utils.set_random_seed(1)
    stack = [keras.Input((200,)), keras.layers.Dense(3000, activation="relu"), keras.layers.Dense(1)]
    model = keras.Sequential(stack)
    model.compile("adam", "mse", jit_compile=True)
    x, y = np.ones((SAMPLES, 200), "float32"), np.ones((SAMPLES, 1), "float32")
    batches, _ = session.prepare_data(model, x, y, target_batch=SAMPLES, options={})
    trials = LiveTrials(model, batches, target_batch=SAMPLES, user_limit_bytes=None, headroom=0.0)
    before = [weight.tobytes() for weight in model.get_weights()]
    outcomes = [trials.run(TrialRequest(size)).outcome.value for size in (SAMPLES, 64)]
    trials.close()
    print(outcomes, [weight.tobytes() for weight in model.get_weights()] == before)


if __name__ == "__main__":
    main()
