"""How an exception of the magic is shown: of autobatch's own a line, of the user's code the traceback from there on.

IPython shows what ``_render_traceback_`` of an exception returns in place of its own rendering, in a kernel as in a
terminal: https://ipython.readthedocs.io/en/stable/config/integrating.html#custom-exception-tracebacks. The exception
itself, its type and its traceback stay as they were, for ``%debug``.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from autobatch.errors import AutobatchError
from autobatch.notebook.magic_line import FILE_NAME
from autobatch.types import Model

_OWN_CODE = str(Path(__file__).resolve().parents[1]) + os.sep
_LIBRARIES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def prepare(error: BaseException, shell: Model) -> None:
    """Make IPython show ``error`` as this room wants it."""
    if isinstance(error, KeyboardInterrupt):
        _show(error, lambda: ["KeyboardInterrupt: the search was stopped; the model is as it was."])
    elif isinstance(error, AutobatchError) or _is_of_an_argument(error):
        _show(error, lambda: [f"{type(error).__name__}: {error}"])
    else:
        part = _users_part(error.__traceback__)
        _show(error, lambda: shell.InteractiveTB.structured_traceback(type(error), error, part, tb_offset=0))


def _show(error: BaseException, lines: Callable[[], list[str]]) -> None:
    error._render_traceback_ = lines  # type: ignore[attr-defined]


def _is_of_an_argument(error: BaseException) -> bool:
    """Whether autobatch itself has raised this, of what it was given."""
    if not isinstance(error, (TypeError, ValueError)) or "Received: " not in str(error):
        return False
    links = list(_links(error.__traceback__))
    return bool(links) and _is_own(links[-1])


def _users_part(traceback: TracebackType | None) -> TracebackType | None:
    """``traceback`` from the user's first frame on, or from where autobatch has called the last time."""
    links = list(_links(traceback))
    users = (link for link in links if not _is_own(link) and not _file(link).startswith(_LIBRARIES))
    after_own = max((i + 1 for i, link in enumerate(links) if _is_own(link)), default=0)
    return next(users, links[min(after_own, len(links) - 1)] if links else None)


def _links(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_own(link: TracebackType) -> bool:
    return link.tb_frame.f_code.co_filename == FILE_NAME or _file(link).startswith(_OWN_CODE)


def _file(link: TracebackType) -> str:
    return os.path.abspath(link.tb_frame.f_code.co_filename)
