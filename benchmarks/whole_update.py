"""The whole update in one program of XLA's, against autobatch's launches: time, memory, compilation, and failing.

``python benchmarks/whole_update.py [--output results/whole_update.json] [--repeats 9]``

Five ways to make one update of ``k`` micro-batches of 8 samples, all compiled by XLA:

* **launches**: autobatch's way. A compiled micro-batch is launched ``k`` times; the update, not compiled, follows.
* **loop**: one program. A ``tf.while_loop`` carries the sums of the gradients; the optimizer's update is its end.
* **unrolled**: the same without a loop: the micro-batches one behind the other.
* **loop, update apart**: the loop alone is compiled and returns the sums; the update, not compiled, follows.
* **plain**: Keras's own ``train_step`` on the effective batch.

Time is that of one update. The ways take turns, now in one order, now in the other. Seconds are medians; a ratio is the
median of those of the same turn. Seconds of the processor stand beside those of the clock, because other work on the
machine changes the latter more.

Memory is the most bytes that an update holds beyond the model's and the optimizer's variables, the effective batch
included. It counts what was asked of the allocator of a limited CPU arena. XLA writes a variable in place. If such a
program runs out of memory, TensorFlow gives the variable's buffer back although the variable still uses it. A second
reference to the buffer prevents that, and XLA then writes elsewhere. So there are two figures: "in place", and "safe"
with a second reference to each variable that the program writes. autobatch's launches are always safe.

"Failing" makes the update in an arena where it does not fit, and looks at the variables and at the process's end.

"Error" is how far the weights are from those of plain Keras after an update by SGD, over the length of Keras's step. It
is one update, because behind it the last bits decide which way a ReLU or a maximum goes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

MODELS = ("plain_cnn", "transformer_encoder", "lstm")
ACCUMULATION_STEPS = (4, 16)
MICRO_BATCH = 8
LAUNCHES, LOOP, UNROLLED, APART, PLAIN = "launches", "loop", "unrolled", "loop, update apart", "plain"
WAYS = (LAUNCHES, LOOP, UNROLLED, APART, PLAIN)
FAILING = (LOOP, f"{LOOP}, safe", APART)


def build(name: str, samples: int, *, optimizer: Any = None) -> tuple[Any, Any]:
    """A model, and its effective batch; with an ``optimizer`` for a comparison, so that nothing is dropped out."""
    import keras
    import numpy as np
    import tensorflow as tf
    from models import MODELS as ALL

    keras.utils.set_random_seed(0)
    one = ALL[name]
    model = one.build()
    if optimizer is not None:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
    model.compile(optimizer or model.optimizer, model.loss, metrics=["accuracy"], jit_compile=True)
    model.optimizer.build(model.trainable_variables)
    batch = tuple(tf.constant(np.concatenate([part] * (samples // len(part) + 1))[:samples]) for part in one.data())
    return model, batch


class Way:
    """One way to make an update: ``update(batch)`` makes one."""

    def __init__(self, name: str, model: Any, batch: Any) -> None:
        self.model = model
        self.step: Any = None
        self.program: Any = None
        self.update: Callable[[Any], Any]
        if name == LAUNCHES:
            self._in_launches(batch)
        elif name == PLAIN:
            self._plain(batch)
        else:
            self._in_one_program(batch, unrolled=name == UNROLLED, update_apart=name == APART)

    def _in_launches(self, batch: Any) -> None:
        import tensorflow as tf

        from autobatch.step.accumulated_step import AccumulatedStep

        self.step = step = AccumulatedStep(self.model, tf.data.Dataset.from_tensors(batch).element_spec)

        def update(batch: Any) -> None:
            step.accumulate(batch, MICRO_BATCH)
            step.apply()

        self.update = update

    def _plain(self, batch: Any) -> None:
        import tensorflow as tf

        model = self.model
        self.program = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
        self.update = lambda batch: self.program(*batch)

    def _in_one_program(self, batch: Any, *, unrolled: bool, update_apart: bool) -> None:
        import tensorflow as tf

        from autobatch.seams.optimizers import apply_of, capture_apply
        from autobatch.step.update_room import UpdateReserve
        from autobatch.tensors.variables import distinct

        model = self.model
        weights = model.trainable_variables
        inner = distinct(weights)
        steps = batch[0].shape[0] // MICRO_BATCH

        def micro_batch(place: Any, parts: list[Any], sums: list[Any]) -> list[Any]:
            added: list[Any] = []

            def add(_: Any, gradients: list[Any], variables: list[Any]) -> None:
                assert [id(each) for each in variables] == [id(each) for each in weights]
                dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
                added.extend(total + gradient / steps for total, gradient in zip(sums, dense, strict=True))

            with capture_apply([model.optimizer], add):
                model.train_step(tuple(part[place] for part in parts))
            return added

        def summed(*batch: Any) -> list[Any]:
            parts = [tf.reshape(part, [steps, MICRO_BATCH, *part.shape[1:]]) for part in batch]
            sums = [tf.zeros(each.shape, each.dtype) for each in inner]
            if unrolled:
                for place in range(steps):
                    # Otherwise XLA may run the forward passes first, and hold what all of them have computed.
                    with tf.control_dependencies(sums):
                        sums = micro_batch(place, parts, sums)
                return sums
            _, sums = tf.while_loop(
                lambda place, _: place < steps,
                lambda place, sums: (place + 1, micro_batch(place, parts, sums)),
                (tf.constant(0), sums),
                parallel_iterations=1,
                maximum_iterations=steps,
            )
            return sums

        def whole(*batch: Any) -> None:
            apply_of(model.optimizer)(summed(*batch), weights)

        self.program = tf.function(summed if update_apart else whole, jit_compile=True, autograph=False)
        if not update_apart:
            self.update = lambda batch: self.program(*batch)
            return
        reserve = UpdateReserve()

        @tf.function(autograph=False)
        def apply(sums: list[Any]) -> None:
            with reserve.update_of(weights):
                model.optimizer.apply(sums, weights)

        self.update = lambda batch: apply(self.program(*batch))

    def written(self, batch: Any) -> list[Any]:
        """The variables that the compiled program writes."""
        from autobatch.graphs.writes import written_variables

        graph = self.program.get_concrete_function(*batch).graph
        return written_variables(graph, list(graph.variables))

    def held_bytes(self) -> int:
        """Bytes that are held between updates beyond the model's and the optimizer's variables."""
        from autobatch.tensors.variables import bytes_of

        return 0 if self.step is None else bytes_of(self.step.accumulators)


def processor_and_clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def seconds_of(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor, and of the clock, that ``run`` takes."""
    before = processor_and_clock()
    run()
    processor, clock = (after - then for after, then in zip(processor_and_clock(), before, strict=True))
    return processor, clock


def measured(name: str, steps: int, repeats: int) -> dict[str, Any]:
    """All figures of one model and number of micro-batches, but for failing and exactness."""
    import autobatch

    autobatch.limit_memory("6GiB")
    from autobatch.memory import allocations
    from autobatch.tensors.variables import bytes_of

    ways, rows = {}, {}
    for way in WAYS:
        model, batch = build(name, steps * MICRO_BATCH)
        ways[way] = Way(way, model, batch)
        processor, clock = seconds_of(lambda way=way, batch=batch: ways[way].update(batch))
        rows[way] = {"compilation": {"processor": processor, "clock": clock}}
        ways[way].update(batch)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for turn in range(repeats):
        for way in WAYS if turn % 2 else reversed(WAYS):
            taken[way].append(seconds_of(lambda way=way: ways[way].update(batch)))

    def most_bytes(way: Way, *, safe: bool) -> int:
        written = way.written(batch) if safe else []
        gc.collect()
        held = [variable.read_value() for variable in written]
        with allocations.recording("CPU:0", []) as recorded:
            way.update(batch)
        del held
        return recorded.most_bytes() + way.held_bytes()

    of_batch = sum(part.shape.num_elements() * part.dtype.size for part in batch)
    for way, row in rows.items():
        processor, clock = zip(*taken[way], strict=True)
        row["seconds"] = {"processor": statistics.median(processor), "clock": statistics.median(clock)}
        of_launches = list(zip(*taken[LAUNCHES], strict=True))
        row["share_of_launches"] = {
            unit: statistics.median(own / other for own, other in zip(mine, others, strict=True))
            for unit, mine, others in zip(("processor", "clock"), (processor, clock), of_launches, strict=True)
        }
        in_place = None if way == LAUNCHES else most_bytes(ways[way], safe=False) + of_batch
        row["bytes"] = {"in place": in_place, "safe": most_bytes(ways[way], safe=way != LAUNCHES) + of_batch}
    variables = [*model.trainable_variables, *model.optimizer.variables]
    sizes = {"batch": of_batch, "weights": bytes_of(model.trainable_variables), "variables": bytes_of(variables)}
    return {"model": name, "accumulation_steps": steps, "bytes": sizes, "ways": rows}


def errors_of(name: str) -> dict[str, float]:
    """How far each way's weights are from plain Keras's, over the length of its step."""
    import keras
    import numpy as np

    steps = ACCUMULATION_STEPS[0]

    def trained(way: str | None) -> Any:
        model, batch = build(name, steps * MICRO_BATCH, optimizer=keras.optimizers.SGD(0.05))
        if way is not None:
            Way(way, model, batch).update(batch)
        return np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables])

    before, plain = trained(None), trained(PLAIN)
    step = np.linalg.norm(plain - before)
    return {way: float(np.linalg.norm(trained(way) - plain) / step) for way in WAYS if way != PLAIN}


def failing(way: str) -> None:
    """Make an update where it does not fit; print what has become of the variables, then use them again."""
    import autobatch

    autobatch.limit_memory("48MiB")
    import numpy as np
    import tensorflow as tf

    small = 2 * MICRO_BATCH
    model, batch = build("lstm", small)
    made = Way(way.partition(",")[0] if way.endswith("safe") else way, model, batch)
    made.update(batch)
    variables = [*model.trainable_variables, *model.optimizer.variables]
    before = [np.array(variable.numpy()) for variable in variables]
    _, large = build("lstm", 400 * MICRO_BATCH)
    larger = Way(way.partition(",")[0] if way.endswith("safe") else way, model, large)
    held = [variable.read_value() for variable in larger.written(large)] if way.endswith("safe") else []
    with contextlib.suppress(tf.errors.ResourceExhaustedError):
        larger.update(large)
        print("the update fitted")
    del held, large
    kept = [tf.fill(each.shape, tf.cast(-1, each.dtype)) for each in before]  # whatever is free is used again
    same = [np.array_equal(one, variable.numpy()) for one, variable in zip(before, variables, strict=True)]
    print(f"{same.count(False)} of {len(same)} variables have lost their values", flush=True)
    del kept
    made.update(batch)
    print("trained on", flush=True)


def in_a_process(*options: str) -> tuple[int, list[str]]:
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "--failing" not in options:
        raise RuntimeError(done.stderr[-3000:])
    return done.returncode, done.stdout.splitlines()


def lines_of(row: dict[str, Any]) -> list[str]:
    lines = []
    for way, found in row["ways"].items():
        in_place, safe = (
            "" if size is None else f"{size / 2**20:.1f}"
            for size in (found["bytes"]["in place"], found["bytes"]["safe"])
        )
        seconds, share, first = found["seconds"], found["share_of_launches"], found["compilation"]
        lines.append(
            f"{row['model']:<20} {row['accumulation_steps']:>3} {way:<19} "
            f"{seconds['clock'] * 1e3:>8.0f} {seconds['processor'] * 1e3:>8.0f} "
            f"{share['clock']:>6.2f} {share['processor']:>6.2f} {in_place:>9} {safe:>9} "
            f"{first['clock']:>7.1f} {first['processor']:>7.1f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", default=",".join(map(str, ACCUMULATION_STEPS)), help="micro-batches in an update")
    parser.add_argument("--parts", default="rows,errors,failing", help="what to measure (default: all three)")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--errors", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--failing", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure[0], int(options.measure[1]), options.repeats)))
        return
    if options.errors:
        print(json.dumps(errors_of(options.errors)))
        return
    if options.failing:
        failing(options.failing)
        return
    print(
        f"{'model':<20} {'k':>3} {'way':<19} {'ms':>8} {'CPU ms':>8} {'share':>6} {'CPU':>6} {'in place':>9} "
        f"{'safe MiB':>9} {'first s':>7} {'CPU s':>7}"
    )
    found = about(options.repeats)
    if options.output and options.output.exists():  # what is not measured now stays
        found |= json.loads(options.output.read_text())

    def keep() -> None:
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(found, indent=1) + "\n")

    for name in options.models.split(","):
        for steps in options.steps.split(",") if "rows" in options.parts else ():
            _, said = in_a_process("--measure", name, steps, "--repeats", str(options.repeats))
            row = json.loads(said[-1])
            key = row["model"], row["accumulation_steps"]
            others = [each for each in found["rows"] if (each["model"], each["accumulation_steps"]) != key]
            found["rows"] = [*others, row]
            print("\n".join(lines_of(row)), flush=True)
            keep()
        if "errors" not in options.parts:
            continue
        _, said = in_a_process("--errors", name)
        errors = found["errors"][name] = json.loads(said[-1])
        print(f"{name:<20}   4 errors " + ", ".join(f"{way} {error:.1e}" for way, error in errors.items()), flush=True)
        keep()
    for way in FAILING if "failing" in options.parts else ():
        status, said = in_a_process("--failing", way)
        found["out_of_memory"][way] = {"exit_status": status, "said": said}
        print(f"out of memory, {way}: {'; '.join(said)}; the process ended with {status}", flush=True)
    keep()


def about(repeats: int) -> dict[str, Any]:
    """What was measured with, and room for what is found."""
    return {
        "command": "python benchmarks/whole_update.py",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("tensorflow", "keras")} | {"python": platform.python_version()},
        "micro_batch": MICRO_BATCH,
        "repeats": repeats,
        "rows": [],
        "errors": {},
        "out_of_memory": {},
    }


if __name__ == "__main__":
    main()
