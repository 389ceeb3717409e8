"""Display of the magic's exceptions: autobatch's own take a line, others the traceback from the user's code on.

IPython shows what ``_render_traceback_`` of an exception returns in place of its own rendering, in a kernel and in a
terminal: https://ipython.readthedocs.io/en/stable/config/integrating.html#custom-exception-tracebacks. The exception
itself, its type and its traceback stay unchanged, for ``%debug``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from autobatch.errors import AutobatchError
from autobatch.notebook.magic_line import FILE_NAME
from autobatch.tracebacks import is_library, is_own, raised_here


def prepare(error: BaseException, shell: Any) -> None:
    """Make IPython show ``error`` in a line, or with the user's part of its traceback."""
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
    """Return True if autobatch itself raised ``error`` because of an argument that it was given."""
    return isinstance(error, (TypeError, ValueError)) and "Received: " in str(error) and raised_here(error)


def _users_part(traceback: TracebackType | None) -> TracebackType | None:
    """Return ``traceback`` from the user's first frame on; without one, from behind autobatch's last frame on."""
    links = list(_links(traceback))
    users = (link for link in links if not _is_own(link) and not is_library(_file(link)))
    after_own = max((i + 1 for i, link in enumerate(links) if _is_own(link)), default=0)
    return next(users, links[min(after_own, len(links) - 1)] if links else None)


def _links(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_own(link: TracebackType) -> bool:
    return _file(link) == FILE_NAME or is_own(_file(link))


def _file(link: TracebackType) -> str:
    return link.tb_frame.f_code.co_filename
