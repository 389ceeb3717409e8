"""What searches find in small arenas, and in processes that have trained before: autobatch beside two loops.

    python benchmarks/used_processes.py --models cnn,gan --output benchmarks/results/used_processes.json

Six small convolutional models, a GAN among them, each in an arena of 40 to 256 MiB and a process of its own. The model
is built, searched and trained three times there, so that the second and third search find what the ones before have
left. After each search the largest size that fits the budget is found by bisection, with the very same trials. Two
loops that people write are charged the same trials: one halves from 512, the other takes a tenth off.

Operations run one at a time, as they do in every arena of ``limit_memory``. What the trials of the bisection hold
beside those of the search takes some memory, so that a size found may lie a little above what bisection finds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "used_processes.json"
MIB = 2**20
LIMITS_MIB = {"cnn": 64, "residual": 128, "depthwise": 96, "unet": 64, "autoencoder": 160, "gan": 160}
TRAININGS = 3
TOP = 512


# -- in a process of its own ------------------------------------------------------------------------------------------


def serve(name: str, headroom: float) -> None:
    """Search and train ``TRAININGS`` times; print a line of JSON for each."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    warnings.simplefilter("ignore")
    import autobatch

    autobatch.limit_memory(LIMITS_MIB[name] * MIB)
    import keras
    from small_models import SMALL_MODELS

    from autobatch import opening
    from autobatch.records import TrialRequest

    for training in range(1, TRAININGS + 1):
        keras.utils.set_random_seed(0)
        model, x, y = SMALL_MODELS[name]()
        started = time.perf_counter()
        report = autobatch.tune(model, x, y, headroom=headroom, objective="largest", cache=False)
        seconds = time.perf_counter() - started
        trials = opening.open_trials(
            model, x, y, target_batch=None, memory_limit_bytes=None, headroom=report.environment.headroom
        )
        taken: dict[int, tuple[bool, float]] = {}

        def fits(size: int, trials: Any = trials, taken: dict[int, tuple[bool, float]] = taken) -> bool:
            if size not in taken:
                begun = time.perf_counter()
                result = trials.run(TrialRequest(size, timed_steps=0, record_allocations=True))
                taken[size] = result.fits, time.perf_counter() - begun
            return taken[size][0]

        largest = _largest(fits, report.largest_fit or 1)
        loops = {}
        for loop, step in (("halving", _half), ("a tenth off", _less)):
            sizes = [TOP]
            while not fits(sizes[-1]) and sizes[-1] > 1:
                sizes.append(step(sizes[-1]))
            seconds_taken = sum(taken[size][1] for size in sizes)
            loops[loop] = {
                "found": sizes[-1],
                "trials": len(sizes),
                "failed": len(sizes) - 1,
                "seconds": seconds_taken,
            }
        trials.close()
        trials.step.release_accumulators()
        row = {
            "model": name,
            "limit_mib": LIMITS_MIB[name],
            "training": training,
            "headroom": report.environment.headroom,
            "largest": largest,
            "stopped_because": report.stopped_because,
            "autobatch": {
                "found": report.largest_fit,
                "trials": len(report.trials),
                "failed": sum(not trial.fits and trial.peak_bytes is None for trial in report.trials),
                "over": sum(not trial.fits and trial.peak_bytes is not None for trial in report.trials),
                "sizes": [[trial.micro_batch, trial.fits] for trial in report.trials],
                "seconds": seconds,
            },
            **loops,
        }
        print("ROW " + json.dumps(row), flush=True)
        micro_batch = max(1, (report.largest_fit or 1) // 2)
        autobatch.fit(model, x, y, target_batch=2 * micro_batch, micro_batch=micro_batch, epochs=1, verbose=0)


def _half(size: int) -> int:
    return size // 2


def _less(size: int) -> int:
    return int(size * 0.9)


def _largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest size that fits, by steps that double from ``start`` and then by bisection, to one per cent."""
    low, high, step = (start, None, max(1, start // 50)) if fits(start) else (0, start, 0)
    while high is None:
        if fits(low + step):
            low, step = low + step, 2 * step
        else:
            high = low + step
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- what is printed --------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    searchers = ("autobatch", "halving", "a tenth off")
    lines = [
        "| model, limit, training | largest | " + " | ".join(searchers) + " |",
        "|---|---|" + "---|" * len(searchers),
    ]
    for row in rows:
        cells = [
            f"{row[name]['found']}, {row[name]['trials']} trials, {row[name]['failed']} out of memory, "
            f"{row[name]['seconds']:.0f} s"
            for name in searchers
        ]
        title = f"{row['model']}, {row['limit_mib']} MiB, {row['training']}"
        lines.append(f"| {title} | {row['largest']} | " + " | ".join(cells) + " |")
    if not rows:
        return "\n".join(lines)
    lines.append("")
    lines.append("| | trials: median (most) | out of memory in all | found / largest: median (least) |")
    lines.append("|---|---|---|---|")
    for name in searchers:
        trials = [row[name]["trials"] for row in rows]
        failed = sum(row[name]["failed"] for row in rows)
        shares = [(row[name]["found"] or 0) / max(1, row["largest"]) for row in rows]
        lines.append(
            f"| {name} | {statistics.median(trials):g} ({max(trials)}) | {failed} in {len(rows)} searches "
            f"| {statistics.median(shares):.2f} ({min(shares):.2f}) |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, separated by commas; all of them by default")
    parser.add_argument("--headroom", type=float, default=0.05, help="share of the limit left alone (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the result file; a .md stands beside it")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.headroom)
        return 0
    names = options.models.split(",") if options.models else list(LIMITS_MIB)
    if unknown := [name for name in names if name not in LIMITS_MIB]:
        parser.error(f"--models must be among {', '.join(LIMITS_MIB)}. Received: {', '.join(unknown)}")
    rows: list[dict[str, Any]] = []
    text = ""
    for name in names:
        command = [sys.executable, __file__, "--serve", name, "--headroom", str(options.headroom)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if done.returncode:
            print(f"{name} ended with {done.returncode} after {len(found)} trainings: {done.stderr[-500:]}")
        rows += found
        print(f"{name}: {len(found)} trainings", flush=True)
        text = table(rows)
        options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(
            f"# Searches in small arenas and used processes\n\n`python benchmarks/used_processes.py`, headroom "
            f"{options.headroom:.0%}.\n\n{text}\n"
        )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
