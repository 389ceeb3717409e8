"""Worker process, and the frames of JSON that it and its parent exchange; their meaning is not known here.

This module imports no TensorFlow. Only :mod:`autobatch.worker.trials` and :mod:`autobatch.worker.main` know what the
frames hold.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from autobatch.errors import WorkerError
from autobatch.terminal.start_up_noise import without_start_up_noise
from autobatch.worker.messages import Message, pack, unpack

logger = logging.getLogger(__name__)
_LOG_TAIL_BYTES = 16 * 1024
_CLOSE_SECONDS = 5.0
_STACK_SECONDS = 0.3
_STACK_PATIENCE_SECONDS = 10.0
# The pipe may stay open in a process that the user's code forked, so the worker's own death is looked for as well.
_POLL_SECONDS = 0.2


class WorkerDied(Exception):
    """The worker is gone; ``returncode`` is as subprocess gives it."""

    def __init__(self, returncode: int) -> None:
        super().__init__(returncode)
        self.returncode = returncode


class WorkerLate(Exception):
    """The worker did not answer in time."""


class WorkerProcess:
    """One worker process, its two pipes and its log."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        request_read, self._request_write = os.pipe()
        self._reply_read, reply_write = os.pipe()
        self._buffer = bytearray()
        self._log = tempfile.TemporaryFile(prefix="autobatch-worker-")  # noqa: SIM115 - closed in kill()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "autobatch.worker.main", str(request_read), str(reply_write)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(request_read, reply_write),
                # A group of its own: Ctrl-C in the terminal reaches the parent alone, and a kill reaches every process
                # that the user's code has started.
                start_new_session=True,
                env=dict(environment),
            )
        except OSError as error:
            os.close(self._request_write)
            os.close(self._reply_read)
            self._log.close()
            raise WorkerError(f"The worker process could not be started: {error}") from error
        finally:
            os.close(request_read)
            os.close(reply_write)

    def send(self, message: Mapping[str, object]) -> None:
        frame = pack(message)
        try:
            while frame:
                frame = frame[os.write(self._request_write, frame) :]
        except BrokenPipeError as error:
            raise WorkerDied(self._reap()) from error

    def receive(self, deadline: float | None) -> Message:
        """Return the worker's next message; wait until ``deadline`` on the monotonic clock, or for ever if it is None.

        Raises:
            WorkerLate: No message came in time.
            WorkerDied: The worker ended, or closed its pipe.
            WorkerError: It sent what is no message.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._reply_read, selectors.EVENT_READ)
            while True:
                try:
                    message = unpack(self._buffer)
                except ValueError as error:
                    raise WorkerError(f"The worker process sent what is no message of ours: {error}") from error
                if message is not None:
                    return message
                wait = _POLL_SECONDS if deadline is None else min(_POLL_SECONDS, deadline - time.monotonic())
                if wait <= 0:
                    raise WorkerLate
                dead = self._process.poll() is not None
                if selector.select(0 if dead else wait):
                    chunk = os.read(self._reply_read, 1 << 16)
                    if not chunk:
                        raise WorkerDied(self._reap())
                    self._buffer += chunk
                elif dead:
                    raise WorkerDied(self._reap())

    def log_tail(self) -> str:
        """Return the end of what the worker and the user's code printed, without TensorFlow's words at its start."""
        # pread: seeking would move the offset that the worker writes at, too.
        size = self._log_bytes()
        start = max(0, size - _LOG_TAIL_BYTES)
        tail = os.pread(self._log.fileno(), _LOG_TAIL_BYTES, start).decode("utf-8", "replace")
        tail = tail.partition("\n")[2] if start and "\n" in tail else tail
        return without_start_up_noise(tail)

    def stack_and_log(self) -> str:
        """Return the log's tail, after asking a worker that hangs to print where it is.

        On a busy machine it may be a while until it begins. One that is stuck in the kernel never does.
        """
        patience = time.monotonic() + _STACK_PATIENCE_SECONDS
        said = self._log_bytes()
        self._process.send_signal(signal.SIGUSR1)
        while time.monotonic() < patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STACK_SECONDS)
                break
            if self._log_bytes() > said:
                break
        return self.log_tail()

    def _log_bytes(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def close(self) -> None:
        """Let the worker end by itself, so that the user's exit hooks run; then make sure."""
        with contextlib.suppress(WorkerDied):
            self.send({"kind": "close"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the worker and every process of its group, now."""
        if self._log.closed:
            return
        self._kill_group()
        self._process.wait()
        os.close(self._request_write)
        os.close(self._reply_read)
        self._log.close()

    def _reap(self) -> int:
        """Return the exit status of a worker whose pipe has closed; kill it if it lives on."""
        try:
            return self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            # It closed its pipe and lives on; there is no talking to it any more.
            self._kill_group()
            return self._process.wait()

    def _kill_group(self) -> None:
        # The group is gone when its last process is; macOS says PermissionError where only zombies are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def exit_words(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"
