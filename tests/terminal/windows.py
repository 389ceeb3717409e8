"""Run by the tests: windows in which TensorFlow's lines are kept aside, as ``windows.py CASE DUMP``."""

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from autobatch.errors import AutobatchError
from autobatch.terminal import kept_aside

DUMP = Path(sys.argv[2]).read_bytes()


def say(text):
    print(text, file=sys.stderr)


def dump():
    os.write(2, DUMP)


def order():
    for i in range(50):
        say(f"outside {i}")
        with kept_aside.window(expected=i % 2 == 0) as window:
            say(f"inside {i}")
            dump()
            os.write(2, b"and at once %d\n" % i)
            window.failure_dealt_with()
    with contextlib.suppress(AutobatchError), kept_aside.window():
        dump()
        raise AutobatchError("told in its own words")
    with kept_aside.window():
        say("no failure, no dump")


def interrupted():
    """Ctrl-C comes at every place of a window's beginning and end; then standard error is what it was.

    At one place or another it may be so only behind the next window.
    """
    before, left, left_for_ever = os.fstat(2).st_ino, 0, 0
    for i in range(200):
        timer = threading.Timer(0.0003 + 0.000005 * (i % 100), signal.raise_signal, [signal.SIGINT])
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()
            while True:
                with kept_aside.window():
                    pass
        timer.join()
        left += os.fstat(2).st_ino != before
        with kept_aside.window():
            pass
        left_for_ever += os.fstat(2).st_ino != before
    say(f"left {left_for_ever} times for ever, {'seldom' if left < 20 else left} until the next")
    with kept_aside.window():
        say("inside")
    say("outside")


def threads():
    """Two trainings at a time, and somebody else who prints."""

    def train():
        for _ in range(100):
            with kept_aside.window() as window:
                dump()
                time.sleep(0.001)
                window.failure_dealt_with()

    trainings = [threading.Thread(target=train) for _ in range(2)]
    for training in trainings:
        training.start()
    for i in range(200):
        os.write(2, b"line %d\n" % i)
        time.sleep(0.0005)
    for training in trainings:
        training.join()


def shown():
    """What nobody has dealt with is printed."""
    with kept_aside.window():
        dump()
    with contextlib.suppress(KeyError), kept_aside.window(expected=True):
        dump()
        raise KeyError
    say("end")


def logged():
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
    with kept_aside.window(expected=True):
        dump()


def crash(number):
    with kept_aside.window(expected=True):
        dump()
        say("last words")
        os.kill(os.getpid(), number)


def segfault():
    faulthandler.enable()
    crash(signal.SIGSEGV)


def abort():
    with kept_aside.window(expected=True):
        dump()
        os.write(2, b"F0000 00:00:1795964932.742629   20763 bfc_allocator.cc:411] Check failed: it is broken\n")
        os.abort()


def crash_beside_a_child():
    with kept_aside.window(expected=True):
        subprocess.Popen(["sleep", "1.5"], stdout=subprocess.DEVNULL)  # it has the pipe open
        dump()
        os.kill(os.getpid(), signal.SIGKILL)


def children():
    """A child that was started in a window goes on to be heard, and has windows of its own."""
    with kept_aside.window(expected=True):
        late = subprocess.Popen(["sh", "-c", "sleep 0.5; echo late >&2"])
        process = multiprocessing.get_context("fork").Process(target=in_child)
        process.start()
        process.join()
        dump()
    kept_aside.end()
    late.wait()
    say(f"child: {process.exitcode}")


def in_child():
    with kept_aside.window(expected=True):
        dump()
        say("in the child")
    kept_aside.end()


def replaced():
    """Somebody lets standard error lead elsewhere between two windows, as pytest's capture does."""
    with kept_aside.window():
        say("first")
    file = os.open(sys.argv[3], os.O_CREAT | os.O_RDWR)
    before = os.dup(2)
    os.dup2(file, 2)
    with kept_aside.window(expected=True):
        say("second")
        dump()
    os.dup2(before, 2)
    with kept_aside.window(expected=True):
        say("third")
        dump()
    os.close(2)
    with kept_aside.window(expected=True):
        pass  # there is no standard error to keep anything from
    os.dup2(before, 2)


def relay_killed():
    with kept_aside.window(expected=True):
        say("before")
    os.kill(kept_aside._relay._process.pid, signal.SIGKILL)
    time.sleep(0.1)
    with kept_aside.window(expected=True):
        say("between")
        os.kill(kept_aside._relay._process.pid, signal.SIGKILL)
        time.sleep(0.1)
        say("in the pipe of nobody")
    say("after")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
