"""``autobatch run`` in processes of its own, over small scripts that need no TensorFlow."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'"


def environment(**changes):
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def command(*arguments):
    return [sys.executable, "-m", "autobatch", "run", *map(str, arguments)]


def run(*arguments, env=(), **options):
    """Run the command to its end; standard output and standard error as text, unless ``options`` say otherwise."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(
        command(*arguments), env=environment(**dict(env)), text=True, timeout=120, check=False, **streams
    )


def script(folder, text, name="script.py"):
    """Write a script whose ``start`` is the number of this start, from 1 on."""
    path = folder / name
    path.write_text(_HEAD + textwrap.dedent(text))
    return path


_HEAD = """
import os, signal, sys, time
from pathlib import Path

_counter = Path(__file__).with_suffix(".starts")
start = int(_counter.read_text()) + 1 if _counter.exists() else 1
_counter.write_text(str(start))


def die_of_host_memory():
    print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
    os.abort()


def note(**changes):
    from autobatch.handover import status

    status.note_training()
    status._own_page().note(**changes)
"""


def starts(path):
    return int(path.with_suffix(".starts").read_text())


def join(group):
    """Move this process into a control group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
