"""Lines about a training while it runs, each on a line of its own, whatever bar stands on the terminal."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator

from autobatch.terminal import kept_aside

logger = logging.getLogger("autobatch")


@dataclasses.dataclass(frozen=True)
class _Training:
    bar_is_open: Callable[[], bool]
    quiet: bool


_training: contextvars.ContextVar[_Training | None] = contextvars.ContextVar("autobatch_training", default=None)


def are_shown() -> bool:
    """Return False where the user has turned off all that is shown of a search and of a training."""
    return os.environ.get("AUTOBATCH_PROGRESS") != "0"


@contextlib.contextmanager
def training(bar_is_open: Callable[[], bool], *, quiet: bool) -> Iterator[None]:
    """Let :func:`tell` know of a training's bar on standard output, or of its silence, while the block runs."""
    token = _training.set(_Training(bar_is_open, quiet))
    try:
        yield
    finally:
        _training.reset(token)


def tell(line: str, *, log: str = "", level: int) -> None:
    """Tell of something in a training, in one line.

    Where the user has set up logging it goes to the logger "autobatch", in the words of ``log``. Otherwise it is
    printed on standard error, unless the training is silent.
    """
    if logger.hasHandlers() and logger.isEnabledFor(level):
        start_line()
        logger.log(level, "%s", log or line)
    else:
        now = _training.get()
        if are_shown() and not (now and now.quiet):
            write_line(line)


def write_line(line: str) -> None:
    """Write ``line`` to standard error, on a line of its own, behind the project's name."""
    if sys.stderr is None:
        return
    start_line()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed, or a stand-in that cannot flush
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is not None:  # it takes its own bars away meanwhile
            tqdm.write(f"autobatch: {line}", file=sys.stderr)
        else:
            print(f"autobatch: {line}", file=sys.stderr)
        sys.stderr.flush()


def start_line() -> None:
    """Leave the line that Keras's bar stands on, if standard error leads to the same place; the bar goes on below."""
    now = _training.get()
    if now is None or not now.bar_is_open() or not kept_aside.stdout_is_stderr():
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # somebody's own standard output has no number
        if sys.stdout.fileno() == 1:
            sys.stdout.write("\n")
            sys.stdout.flush()
