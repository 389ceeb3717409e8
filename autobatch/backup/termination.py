"""SIGTERM during a training with a backup: the update under way is ended, a backup written, and the process left.

A preempted machine and a scheduler's time limit announce themselves by this signal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger("autobatch")


class Termination:
    """Handler of SIGTERM that waits for the end of an update; ``before_leaving`` writes what is not written yet."""

    def __init__(self, before_leaving: Callable[[], None]) -> None:
        self._before_leaving = before_leaving
        self._previous: Any = None
        self._installed = False
        self._under_way = False
        self._answering = False
        self.asked = False
        """True if the signal has come and was not answered yet."""

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signal while the context is open: on the main thread, and unless the program ignores it."""
        if threading.current_thread() is threading.main_thread():
            self._install()
        try:
            yield
        finally:
            self._under_way = False
            if self._installed:
                self._uninstall()
                if self.asked:  # an error has ended the update that was waited for
                    self._leave()

    def _install(self) -> None:
        previous = signal.getsignal(signal.SIGTERM)
        if previous is None or previous is signal.SIG_IGN:  # None: not Python's, and it could not be put back
            return
        self._previous = previous
        signal.signal(signal.SIGTERM, self._on_signal)
        self._installed = True

    def _uninstall(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._previous)
        self._installed = False

    def begin_update(self) -> None:
        """Wait for :meth:`end_update` from now on, should the signal come."""
        self._under_way = True

    def end_waiting(self) -> None:
        """Answer the signal from now on as it comes; there was no update any more."""
        self._under_way = False

    def end_update(self) -> None:
        """Leave by the signal if it has come during the update."""
        self._under_way = False
        if self.asked:
            self._answer()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self._under_way and not self._answering:
            self._answer()

    def _answer(self) -> None:
        self._answering = True  # a second signal while the backup is written changes nothing
        logger.warning("SIGTERM: a backup is written, and training is left by the signal.")
        try:
            self._before_leaving()
        finally:
            self._answering = False
        self._uninstall()
        self._leave()
        self._install()  # a handler of the program's own has let it go on

    def _leave(self) -> None:
        self.asked = False
        if callable(self._previous):  # the program's own; a signal sent to it might reach ours, put back meanwhile
            self._previous(signal.SIGTERM, sys._getframe())
        else:
            os.kill(os.getpid(), signal.SIGTERM)
