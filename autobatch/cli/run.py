"""``autobatch run``: a script as a child process, started again when memory has killed it.

It never imports TensorFlow, and rich neither: the script starts a few tens of milliseconds later than by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys

from autobatch.cli import arguments
from autobatch.cli.exit_codes import UsageError
from autobatch.report.sentences import printable

_EXAMPLES = """\
examples:
  autobatch run train.py config.yaml
  autobatch run --restarts 5 -m package.train config.yaml
"""
_DESCRIPTION = """\
Start a script, and start it again when memory has killed it: a SIGKILL of the
kernel's for memory, a crash in an allocator, a device that was lost.
autobatch.fit then begins smaller: shorter queues, or a smaller micro-batch.
With fit(..., backup="FOLDER") it goes on behind the last update that was kept,
else from its beginning. Three deaths without a new backup between them end it.
A bug, an exit code of the script's own, Ctrl-C and SIGTERM are passed on.
"""
_WITH_VALUE = ("--restarts",)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run",
        help="start a script, and start it again when memory has killed it",
        usage="autobatch run [-h] [--restarts N] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    script = parser.add_argument_group("script")
    script.add_argument(
        "script", metavar="SCRIPT", nargs="?", help="a Python file; what follows it is the script's own"
    )
    script.add_argument("-m", dest="module", metavar="MODULE", help="a module in place of a file, as for python -m")
    restarts = parser.add_argument_group("restarts")
    restarts.add_argument(
        "--restarts",
        type=arguments.restarts,
        metavar="N",
        help="start it again N times at most; 0 only says what it died of (default: as often as backups go on)",
    )
    parser.set_defaults(run=run)


def divide(given: list[str]) -> tuple[list[str], list[str]]:
    """Divide the command line of ``autobatch run`` in its own part, script included, and the script's arguments.

    argparse would take the script's ``--restarts`` for its own. Other commands have nothing behind the division.
    """
    if given[:1] != ["run"]:
        return given, []
    place = 1
    while place < len(given):
        argument = given[place]
        if argument == "--":
            return given[: place + 2], given[place + 2 :]
        if argument == "-m":
            return given[: place + 2], given[place + 2 :]
        if not argument.startswith("-") or argument == "-" or argument.startswith("-m"):
            return given[: place + 1], given[place + 1 :]
        place += 2 if argument in _WITH_VALUE else 1
    return given, []


def run(options: argparse.Namespace) -> int:
    command = [_python(), *_of_script(options), *options.of_script]
    if not hasattr(signal, "sigtimedwait"):
        raise UsageError("autobatch run needs Linux, whose kernel counts what it kills for memory.")
    from autobatch.restart.supervisor import run_and_restart

    try:
        exit_code = run_and_restart(command, options.restarts, _say)
    except OSError as error:
        raise UsageError(f"The script cannot be started: {error.strerror or error}.") from error
    return exit_code if exit_code >= 0 else _end_by(-exit_code)


def _python() -> str:
    if not sys.executable:
        raise UsageError("This Python does not know its own program, by which a script would be started.")
    return sys.executable


def _of_script(options: argparse.Namespace) -> list[str]:
    if options.module is not None:
        _require_module(options.module)
        return ["-m", options.module]
    path = options.script
    if path is None:
        raise UsageError("autobatch run needs a SCRIPT, or -m MODULE: autobatch run train.py")
    if path == "-":
        raise UsageError("A script on standard input can be read only once, so that it could not be started again.")
    if "\0" in path or not os.path.exists(path):
        hint = ""
        if os.path.basename(path).startswith("python"):
            hint = " Leave the interpreter out: autobatch run train.py"
        raise UsageError(f"There is no such script. Received: {path!r}.{hint}")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__main__.py")):
        raise UsageError(f"A folder is run by its __main__.py, and this one has none. Received: {path!r}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"No permission to read the script. Received: {path!r}")
    return [path if os.path.isabs(path) or not path.startswith("-") else os.path.join(".", path)]


def _require_module(name: str) -> None:
    """Refuse a module that Python cannot find. Its packages are not imported for that."""
    top = name.partition(".")[0]
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        found = top.isidentifier() and importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        found = False
    finally:
        sys.path[:] = before
    if not found:
        raise UsageError(f"Python finds no such module. Received: -m {name!r}")


def _say(line: str) -> None:
    """Write a line on standard error, below a bar that may stand on the terminal."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):  # it may be closed
        start = "\n" if sys.stderr.isatty() else ""
        first, *rest = line.split("\n")
        lines = [f"{start}autobatch: {printable(first)}", *(f"  {printable(each)}" for each in rest)]
        print("\n".join(lines), file=sys.stderr, flush=True)


def _end_by(number: int) -> int:
    """End this process by the signal that has ended the script; return a shell's code where it does not end by it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(
            resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
        )  # the script's is there
    with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.kill(os.getpid(), number)
    return 128 + number
