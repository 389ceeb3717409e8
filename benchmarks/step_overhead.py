"""What a step costs: autobatch against plain Keras and against Keras's own gradient accumulation, time and memory.

``python benchmarks/step_overhead.py [--xla] [--output results/step_overhead.json] [--repeats 21]``

Time is that of a whole epoch of ``fit`` over the same samples, callbacks and data pipeline included, the competitors
taking turns, now in one order, now in the other, so that a busy machine is busy for all; medians of at least 7 turns.
The same model, built again, may be faster or slower by a third, where its buffers happen to lie: so each competitor has
seven, which take turns as well. Other guests of a host can double the times from one minute to the next: a ratio is
the median of those between epochs of the same turn, and what part of the processors' time went to others is told.
"Passes" is the floor under every accumulation: the same forward and backward passes in a compiled loop, with nothing
added up, no metrics, no update and no ``fit``.

Memory is the most that one update holds above what is held before it, in bytes asked of TensorFlow's allocator (its
rounding, which differs from run to run, left out), the accumulators added, less the most that one plain micro-step
holds; medians of 7.

With ``--xla`` all of them are compiled by XLA, as they are on a single GPU by default; nothing is compiled in an epoch
that counts.
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

MODELS = ("dense", "cnn", "transformer")
ACCUMULATION_STEPS = (1, 4, 16)
OURS, PLAIN, KERAS = "autobatch", "plain Keras at the micro-batch", "Keras's gradient_accumulation_steps"
COMPILED = "AUTOBATCH_BENCHMARK_XLA"
"""Environment variable that is set, here and for the processes that measure memory, where XLA compiles the steps."""
UPDATES_IN_AN_EPOCH = {"dense": 32, "cnn": 16, "transformer": 16}


def is_compiled() -> bool:
    return bool(os.environ.get(COMPILED))


def build(name: str, accumulation_steps: int | None = None):
    """A model, samples for it, and the micro-batch of the comparison; ``accumulation_steps`` is Keras's own."""
    import keras
    import numpy as np
    from keras import layers

    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    if name == "dense":
        micro_batch, shape = 32, (64,)
        inputs = keras.Input(shape)
        hidden = layers.Dense(256, activation="relu")(layers.Dense(256, activation="relu")(inputs))
    elif name == "cnn":
        micro_batch, shape = 16, (32, 32, 3)
        inputs = keras.Input(shape)
        hidden = layers.MaxPooling2D()(layers.Conv2D(32, 3, activation="relu")(inputs))
        hidden = layers.Flatten()(layers.MaxPooling2D()(layers.Conv2D(64, 3, activation="relu")(hidden)))
    else:
        micro_batch, shape = 8, (64,)
        inputs = keras.Input(shape, dtype="int32")
        hidden = layers.Embedding(500, 64)(inputs)
        for _ in range(2):
            attended = layers.MultiHeadAttention(4, 16)(layers.LayerNormalization()(hidden), hidden)
            hidden = hidden + attended
            wide = layers.Dense(128, activation="gelu")(layers.LayerNormalization()(hidden))
            hidden = hidden + layers.Dense(64)(wide)
        hidden = layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(inputs, layers.Dense(10)(hidden))
    optimizer = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=accumulation_steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=is_compiled())

    def samples(count: int):
        x = random.integers(0, 500, (count, *shape)) if name == "transformer" else random.normal(size=(count, *shape))
        return x.astype("int32" if name == "transformer" else "float32"), random.integers(0, 10, count)

    return model, samples, micro_batch


def seconds_in_turns(contestants: list[dict], repeats: int) -> dict[str, list[float]]:
    """The seconds of each in every turn, all of them once a turn; two turns of each model beforehand are not counted.

    ``contestants`` holds the same names once for each time that the models were built.
    """
    taken: dict[str, list[float]] = {name: [] for name in contestants[0]}
    beforehand = 2 * len(contestants)
    for turn in range(repeats + beforehand):
        epochs = contestants[turn % len(contestants)]
        for name in list(epochs) if turn // len(contestants) % 2 else list(reversed(epochs)):
            start = time.perf_counter()
            epochs[name]()
            if turn >= beforehand:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratios(seconds: dict[str, list[float]], above: str, below: str) -> list[float]:
    """The quartiles of the ratios between two contestants' seconds of the same turn."""
    return statistics.quantiles(
        (one / other for one, other in zip(seconds[above], seconds[below], strict=True)), n=4, method="inclusive"
    )


def processor_ticks() -> tuple[int, int]:
    """Clock ticks of all processors so far, and those of them that the host gave to other guests; 0 where not told."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0, 0
    ticks = [int(field) for field in fields[:8]]  # what follows is counted in these already
    return sum(ticks), ticks[7] if len(ticks) > 7 else 0


def passes_alone(name: str, target_batch: int, micro_batch: int, x, y):
    """An epoch of forward and backward passes, ``micro_batch`` samples at a time, and of nothing else."""
    import tensorflow as tf

    model, _, _ = build(name)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(target_batch).prefetch(tf.data.AUTOTUNE)

    @tf.function(autograph=False, jit_compile=is_compiled())
    def one_pass(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=x, y=y, y_pred=model(x, training=True))
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        # An element of each is asked for: what nobody asks for is not computed.
        dense = [part.values if isinstance(part, tf.IndexedSlices) else part for part in gradients]
        return tf.add_n([tf.reshape(part, [-1])[0] for part in dense])

    @tf.function(autograph=False, input_signature=list(dataset.element_spec))
    def passes(x, y):
        def body(start, total):
            part = slice(start, start + micro_batch)
            return start + micro_batch, total + one_pass(x[part], y[part])

        samples = tf.shape(x)[0]
        return tf.while_loop(lambda start, _: start < samples, body, [0, 0.0], parallel_iterations=1)

    def epoch() -> None:
        for batch in dataset:
            passes(*batch)

    return epoch


class Ours:
    """Our trained steps behind Keras's fit, prepared once, so that an epoch is an epoch and no trace is in it."""

    def __init__(self, name: str, target_batch: int, micro_batch: int, x, y) -> None:
        from autobatch.data import fit_data
        from autobatch.memory import limits
        from autobatch.recovery.transaction import Transaction
        from autobatch.step.accumulated_step import AccumulatedStep
        from autobatch.train import session

        self.model, _, _ = build(name)
        self.batches, _ = fit_data.prepare_data(self.model, x, y, target_batch=target_batch, options={"shuffle": False})
        step = AccumulatedStep(self.model, self.batches.element_spec)
        self.transaction = Transaction(step, micro_batch, device=limits.default_device())
        self.replaced = session._functions_replaced

    def epoch(self) -> None:
        with self.replaced(self.model, self.transaction, lambda once: once()):
            self.model.fit(self.batches, verbose=0, shuffle=False)


def time_one(name: str, steps: int, repeats: int, times_built: int) -> dict[str, list[float]]:
    _, samples, micro_batch = build(name)
    x, y = samples(steps * micro_batch * max(1, UPDATES_IN_AN_EPOCH[name] * 4 // steps))
    return seconds_in_turns([contestants_for(name, steps, micro_batch, x, y) for _ in range(times_built)], repeats)


def contestants_for(name: str, steps: int, micro_batch: int, x, y) -> dict:
    """An epoch of each competitor, with models of their own."""
    target = steps * micro_batch
    model, _, _ = build(name)
    ours = Ours(name, target, micro_batch, x, y)
    contestants = {
        OURS: ours.epoch,
        PLAIN: lambda: model.fit(x, y, batch_size=micro_batch, shuffle=False, verbose=0),
    }
    if steps > 1:
        accumulating, _, _ = build(name, steps)
        contestants[KERAS] = lambda: accumulating.fit(x, y, batch_size=micro_batch, shuffle=False, verbose=0)
    contestants["passes"] = passes_alone(name, target, micro_batch, x, y)
    return contestants


def peaks_of(name: str, steps: int) -> dict[str, float]:
    """What one plain micro-step holds, and one accumulated update, in bytes; runs in a limited arena."""
    import autobatch

    autobatch.limit_memory("4GiB")
    import tensorflow as tf

    from autobatch.memory import allocations, limits
    from autobatch.step.accumulated_step import AccumulatedStep
    from autobatch.tensors.variables import bytes_of

    model, samples, micro_batch = build(name)
    # A micro-batch large enough for activations to count, as where memory is short.
    micro_batch *= 4
    x, y = samples(micro_batch * steps)
    data = tf.data.Dataset.from_tensors((x, y))
    batch = next(iter(data))
    device = limits.default_device()

    def most_bytes(run) -> float:
        run()
        run()
        seen = []
        for _ in range(7):
            with allocations.recording(device, []) as recorded:
                run()
            seen.append(recorded.most_bytes())
        return statistics.median(seen)

    model.optimizer.build(model.trainable_variables)
    one = model._make_function(model.train_step)  # Keras's own, as its fit runs it
    plain = most_bytes(lambda: one(iter([tf.nest.map_structure(lambda part: part[:micro_batch], batch)])))
    step = AccumulatedStep(model, data.element_spec)
    gradients = bytes_of(model.trainable_variables)
    if steps == 1:
        whole = most_bytes(lambda: step.plain(batch))
        return {"plain_step_bytes": plain, "step_bytes": whole, "gradients_bytes": gradients}
    return {
        "plain_step_bytes": plain,
        "accumulate_bytes": most_bytes(lambda: step.accumulate(batch, micro_batch)),
        "update_bytes": most_bytes(step.apply),
        "gradients_bytes": gradients,
    }


def line_of(row: dict) -> str:
    def with_quartiles(key: str) -> str:
        if key not in row:
            return ""
        low, middle, high = row[key]
        return f"{middle:.3f} [{low:.2f} {high:.2f}]"

    seconds = row["seconds"]
    keras_own = f"{seconds[KERAS]:.3f}s" if KERAS in seconds else ""
    lost = row["lost_to_other_guests"]
    return (
        f"{row['model']:<12} {row['accumulation_steps']:>3} {seconds[OURS]:>9.3f}s {seconds[PLAIN]:>9.3f}s "
        f"{with_quartiles('over_plain'):>19} {keras_own:>11} {with_quartiles('faster_than_keras_accumulation'):>19} "
        f"{seconds['passes']:>9.3f}s {row['above_plain_step_per_gradient']:>7.2f}g "
        f"{'?' if lost is None else format(lost, '.0%'):>6}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--xla", action="store_true", help="compile the steps of all of them")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--built", type=int, default=7, help="how often each model is built (default 7)")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", default=",".join(map(str, ACCUMULATION_STEPS)), help="micro-batches in an update")
    parser.add_argument("--peaks", nargs=2, metavar=("MODEL", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.xla:
        os.environ[COMPILED] = "1"  # the processes that measure memory see it as well
    if options.peaks:
        print(json.dumps(peaks_of(options.peaks[0], int(options.peaks[1]))))
        return
    rows = []
    headings = (
        "autobatch",
        "plain",
        "ratio [quartiles]",
        "Keras acc.",
        "faster [quartiles]",
        "passes",
        "memory",
        "lost",
    )
    widths = (10, 10, 19, 11, 19, 10, 8, 6)
    print(f"{'model':<12} {'k':>3} " + " ".join(f"{text:>{n}}" for text, n in zip(headings, widths, strict=True)))
    for name in options.models.split(","):
        for steps in map(int, options.steps.split(",")):
            ticks_before = processor_ticks()
            seconds = time_one(name, steps, options.repeats, options.built)
            ticks, lost = (now - then for now, then in zip(processor_ticks(), ticks_before, strict=True))
            memory = json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--peaks", name, str(steps)], check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            if steps == 1:
                most = memory["step_bytes"]
            else:  # the accumulators are held before and after both parts of an update
                most = max(memory["accumulate_bytes"], memory["update_bytes"]) + memory["gradients_bytes"]
            row = {
                "model": name,
                "accumulation_steps": steps,
                "seconds": {contestant: statistics.median(values) for contestant, values in seconds.items()},
                "over_plain": ratios(seconds, OURS, PLAIN),
                **({"faster_than_keras_accumulation": ratios(seconds, KERAS, OURS)} if steps > 1 else {}),
                "lost_to_other_guests": lost / ticks if ticks else None,
                "above_plain_step_per_gradient": (most - memory["plain_step_bytes"]) / memory["gradients_bytes"],
                "memory": memory,
            }
            rows.append(row)
            print(line_of(row), flush=True)
    print("ratio: autobatch / plain. faster: Keras's accumulation / autobatch. Both: medians of those of one turn.")
    print("passes: forward and backward alone. lost: of the processors' time, what the host gave to other guests.")
    print("memory: an update's most above one plain micro-step's, in units of the gradients' bytes.")
    if options.output:
        import keras
        import tensorflow as tf

        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "python": platform.python_version()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps(
                {
                    "command": f"python benchmarks/step_overhead.py {'--xla ' if options.xla else ''}"
                    f"--models {options.models} --steps {options.steps}",
                    "machine": machine,
                    "versions": versions,
                    "repeats": options.repeats,
                    "times_built": options.built,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
