"""What all tests stand on: no trace in the user's own cache, and what TensorFlow reads when it is loaded.

With oneDNN off an allocation that must fail does so at once, not after 10 s.
"""

import gc
import importlib
import itertools
import os
import signal
import tempfile
from pathlib import Path

import pytest

# Nothing that a test finds may be remembered for the user, nor for another test (``own_cache`` below). This folder is
# for fixtures that live longer than a test.
_session_cache = tempfile.TemporaryDirectory(prefix="autobatch-tests-")
os.environ["AUTOBATCH_CACHE_DIR"] = _session_cache.name
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# A shell's background job ignores Ctrl-C, one under nohup the end of its terminal, and so does all that it starts. Some
# tests send these signals.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A folder of this test's own for remembered results; it is made when something is remembered."""
    folder = tmp_path_factory.getbasetemp() / "remembered" / os.urandom(8).hex()
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(folder))
    return folder


def pytest_collection_finish():
    """Spare the collector what was imported: a search collects several times, a third of a second each with all that.

    It is never garbage. A user's process pays for a few searches, a test run for hundreds.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def lean_children():
    """Let the processes that a file's tests start, and those that these start, spare Keras packages it does without."""
    folder = str(Path(__file__).with_name("lean_children"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
        yield


_unspared = itertools.count(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item, nextitem):
    """Behind each file, and behind each 25th test of a long one, spare the collector what outlives it as well.

    Keras's own ``fit`` leaves 2500 objects behind for good, each time. After some hundreds of tests one collection
    takes a second, and a search collects several times. What a test drops is collected first, as ever.
    """
    global _unspared
    result = yield
    if next(_unspared) >= 25 or nextitem is None or nextitem.path != item.path:
        _unspared = itertools.count(1)
        gc.collect()
        gc.freeze()
    return result


def pytest_sessionstart():
    """Where the environment says which Keras or TensorFlow is to be tested, refuse to test another."""
    for name in ("keras", "tensorflow"):
        expected = os.environ.get(f"AUTOBATCH_EXPECT_{name.upper()}")
        if expected:
            found = importlib.import_module(name)
            if found.__version__ != expected:
                raise pytest.UsageError(
                    f"{name} {expected} is to be tested. Received: {found.__version__} from {found.__file__}"
                )
            print(f"testing with {name} {expected}")


@pytest.fixture
def keras():
    """Keras with all its seeds set, as at the start of a fresh process."""
    import keras

    keras.utils.set_random_seed(7)
    return keras
