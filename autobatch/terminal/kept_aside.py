"""TensorFlow's lines of a failure that was expected are kept aside; nobody else's output is touched.

When memory runs out, TensorFlow's C++ writes a list of all that its allocator holds to file descriptor 2: dozens or
hundreds of lines. In a trial, and in a step that will be undone and run again, that is no news. So while a step runs,
descriptor 2 is a pipe to a process of ours, :mod:`autobatch.terminal.relay`. That passes everything else on, byte for
byte and at once. Between steps the descriptor is what it was: to the user's callbacks a terminal is a terminal.

What was kept aside goes to the logger "autobatch", at its debug level, once the failure has been dealt with. If an
error that nobody expected ends the step, or a crash the process, it is printed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from autobatch.errors import AutobatchError
from autobatch.handover.folder import open_last_words
from autobatch.terminal import relay

logger = logging.getLogger("autobatch")

_PATIENCE_SECONDS = 5.0
_END_SECONDS = 0.1
_IDLE_SECONDS = 10.0
_STDOUT, _STDERR = 1, 2
_lock = threading.RLock()
_relay: _RelayProcess | None = None
_windows: weakref.WeakSet[Window] = weakref.WeakSet()
"""Windows that are open. One whose end an interrupt has kept from being noted is gone with its ``with`` block."""

_failed_to_start = False
_timer: threading.Timer | None = None
_last_used = 0.0
_left_alone: list[subprocess.Popen[bytes]] = []
"""Processes that go on for the sake of a process that the user's code has started: its standard error is their pipe."""


def is_wanted() -> bool:
    """Return False where somebody wants to see all of TensorFlow's lines, or where there will be none."""
    if os.environ.get("AUTOBATCH_KEEP_ASIDE") == "0":
        return False
    if os.environ.get("TF_CPP_MAX_VLOG_LEVEL", "0") != "0" or os.environ.get("TF_CPP_VMODULE"):
        return False
    return os.environ.get("TF_CPP_MIN_LOG_LEVEL") not in ("0", "3")


class Window:
    """Time in which TensorFlow's lines are kept aside; :attr:`explained` is True once their failure is dealt with."""

    def __init__(self, *, explained: bool) -> None:
        self.explained = explained

    def failure_dealt_with(self) -> None:
        """Take note that memory ran out and the step was undone."""
        self.explained = True


@contextlib.contextmanager
def window(*, expected: bool = False) -> Iterator[Window]:
    """Keep TensorFlow's allocator lines aside while the ``with`` block runs.

    They are printed at its end if an error ends it that is none of ours. Without an error they are printed if the
    failure that they tell of was not dealt with, unless failures are ``expected``.
    """
    here = Window(explained=expected)
    by_error = False
    try:
        _enter(here, sieves=is_wanted(), stdout_too=False)
        yield here
    except AutobatchError:
        here.explained = True
        raise
    except Exception:
        by_error = True
        raise
    finally:
        _leave(here, by_error=by_error)


@contextlib.contextmanager
def table_below() -> Iterator[Table | None]:
    """Yield a table that is drawn on the terminal below whatever is printed meanwhile; None where there is no terminal.

    It is gone when the ``with`` block ends.
    """
    here = Window(explained=True)
    table = None
    try:
        if is_terminal() and os.environ.get("TERM") != "dumb" and _enter(here, sieves=is_wanted(), stdout_too=True):
            assert _relay is not None
            table = Table(_relay)
        yield table
    finally:
        if table is not None:
            table.show("")
        _leave(here, by_error=False)


class Table:
    """Lines at the bottom of the terminal."""

    def __init__(self, process: _RelayProcess) -> None:
        self._process = process

    @property
    def size(self) -> os.terminal_size:
        """Columns and lines of the terminal."""
        try:
            return os.get_terminal_size(_real(_STDERR))
        except OSError:
            return os.terminal_size((80, 24))

    def show(self, text: str) -> None:
        """Draw ``text``, its lines no wider than the terminal, in place of what was drawn before."""
        self._process.draw(text.encode(getattr(sys.stderr, "encoding", None) or "utf-8", "replace"))


def is_terminal() -> bool:
    """Return True if standard error leads to a terminal, now or once the window that is open has ended."""
    try:
        return os.isatty(_real(_STDERR))
    except OSError:
        return False


def stdout_is_stderr() -> bool:
    """Return True if standard output and standard error lead to the same terminal or file."""
    try:
        out, error = os.fstat(_real(_STDOUT)), os.fstat(_real(_STDERR))
    except OSError:
        return False
    return (out.st_dev, out.st_ino) == (error.st_dev, error.st_ino)


def _real(descriptor: int) -> int:
    with _lock:
        return descriptor if _relay is None else _relay.replaced.get(descriptor, descriptor)


def end() -> None:
    """End the process that passes things on, if no window is open."""
    global _relay
    with _lock:
        if _relay is not None and not _windows:
            relay, _relay = _relay, None
            relay.close()


def end_soon() -> None:
    """End the process when nothing has used it for a while: the next of many short trainings needs it at once."""
    global _last_used
    with _lock:
        _last_used = time.monotonic()
        _look_later()


def _look_later() -> None:
    global _timer
    if _relay is not None and _timer is None:
        _timer = threading.Timer(_IDLE_SECONDS, _end_if_idle)
        _timer.daemon = True
        _timer.start()


def _end_if_idle() -> None:
    global _timer
    with _lock:
        _timer = None
        if time.monotonic() - _last_used >= _IDLE_SECONDS:
            end()
        _look_later()


def _enter(here: Window, *, sieves: bool, stdout_too: bool) -> bool:
    """Open a window; return False if there is nothing to keep aside, or no means to."""
    global _relay, _failed_to_start, _last_used
    if not (sieves or stdout_too) or os.name != "posix":
        return False
    with _lock:
        _last_used = time.monotonic()
        if not _windows and _relay is not None:
            _relay.put_back()  # an interrupt may have ended the last one's end
        if _windows:  # one that is open already, in this thread or in another, does for both
            _windows.add(here)
            return True
        try:
            if _relay is not None and not (_relay.is_alive() and _relay.leads_to_stderr(sieves)):
                old, _relay = _relay, None
                old.close()
            if _relay is None:
                if _failed_to_start:
                    return False
                _relay = _RelayProcess(sieves)
            _windows.add(here)  # first, so that an interrupt from here on is followed by its end
            _relay.replace(stdout_too=stdout_too)
        except OSError as error:
            _windows.discard(here)
            if _relay is not None:
                _relay.put_back()
            if _relay is None:
                _failed_to_start = os.path.exists(f"/dev/fd/{_STDERR}")  # a closed standard error may be opened again
            logger.debug("TensorFlow's lines are not kept aside: %r", error)
            return False
        return True


def _leave(here: Window, *, by_error: bool) -> None:
    with _lock:
        if here not in _windows:
            return  # in a process that was forked within the window, or there was nothing to keep aside
        assert _relay is not None
        try:
            _windows.discard(here)
            if not _windows:
                _relay.pass_all_on()  # first, so that what another thread prints in this moment overtakes nothing
        finally:
            if not _windows:
                _relay.put_back()  # whatever interrupts this
        if _windows and not (by_error or here.explained):
            return  # what there is may be of another thread's step, which has yet to deal with it
        kept = _relay.take_kept()
        if kept and (by_error or not here.explained):
            _relay.print(kept)
        elif kept:
            logger.debug("TensorFlow's lines of a failure that was expected:\n%s", kept.decode("utf-8", "replace"))


class _RelayProcess:
    """The process, the pipe that leads to it, and what it shares with this one."""

    def __init__(self, sieves: bool) -> None:
        if not sys.executable:
            raise OSError("this Python does not know its own program")
        self.replaced: dict[int, int] = {}
        self._sieves = sieves
        self._status = os.fstat(_STDERR)
        self._descriptors: list[int] = []
        try:
            self._target = self._own(os.dup(_STDERR))
            self._source, self._into = map(self._own, os.pipe())
            self._control, self._draws = map(self._own, os.pipe())
            self._kept = self._own(_unlinked_file())
            state = self._own(_unlinked_file())
            os.write(state, bytes(mmap.PAGESIZE))
            self._busy = mmap.mmap(state, mmap.PAGESIZE)
            self._last_words = [self._own(file) for file in open_last_words()]
            passed = (self._source, self._target, self._kept, state, self._control, *self._last_words)
            arguments = [*map(str, passed), str(os.getpid()), str(int(sieves))]
            self._process = subprocess.Popen(
                [sys.executable, "-E", "-s", "-S", relay.__file__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                start_new_session=True,  # Ctrl-C is for the training
                cwd=Path(relay.__file__).parent,
            )
        except BaseException:
            self._close_descriptors()
            raise
        # The end that the process reads stays open here too: were it killed, a print into the pipe must raise nothing.

    def _own(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def leads_to_stderr(self, sieves: bool) -> bool:
        """Return True if standard error is still what it was when the process was started."""
        now = os.fstat(_STDERR)
        return (now.st_dev, now.st_ino) == (self._status.st_dev, self._status.st_ino) and sieves == self._sieves

    def replace(self, *, stdout_too: bool) -> None:
        """Let standard error lead to the process; with ``stdout_too`` also standard output, on the same terminal."""
        replaced = [_STDERR]
        if stdout_too and os.isatty(_STDERR) and stdout_is_stderr():
            replaced.insert(0, _STDOUT)
        for descriptor in replaced:
            _flush(descriptor)
            self.replaced[descriptor] = os.dup(descriptor)
            os.dup2(self._into, descriptor)

    def put_back(self) -> None:
        """Let each descriptor be what it was; called again if an interrupt has ended it, it goes on."""
        for descriptor, before in list(self.replaced.items()):
            _flush(descriptor)
            os.dup2(before, descriptor)
            del self.replaced[descriptor]
            os.close(before)

    def take_kept(self) -> bytes:
        """Wait until all is passed on; return what was kept aside, and forget it."""
        self.pass_all_on()
        for file in self._last_words:
            os.ftruncate(file, 0)
        size = os.fstat(self._kept).st_size
        if not size:
            return b""
        kept = os.pread(self._kept, size, 0)
        os.ftruncate(self._kept, 0)
        return kept

    def pass_all_on(self) -> None:
        """Wait until all that was written has been passed on."""
        patience = time.monotonic() + _PATIENCE_SECONDS
        # In this order: it says that it is busy before it reads.
        while _unread_bytes(self._source) or _unread_bytes(self._control) or self._busy[0]:
            if not self.is_alive():
                self._pass_on_the_rest()
                return
            if time.monotonic() > patience:
                return  # a terminal that was stopped, say
            time.sleep(0.0002)

    def _pass_on_the_rest(self) -> None:
        """Print what somebody wrote after the process was killed."""
        while unread := _unread_bytes(self._source):
            self.print(os.read(self._source, unread))
        self._busy[0] = 0

    def print(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._target, data) :]

    def draw(self, table: bytes) -> None:
        frame = relay.FRAME.pack(len(table)) + table
        with contextlib.suppress(OSError):
            if self.is_alive():
                os.write(self._draws, frame)

    def close(self) -> None:
        """Close this side's ends; the process ends when nobody has the pipe open any more."""
        self.put_back()
        self.pass_all_on()
        self._close_descriptors()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        _left_alone.append(self._process)
        _left_alone[:] = [process for process in _left_alone if process.poll() is None]

    def forget(self) -> None:
        """Let go of all in a child of this process, which the other process is no child of."""
        self._process.returncode = 0
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _unlinked_file() -> int:
    with tempfile.TemporaryFile(prefix="autobatch-", buffering=0) as file:
        return os.dup(file.fileno())


def _unread_bytes(descriptor: int) -> int:
    import fcntl  # not at the top: Windows has neither of these, and no use for this module
    import termios

    (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return int(count)


def _flush(descriptor: int) -> None:
    stream = sys.stdout if descriptor == _STDOUT else sys.stderr
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()


def _start_anew_in_child() -> None:
    """Forget all: the process belongs to the parent, and passes on what this child writes until that is closed."""
    global _relay, _lock, _timer
    _lock = threading.RLock()
    _timer = None
    _windows.clear()
    _left_alone.clear()
    if _relay is not None:
        _relay.forget()
        _relay = None


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)
