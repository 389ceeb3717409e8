"""The command ``autobatch``: a module a command, each with ``add_parser(commands)`` and ``run(arguments) -> int``.

This process never imports TensorFlow; what needs it runs in a worker. rich is imported only to write a report or to
show progress, so that ``--help`` and a usage error answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from autobatch.cli import cache, devices, report, run, show
from autobatch.cli.exit_codes import FAILED, INTERRUPTED, OK, USAGE, USER_CODE, UsageError
from autobatch.errors import NoFeasibleBatchError, TargetError, UserCodeError, WorkerError
from autobatch.report.sentences import printable
from autobatch.version import __version__

_EXIT_CODES = """\
exit codes:
  0    done
  1    not even one sample fits, or --fail-under was missed
  2    the command line, or its TARGET, cannot be used; no COMMAND was given
  3    your own code failed, or a worker process did; what it said is on
       standard error
  130  interrupted with Ctrl-C
autobatch run ends as its script does
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return its exit code."""
    given, of_script = run.divide(list(sys.argv[1:] if argv is None else argv))
    try:
        parser = _parser()
        arguments = parser.parse_args(given, argparse.Namespace(of_script=of_script))
    except SystemExit as exit_of_argparse:  # --help, --version and usage errors, already printed
        return exit_of_argparse.code if isinstance(exit_of_argparse.code, int) else USAGE
    command: Callable[[argparse.Namespace], int] | None = arguments.run
    if command is None:  # help, and yet no success: a script that has lost its arguments must not go on
        parser.print_help(sys.stderr)
        return USAGE
    try:
        code = command(arguments)
        if sys.stdout is not None:  # it is None where it was closed before Python started
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain("interrupted; the workers are gone", INTERRUPTED)
    except (UsageError, TargetError) as error:
        return _complain(str(error), USAGE)
    except UserCodeError as error:
        if error.traceback_text.strip():
            print(error.traceback_text.rstrip(), file=sys.stderr)
        # Keras's messages run over many lines, and all of them stand in the traceback already.
        return _complain(str(error).partition("\n")[0], USER_CODE)
    except WorkerError as error:
        return _complain(str(error), USER_CODE)
    except NoFeasibleBatchError as error:
        return _complain(str(error), FAILED)
    except BrokenPipeError:
        # The reader of our output has gone, as in "autobatch ... | head". Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return code


def _complain(message: str, code: int) -> int:
    print(f"autobatch: {printable(message)}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autobatch",
        description="Find the micro-batch that fits in memory and is fastest, and the accumulation\n"
        "that a target batch needs, for a Keras model.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"autobatch {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (report, run, show, devices, cache):
        command.add_parser(commands)
    return parser
