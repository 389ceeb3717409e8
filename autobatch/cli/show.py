"""``autobatch show FILE``: a saved report, rendered again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from autobatch.cli import output
from autobatch.cli.exit_codes import OK, UsageError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "show",
        help="render a report that was saved with --format json",
        description="Render a report that was saved with --format json.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help='a saved report, "-" for standard input')
    output.add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from autobatch.report import json

    output.check(options.output)
    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{options.file!r} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # not UTF-8, or a name with a null byte in it
        raise UsageError(f"{options.file!r} is not a saved report: {error}") from error
    try:
        report = json.load(text)
    except ValueError as error:
        raise UsageError(f"{options.file!r} is not a report that can be shown. {error}") from error
    output.write(report, format_name=options.format, path=options.output)
    return OK
