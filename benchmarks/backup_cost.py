"""How long training stands still for backups: autobatch's default, beside Keras's ``BackupAndRestore``.

    python benchmarks/backup_cost.py --minutes 4 --output benchmarks/results/backup_cost.json

A dense model whose weights and slots take 275 MiB trains for some minutes, first with ``backup`` of ``autobatch.fit``
at its default of one a minute, then with Keras's callback as often. What is timed is how long the training waits for
each, not what is written beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "backup_cost.json"
WIDTH, BATCH, EVERY_SECONDS = 3464, 64, 60.0


def built() -> tuple[Any, Any, Any]:
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(WIDTH), keras.layers.Dense(WIDTH)])
    model.compile("adam", "mse")
    random = np.random.default_rng(0)
    return model, *(random.normal(size=(BATCH * 8, WIDTH)).astype("float32") for _ in range(2))


def stopping_after(seconds: float) -> Any:
    import keras

    class StopAfter(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            self.end = time.perf_counter() + seconds

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = time.perf_counter() > self.end

    return StopAfter()


def timed(taken: list[float], function: Any) -> Any:
    """Return ``function`` with the seconds of each call noted in ``taken``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            taken.append(time.perf_counter() - begun)

    return call


def ours(seconds: float) -> dict[str, Any]:
    import autobatch
    from autobatch.backup.training_backup import TrainingBackup

    model, x, y = built()
    taken: list[float] = []
    TrainingBackup._back_up = timed(taken, TrainingBackup._back_up)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        callbacks = [stopping_after(seconds)]
        options: dict[str, Any] = {"epochs": 10**6, "verbose": 0, "callbacks": callbacks}
        autobatch.fit(model, x, y, target_batch=BATCH, micro_batch=BATCH, backup=f"{folder}/run", **options)
        return told(taken, time.perf_counter() - begun)


def keras_own(seconds: float) -> dict[str, Any]:
    import keras

    model, x, y = built()
    taken: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        backup = keras.callbacks.BackupAndRestore(f"{folder}/run", save_freq=1)
        save, last = timed(taken, backup._save_model), [time.perf_counter()]

        def once_a_minute(*args: Any, **kwargs: Any) -> None:
            if time.perf_counter() - last[0] >= EVERY_SECONDS:
                save(*args, **kwargs)
                last[0] = time.perf_counter()

        backup._save_model = once_a_minute
        begun = time.perf_counter()
        model.fit(x, y, batch_size=BATCH, epochs=10**6, verbose=0, callbacks=[stopping_after(seconds), backup])
        return told(taken, time.perf_counter() - begun)


def told(taken: list[float], seconds: float) -> dict[str, Any]:
    return {
        "training_seconds": round(seconds, 1),
        "stood_still_seconds": [round(each, 3) for each in taken],
        "share": round(sum(taken) / seconds, 5),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="length of each training (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = {"autobatch": ours(60 * options.minutes), "BackupAndRestore": keras_own(60 * options.minutes)}
    megabytes = round(3 * 4 * (2 * WIDTH * WIDTH + 2 * WIDTH) / 2**20)
    about = {"python": platform.python_version(), "variables_mib": megabytes, "every_seconds": EVERY_SECONDS}
    options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: {row['share']:.2%} of {row['training_seconds']:.0f} s, {row['stood_still_seconds']} s each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
