"""Many searches and trainings where XLA compiles every step: does any end in an error, or run out of memory?

    python benchmarks/compiled_searches.py --models lstm,gan --output benchmarks/results/compiled_searches.json

Each model, seven larger ones and six small convolutional ones, is searched by ``tune`` in a fresh process. Then it is
built again there and trained by ``fit``, which finds what the search before has left. Each process is run twice, in
arenas of two sizes. A training is one epoch of one effective batch that may be larger than what fits.
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
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compiled_searches.json"
MIB = 2**20
LIMITS_MIB = {
    "lstm": 64,
    "transformer_encoder": 320,
    "gpt": 384,
    "masked_text": 64,
    "vae": 256,
    "unet": 320,
    "plain_cnn": 256,
    "small cnn": 96,
    "small residual": 128,
    "small depthwise": 96,
    "small unet": 96,
    "small autoencoder": 160,
    "small gan": 160,
}
SHARES = (1.0, 0.8)
TARGET = 256


# -- in a process of its own ------------------------------------------------------------------------------------------


def serve(name: str, limit_mib: int) -> None:
    """Search, build anew and train; print a line of JSON for each."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    warnings.simplefilter("ignore")
    import autobatch

    autobatch.limit_memory(limit_mib * MIB)
    import keras
    import small_models

    for part in ("tune", "fit"):
        keras.utils.set_random_seed(0)
        model, x, y = small_models.built(name, TARGET)
        model.jit_compile = True
        begun = time.perf_counter()
        recoveries = 0
        if part == "tune":
            report = autobatch.tune(model, x, y, target_batch=TARGET, cache=False)
        else:
            history = autobatch.fit(model, x, y, target_batch=TARGET, epochs=1, cache=False, verbose=0)
            report, recoveries = history.report, len(history.recoveries)
        row = {
            "model": name,
            "limit_mib": limit_mib,
            "part": part,
            "sizes": [[trial.micro_batch, trial.fits] for trial in report.trials],
            "failed": sum(not trial.fits and trial.peak_bytes is None for trial in report.trials),
            "over": sum(not trial.fits and trial.peak_bytes is not None for trial in report.trials),
            "planned": report.plan.micro_batch,
            "recoveries": recoveries,
            "stopped_because": report.stopped_because,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        print("ROW " + json.dumps(row), flush=True)


# -- what is printed --------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], errors: list[str]) -> str:
    lines = ["| model, limit | part | sizes tried | out of memory | planned | recoveries | seconds |", "|" + "---|" * 7]
    for row in rows:
        sizes = ", ".join(f"{size}{'' if fits else ' (not)'}" for size, fits in row["sizes"])
        lines.append(
            f"| {row['model']}, {row['limit_mib']} MiB | {row['part']} | {sizes} | {row['failed']} | {row['planned']} "
            f"| {row['recoveries']} | {row['seconds']:.0f} |"
        )
    counts = [len(row["sizes"]) for row in rows] or [0]
    failed = [row["failed"] for row in rows]
    lines += [
        "",
        f"{len(rows)} searches: {len(errors)} ended in an error. {sum(failed)} trials ran out of memory, in "
        f"{sum(map(bool, failed))} searches. Trials: median {statistics.median(counts):g}, {max(counts)} at most. "
        f"Recoveries in training: {sum(row['recoveries'] for row in rows)}.",
        *errors,
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, separated by commas; all of them by default")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the result file; a .md stands beside it")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--limit-mib", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.limit_mib)
        return 0
    names = options.models.split(",") if options.models else list(LIMITS_MIB)
    if unknown := [name for name in names if name not in LIMITS_MIB]:
        parser.error(f"--models must be among {', '.join(LIMITS_MIB)}. Received: {', '.join(unknown)}")
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for name in names:
        for share in SHARES:
            limit_mib = int(LIMITS_MIB[name] * share)
            command = [sys.executable, __file__, "--serve", name, "--limit-mib", str(limit_mib)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1]
                errors.append(f"{name}, {limit_mib} MiB: ended with {done.returncode} after {len(found)}: {last}")
                print(errors[-1], flush=True)
            rows += found
            print(
                f"{name}, {limit_mib} MiB: {[(row['part'], row['sizes'], row['seconds']) for row in found]}", flush=True
            )
            text = table(rows, errors)
            options.output.write_text(json.dumps({"rows": rows, "errors": errors}, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(
                f"# Searches and trainings under XLA\n\n`python benchmarks/compiled_searches.py`.\n\n{text}\n"
            )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
