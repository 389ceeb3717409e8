"""How long the command takes to answer where it need not start TensorFlow: ``--help`` and errors of usage.

``python benchmarks/cli_start.py [--output results/cli_start.json] [--repeats 9]``

Whole processes, taking turns; the median of their wall-clock seconds. Beside them: Python itself, and the ``--help``
of Accelerate's command, whose job is near to this one's, where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOAL_SECONDS = 0.3

OURS = {
    "autobatch --help": ["--help"],
    "autobatch report --help": ["report", "--help"],
    "autobatch report (no target)": ["report"],
    "autobatch report absent.py:build": ["report", "absent.py:build"],
    "autobatch report m:build --memory-limit 5x": ["report", "m:build", "--memory-limit", "5x"],
    "autobatch show absent.json": ["show", "absent.json"],
    "autobatch cache list": ["cache", "list"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands |= {name: [sys.executable, "-m", "autobatch", *arguments] for name, arguments in OURS.items()}
    if importlib.util.find_spec("accelerate"):
        peer = "from accelerate.commands.accelerate_cli import main; main()"
        commands["accelerate --help"] = [sys.executable, "-c", peer, "--help"]
    environment = {**os.environ, "AUTOBATCH_CACHE_DIR": os.devnull}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, env=environment, check=False)
            if turn:  # the first turn fills the file cache
                taken[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name, seconds in medians.items():
        verdict = "" if not name.startswith("autobatch") else "  reached" if seconds < GOAL_SECONDS else "  MISSED"
        print(f"{name:<44} {seconds:6.3f} s{verdict}")
    if options.output:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        command = "python benchmarks/cli_start.py"
        results = {"command": command, "machine": machine, "repeats": options.repeats, "median_seconds": medians}
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
