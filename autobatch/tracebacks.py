"""Tracebacks cut down to the user's own frames: between the call of ``fit`` and the fault stands nothing else."""

from __future__ import annotations

import functools
import itertools
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_OWN_CODE = os.path.realpath(Path(__file__).parent) + os.sep
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_OF_INSTALLED = frozenset(("site-packages", "dist-packages"))
"""Folders that packages are installed in, wherever they are: the user's own, or those of the system beside a venv."""


_NODE = "Detected at node"
_PLACE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>[^\n]+)')


def showing_users_line(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return ``function`` with the traceback of what it raises cut, as Keras cuts its own.

    Frames of autobatch and of TensorFlow's tracing go, up to the first line of the user's that was called from them.
    Of an error of :mod:`autobatch.errors` that autobatch itself raises, nothing is left but the call: its message says
    all. Another error that it raises stays as it is, and so does every one after
    ``keras.config.disable_traceback_filtering()``. Where an operation failed in a graph, a note names the user's line
    that had made it.
    """

    @functools.wraps(function)
    def wrapper(*args: _P.args, **options: _P.kwargs) -> _R:
        try:
            return function(*args, **options)
        except Exception as error:
            # TensorFlow cuts its own frames off, so that the last one may be ours.
            of_tensorflow = type(error).__module__.startswith("tensorflow.")
            if (of_tensorflow or not raised_here(error)) and _are_cut():
                _note_place(error)
                here = error.__traceback__
                if here is not None:
                    here.tb_next = _without_own(here.tb_next)
            elif error.__traceback__ is not None and _says_all(error) and _are_cut():
                error.__traceback__.tb_next = None
            raise

    return wrapper


def _says_all(error: Exception) -> bool:
    return any(kind.__name__ == "AutobatchError" for kind in type(error).__mro__)


def _are_cut() -> bool:
    config = getattr(sys.modules.get("keras"), "config", None)
    is_enabled = getattr(config, "is_traceback_filtering_enabled", None)
    return is_enabled is None or bool(is_enabled())


def _without_own(first: TracebackType | None) -> TracebackType | None:
    """Return the links from ``first`` on without autobatch's, and without what they have called of libraries."""
    links = []
    link = first
    while link is not None:
        links.append(link)
        link = link.tb_next
    files = [link.tb_frame.f_code.co_filename for link in links]
    behind = max((i + 1 for i, file in enumerate(files) if is_own(file)), default=0)
    own = [i for i, file in enumerate(files) if not is_own(file) and not is_library(file)]
    start = next((i for i in own if i >= behind), behind)
    kept = [links[i] for i in range(len(links)) if i >= start or i in own]
    for link, after in itertools.pairwise(kept):
        link.tb_next = after
    return kept[0] if kept else None


def _note_place(error: Exception) -> None:
    """Add the user's line to an error of a graph, which tells of every frame that has led to the operation."""
    text = str(error)
    if _NODE not in text or not hasattr(error, "add_note"):  # Python 3.10 has no notes
        return
    places = [found for found in _PLACE.finditer(text) if not is_own(found["file"]) and not is_library(found["file"])]
    if not places:
        return
    place = places[-1]
    source = linecache.getline(place["file"], int(place["line"])).strip()
    error.add_note(f"The operation is made by your code: {place[0]}{source and f': {source}'}")


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
