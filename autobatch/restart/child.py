"""One process of the script: on the same terminal, with every signal delivered once.

The child stays in the process group of its parent, with the same terminal, standard input and outputs. So what the
terminal sends to the group (Ctrl-C, Ctrl-Z, a change of size) reaches the script without any doing, and must not be
passed on again. What somebody sends to the parent alone is passed on. The kernel says which of the two it is. Where
somebody signals the whole group, as a shell's ``kill %1`` does, the script gets the signal twice: this cannot be told
from a signal to the parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

PASSED_ON = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if name in dir(signal)
)
"""Signals that go to the script when they are sent to its parent."""

ENDING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP") if name in dir(signal))
"""Signals that ask for the end: a script that got one of them is not started again."""

LOOK_SECONDS = 0.5
"""Seconds between two looks at how much memory there is."""


class Signals:
    """Signals of the parent, kept back while the context is open, and handed out by :meth:`wait`."""

    def __init__(self) -> None:
        self._before: set[signal.Signals] = set()
        self._after_a_child: object = None
        self.asked_to_end: signal.Signals | None = None

    def __enter__(self) -> Signals:
        self._after_a_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would leave no status
        blocked = {signal.SIGCHLD, *PASSED_ON}
        self._before = {signal.Signals(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, blocked)}
        return self

    def __exit__(self, *_: object) -> None:
        while signal.sigtimedwait({signal.SIGCHLD, *PASSED_ON}, 0) is not None:
            pass  # each was answered, or came when nothing was left to do
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
        if callable(self._after_a_child) or self._after_a_child in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGCHLD, self._after_a_child)  # type: ignore[arg-type]

    @property
    def of_child(self) -> set[signal.Signals]:
        """Mask that a child begins with: the one from before."""
        return self._before - {signal.SIGCHLD}

    def wait(self, seconds: float, child: int | None = None) -> bool:
        """Wait for a signal and pass it on to ``child``; return False if none came in this time."""
        came = signal.sigtimedwait({signal.SIGCHLD, *PASSED_ON}, seconds)
        if came is None:
            return False
        number = signal.Signals(came.si_signo)
        if number in ENDING and self.asked_to_end is None:
            self.asked_to_end = number
        from_terminal = came.si_code > 0  # the kernel's own: it has gone to the whole foreground group
        if number == signal.SIGHUP and os.getsid(0) == os.getpid():
            from_terminal = False  # but that a terminal is gone is told to the leader of its session alone
        if number in PASSED_ON and child is not None and not from_terminal and came.si_pid != child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        return True


class Child:
    """A process of the script; ``exit_code`` is negative for a signal, as `subprocess` has it, None while it runs."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], signals: Signals) -> None:
        self._signals = signals
        self.exit_code: int | None = None
        # Python ignores these; a script starts with what every program starts with.
        defaults = [signal.Signals[name] for name in ("SIGPIPE", "SIGXFSZ") if name in dir(signal)]
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        self.pid = os.posix_spawn(
            command[0], list(command), environment, setsigmask=signals.of_child, setsigdef=defaults
        )

    def wait(self, look: Callable[[], None]) -> int:
        """Wait for the end, passing signals on; return the exit code. ``look`` is called every now and then."""
        look()
        while True:
            self._collect()
            if self.exit_code is not None:
                return self.exit_code
            if not self._signals.wait(LOOK_SECONDS, self.pid):
                look()

    def _collect(self) -> None:
        """Collect the dead: this child, and what others have left to this process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
