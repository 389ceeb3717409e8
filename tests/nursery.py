"""Processes for scripts that train: forks of one that has imported TensorFlow and has not started anything of it.

Importing it takes longer than most of these trainings. A fork is a process like any other: it has an environment,
output and a death of its own. It is made before TensorFlow has threads or devices. What TensorFlow reads while it is
imported is the same for all: few messages and no oneDNN, as in ``conftest.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

TESTS = Path(__file__).parent


def run(script, *arguments, timeout=None, **options):
    """Run a script to its end, as ``subprocess.run`` does with text captured; ``options`` are those of ``Process``."""
    process = Process(script, *arguments, **options)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess([str(script), *map(str, arguments)], process.returncode, stdout, stderr)


class Process:
    """A script that runs in a fork, with the methods of ``subprocess.Popen`` that tests use.

    ``env`` is the whole environment of the script, and ``stderr`` is a path where it is to be in a file.
    """

    def __init__(self, script, *arguments, env=None, stderr=None):
        self._folder = tempfile.TemporaryDirectory(prefix="autobatch-tests-")
        self._paths = [str(Path(self._folder.name, "stdout")), str(stderr or Path(self._folder.name, "stderr"))]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_address())
        self._answers = self._connection.makefile("r")
        request = {
            "arguments": [str(script), *map(str, arguments)],
            "environment": dict(os.environ if env is None else env),
            "outputs": self._paths,
            "folder": str(Path.cwd()),
        }
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self.pid = int(self._answers.readline())
        self.returncode = None

    def poll(self):
        """Return the exit code, a signal as a negative number, or None while the script runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self._paths, timeout)
            self.returncode = int(self._answers.readline())
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for the end; return what the script has written to standard output and standard error."""
        self.wait(timeout)
        texts = tuple(Path(path).read_text("utf-8", "replace") for path in self._paths)
        self.kill()
        return texts

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """End the script, unless it has ended; drop what it has written."""
        self.send_signal(signal.SIGKILL)
        self.wait()
        self._answers.close()
        self._connection.close()
        self._folder.cleanup()


@functools.cache
def _address():
    """Start the process that forks; return the address of its socket. It ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="autobatch-tests-")
    address = str(Path(folder.name, "socket"))
    path = os.pathsep.join(filter(None, (str(TESTS.parent), os.environ.get("PYTHONPATH"))))
    fixed = {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        env={**os.environ, **fixed},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the tests alone, which end the scripts
    )

    def end():
        server.stdin.close()
        server.wait()
        server.stdout.close()
        folder.cleanup()

    atexit.register(end)
    assert server.stdout.readline() == b"ready\n", "TensorFlow could not be imported"
    return address


def _serve(address):
    gc.disable()  # a quarter of the time goes into looking for garbage among what is imported
    for name in ("lean_imports", "keras", "tensorflow", "autobatch"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(sys.modules["autobatch"].__path__, "autobatch."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    os.write(1, b"ready\n")
    while listener in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        _reap()
        if not os.fork():
            listener.close()
            _watch(connection)
        connection.close()
    _reap()


def _reap():
    """Wait for the forks that have ended; their time counts as this process's then."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch(connection):
    """Fork for a script; tell the number of its process and, in the end, its exit code."""
    request = json.loads(connection.makefile("r").readline())
    child = os.fork()
    if not child:
        connection.close()
        _become(**request)
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(arguments, environment, outputs, folder):
    """Run a script as Python itself runs one, from its environment to its exit code."""
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
