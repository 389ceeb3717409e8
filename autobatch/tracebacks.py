"""Tracebacks cut down to the user's own frames: worker processes and notebooks show no frame of autobatch's."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

_OWN_CODE = os.path.realpath(Path(__file__).parent) + os.sep
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_OF_INSTALLED = frozenset(("site-packages", "dist-packages"))
"""Folders that packages are installed in, wherever they are: the user's own, or those of the system beside a venv."""


def raised_here(error: BaseException) -> bool:
    """Return True if autobatch itself has raised the error, and nothing that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and is_own(frames[-1].filename)


def frames_from(frame: FrameType | None) -> list[FrameType]:
    """Return the frames that have led to ``frame``, innermost first, but for autobatch's own; all if there are none."""
    found = [each for each, _ in traceback.walk_stack(frame)]
    return [each for each in found if not is_own(each.f_code.co_filename)] or found


def user_traceback(error: BaseException) -> str:
    """Return ``error`` as Python prints it, from the user's first frame on."""
    report = traceback.TracebackException.from_exception(error)
    _trim(report)
    if not report.stack and report.__cause__ is None and report.__context__ is None:
        return "".join(report.format_exception_only())
    return "".join(report.format())


def _trim(report: traceback.TracebackException) -> None:
    frames = list(report.stack)
    users = [i for i, frame in enumerate(frames) if not is_own(frame.filename) and not is_library(frame.filename)]
    others = [i for i, frame in enumerate(frames) if not is_own(frame.filename) and not _is_import(frame.filename)]
    first = next(iter(users or others), len(frames))
    report.stack = traceback.StackSummary.from_list(frames[first:])
    for link in (report.__cause__, report.__context__):
        if link is not None:
            _trim(link)


def is_own(filename: str) -> bool:
    """Return True for a file of autobatch's."""
    return os.path.realpath(filename).startswith(_OWN_CODE)


def _is_import(filename: str) -> bool:
    return filename.startswith("<frozen ")


def is_library(filename: str) -> bool:
    """Return True for a file of Python's or of an installed package."""
    path = os.path.realpath(filename)
    return _is_import(filename) or path.startswith(_LIBRARIES) or not _OF_INSTALLED.isdisjoint(Path(path).parts)
