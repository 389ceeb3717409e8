"""Modes of the terminal, put back behind a process that was killed in the middle of a question or of a screen."""

from __future__ import annotations

import contextlib
import os
from typing import Any


class TerminalModes:
    """Modes that the terminal of standard input has now; :meth:`restore` puts them back."""

    def __init__(self) -> None:
        self._modes: list[Any] | None = None
        with contextlib.suppress(ImportError, OSError, ValueError):
            import termios

            if _is_in_front():
                with contextlib.suppress(termios.error):
                    self._modes = termios.tcgetattr(0)

    def restore(self) -> None:
        """Put the modes back, unless another job has the terminal now."""
        if self._modes is None:
            return
        import termios

        with contextlib.suppress(OSError, termios.error):
            if _is_in_front():
                termios.tcsetattr(0, termios.TCSADRAIN, self._modes)


def _is_in_front() -> bool:
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
