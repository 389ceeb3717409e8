"""Time from the call of ``fit`` to the end of the first update, where the target batch does not fit.

    python benchmarks/first_update.py --models unet,gpt --output benchmarks/results/first_update.json

Plain Keras trains the target batch in an arena that is large enough for it. ``autobatch.fit`` trains it in one where it
does not fit: it looks for a micro-batch first. Each is timed in a process of its own, from the call on, so that imports
and the model's making count for neither. Beside the seconds of the clock stand those of the processor, which depend
less on what else runs. Operations run one at a time in both. ``--xla`` compiles the steps of both.
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
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "first_update.json"
MIB = 2**20
LARGE_MIB = 6144
CASES = {
    "unet": (320, 256),
    "plain_cnn": (256, 256),
    "vae": (256, 512),
    "gpt": (384, 256),
    "transformer_encoder": (320, 512),
    "masked_text": (48, 256),
    "mobilenet_v3_small": (384, 256),
    "resnet50": (640, 128),
    "small cnn": (96, 512),
    "small residual": (128, 512),
    "small unet": (64, 512),
    "small gan": (160, 512),
}
"""Each model's limit in MiB, and the target batch."""


# -- in a process of its own ------------------------------------------------------------------------------------------


def serve(name: str, *, plain: bool, compiled: bool) -> None:
    """Train one update, and print its seconds as a line of JSON."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    warnings.simplefilter("ignore")
    import autobatch

    limit_mib, target = CASES[name]
    autobatch.limit_memory((LARGE_MIB if plain else limit_mib) * MIB)
    import keras
    import small_models
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(0)
    model, x, y = small_models.built(name, target)
    model.jit_compile = compiled
    seconds: list[float] = []

    class FirstUpdate(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seconds.extend((time.perf_counter() - begun, time.process_time() - begun_in_processor))

    begun, begun_in_processor = time.perf_counter(), time.process_time()
    told: dict[str, Any] = {}
    if plain:
        model.fit(x, y, batch_size=target, epochs=1, verbose=0, callbacks=[FirstUpdate()])
    else:
        history = autobatch.fit(
            model, x, y, target_batch=target, epochs=1, verbose=0, cache=False, callbacks=[FirstUpdate()]
        )
        trials = history.report.trials
        told = {"planned": history.plan.micro_batch, "sizes": [[trial.micro_batch, trial.fits] for trial in trials]}
    told |= {"seconds": round(seconds[0], 2), "processor_seconds": round(seconds[1], 2)}
    print("ROW " + json.dumps(told), flush=True)


# -- what is printed --------------------------------------------------------------------------------------------------


def measured(name: str, *options: str) -> dict[str, Any]:
    """Run one training in a process of its own.

    Raises:
        SystemExit: it ended in an error.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--serve", name, *options], capture_output=True, text=True, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or not found:
        raise SystemExit(f"{name} {' '.join(options)} ended with {done.returncode}: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(found[-1][4:])
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| model, limit, target | sizes tried | planned | plain | autobatch | ratio | ratio by processor |"]
    lines.append("|" + "---|" * 7)
    ratios = []
    for name, row in rows.items():
        plain, ours = row["plain"], row["autobatch"]
        ratio = [ours[key] / plain[key] for key in ("seconds", "processor_seconds")]
        ratios.append(ratio)
        sizes = ", ".join(f"{size}{'' if fits else ' (not)'}" for size, fits in ours["sizes"])
        lines.append(
            f"| {name}, {CASES[name][0]} MiB, {CASES[name][1]} | {sizes} | {ours['planned']} "
            f"| {plain['seconds']:.1f} s | {ours['seconds']:.1f} s | {ratio[0]:.2f} | {ratio[1]:.2f} |"
        )
    by_clock, by_processor = (statistics.median(each) for each in zip(*ratios, strict=True))
    lines += ["", f"Median of {len(rows)}: {by_clock:.2f} by the clock, {by_processor:.2f} by the processor."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, separated by commas; all of them by default")
    parser.add_argument("--xla", action="store_true", help="compile the steps of both")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the result file; a .md stands beside it")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, plain=options.plain, compiled=options.xla)
        return 0
    names = options.models.split(",") if options.models else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--models must be among {', '.join(CASES)}. Received: {', '.join(unknown)}")
    compiled = ["--xla"] if options.xla else []
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        rows[name] = {"plain": measured(name, "--plain", *compiled), "autobatch": measured(name, *compiled)}
        print(name, rows[name], flush=True)
        about = {"python": platform.python_version(), "xla": options.xla}
        options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        command = "python benchmarks/first_update.py" + " --xla" * options.xla
        options.output.with_suffix(".md").write_text(
            f"# Time to the first update\n\n`{command}`.\n\n{table(rows)}\n",
        )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
