"""Output of a report: to standard output, or to a file that is written under another name and then renamed."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from autobatch.cli.exit_codes import UsageError
from autobatch.errors import AutobatchWarning
from autobatch.records import Report
from autobatch.report import RENDERERS, render
from autobatch.report.sentences import printable


def add_arguments(parser: argparse.ArgumentParser, *, default_format: str | None = "text") -> argparse._ArgumentGroup:
    """Add the options for the format and the place of the output; return their group.

    ``default_format=None`` leaves the format to the front end where none is asked for.
    """
    told = "HTML in a notebook, else text" if default_format is None else "%(default)s"
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=list(RENDERERS),
        default=default_format,
        help=f"text to read, json for programs and for autobatch show, html for a browser, markdown for issues and "
        f"pull requests (default: {told})",
    )
    group.add_argument("--output", metavar="FILE", help="write the report to FILE, not to standard output")
    return group


def check(path: str | None) -> None:
    """Refuse an ``--output`` that could not be written, before any work is done for it."""
    if path is None:
        return
    if not path or "\0" in path:
        raise UsageError(f"--output needs the name of a file. Received: {path!r}")
    if os.path.isdir(path):
        raise UsageError(f"--output names a folder, not a file. Received: {path!r}")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"--output: there is no folder {folder!r}. Received: {path!r}")
    if not os.access(path if _is_special(path) else folder, os.W_OK):
        raise UsageError(f"--output: no permission to write there. Received: {path!r}")


def write(report: Report, *, format_name: str, path: str | None) -> None:
    if path is None:
        reconfigure_stdout()
        print(_for_stdout(report, format_name))
        return
    text = render(report, format_name) + "\n"
    try:
        if _is_special(path):  # /dev/stdout, a named pipe: renaming a file over it would replace it
            Path(path).write_text(text, encoding="utf-8")
        else:
            _write_aside(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise UsageError(f"--output: {error.strerror or error}. Received: {path!r}") from error


def _for_stdout(report: Report, format_name: str) -> str:
    """Return the report in the format; text gets colours if a terminal shows it."""
    if format_name != "text":
        return render(report, format_name)
    from autobatch.report import text

    return text.render(report, color=None)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Keep autobatch's own warnings back; write each as a line on standard error when the ``with`` block ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AutobatchWarning)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, AutobatchWarning):
                    print(f"autobatch: {printable(str(warning.message))}", file=sys.stderr)
                else:
                    warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".autobatch-{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, aside)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)  # an interrupt, too, must leave no half a file behind


def _is_special(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)


def reconfigure_stdout() -> None:
    """Let an ASCII-only terminal show an escape for a character that it lacks, in place of a traceback."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
