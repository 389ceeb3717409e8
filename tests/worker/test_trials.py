"""Worker processes, with a stand-in for the trials: what is tested is how a worker lives and dies, not TensorFlow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from autobatch.errors import NoFeasibleBatchError, TargetError, UserCodeError, WorkerError
from autobatch.memory import visible_devices
from autobatch.records import Outcome, SampleEstimate, TrialRequest
from autobatch.worker import trials as worker_trials
from autobatch.worker.messages import pack, unpack
from autobatch.worker.process import WorkerLate, WorkerProcess
from autobatch.worker.trials import WorkerTrials

# What the worker calls in place of autobatch.opening.open_trials. The dataset is a function: a trial calls it with a
# size.
_OPENER = """
from autobatch.records import Environment, Outcome, SampleEstimate, TrialResult

class Stub:
    environment = Environment("CPU:0", 1 << 20, "stub", 1000, 0.05, "float32", False, (("Stub", "1"),))
    largest_useful = 256
    replicas = 1
    fixed_bytes_hint = None
    model_name = "stub"
    warnings = ("a warning",)
    host_uses = ()
    content = "stub"
    def __init__(self, act):
        self.act = act
    def estimate_sample(self):
        share = self.act(0)
        return None if share is None else SampleEstimate(share, 1.5)

    def run(self, request):
        peak = self.act(request.micro_batch) or 10
        return TrialResult(request.micro_batch, Outcome.FITS, peak, 0.5)
    def close(self):
        print("closed")

def open_trials(model, dataset, y, *, target_batch, memory_limit_bytes, headroom):
    if dataset is None:
        raise ValueError("never")
    return Stub(dataset)
"""

_MODEL = """
class Model:
    variables = ()
    def fit(self): ...
    def train_step(self): ...
"""


@pytest.fixture
def late_once_written(monkeypatch: pytest.MonkeyPatch):
    """Let a worker's time be up as soon as it has written a file, however long a busy machine takes until then."""
    receive = WorkerProcess.receive
    awaited = []

    def receive_until_written(self: WorkerProcess, deadline: float | None):
        if not awaited:
            return receive(self, deadline)
        while not awaited[0].exists():
            try:
                return receive(self, time.monotonic() + 0.05)
            except WorkerLate:
                assert time.monotonic() < deadline
        awaited.clear()
        return receive(self, time.monotonic() + 0.05)

    monkeypatch.setattr(WorkerProcess, "receive", receive_until_written)
    return awaited.append


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make trials of a target file with this text; close them at the end."""
    (tmp_path / "stub_opener.py").write_text(_OPENER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    opened = []

    def open_target(text: str, *, name: str = "build", **options: object) -> WorkerTrials:
        path = tmp_path / "target.py"
        # Python takes a file of the same second and the same length for the one that it has compiled already.
        path.write_text(f"{_MODEL}{textwrap.dedent(text)}\n{'#' * len(opened)}")
        trials = WorkerTrials(f"{path}:{name}", opener="stub_opener:open_trials", **options)
        opened.append(trials)
        return trials

    yield open_target
    for trials in opened:
        trials.kill()


def _acting(body: str) -> str:
    """A target whose trial runs ``body`` with the micro-batch as ``size``."""
    return (
        "import os, sys, time, ctypes, signal\ndef act(size):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\ndef build():\n    return Model(), act\n"
    )


def _pid(trials: WorkerTrials) -> int:
    assert trials._process is not None
    return trials._process._process.pid


def _is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # dead; whoever started it has yet to ask
        time.sleep(0.05)
    return False


def test_answers_of_a_worker(make):
    with make(_acting("print('from the user'); return 7 * size")) as trials:
        assert trials.environment.versions == (("Stub", "1"),)
        assert (trials.largest_useful, trials.fixed_bytes_hint) == (256, None)
        assert (trials.model_name, trials.warnings) == ("stub", ())
        first = trials.run(TrialRequest(4))
        assert trials.warnings == ("a warning",)  # what a trace has shown
        pid = _pid(trials)
        second = trials.run(TrialRequest(8))
        assert _pid(trials) == pid
    assert (first.micro_batch, first.outcome, first.peak_bytes) == (4, Outcome.FITS, 28)
    assert (second.micro_batch, second.peak_bytes, second.step_seconds) == (8, 56, 0.5)
    assert _is_gone(pid)


def test_the_estimate_comes_from_the_worker(make):
    with make(_acting("return None if size == 0 else 9")) as trials:
        assert trials.estimate_sample() is None
    with make(_acting("return 12.5 if size == 0 else 9")) as trials:
        assert trials.estimate_sample() == SampleEstimate(12.5, 1.5)
        assert trials.run(TrialRequest(4)).fits
    failing = make(_acting("if size == 0: raise RuntimeError('mine')"))
    with pytest.raises(UserCodeError, match="RuntimeError: mine"):
        failing.estimate_sample()
    # A worker that dies of it leaves no estimate, and the next trial starts another.
    with make(_acting("if size == 0: os._exit(1)")) as trials:
        assert trials.estimate_sample() is None
        assert trials.run(TrialRequest(4)).fits


def test_no_tensorflow_is_imported_for_a_target_that_needs_none(make):
    trials = make(_acting("assert 'tensorflow' not in sys.modules and 'keras' not in sys.modules"))
    assert trials.run(TrialRequest(1)).fits


def test_what_the_user_prints_goes_nowhere_near_the_pipe(make, capfd):
    trials = make("print('at import')\n" + _acting("print('x' * 100_000); os.write(1, b'raw'); os.write(2, b'raw')"))
    assert trials.run(TrialRequest(1)).fits
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("act", "detail"),
    [
        ("if size == 64: os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("if size == 64: print('std::bad_alloc', file=sys.stderr, flush=True); os.abort()", "std::bad_alloc"),
        ("if size == 64: raise MemoryError('no room')", "no room"),
    ],
)
def test_a_death_for_want_of_memory_is_an_outcome(make, act, detail):
    trials = make(_acting(act))
    first = _pid(trials)
    result = trials.run(TrialRequest(64))
    assert result.outcome is Outcome.OUT_OF_MEMORY
    assert detail in result.detail
    assert trials.run(TrialRequest(32)).fits
    assert _pid(trials) != first


def test_a_crash_in_a_limited_arena_is_out_of_memory(make, monkeypatch):
    # The variables that `limit_memory` would set, as a user may set them by hand.
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "1")
    monkeypatch.setenv("TF_CPU_BFC_MEM_LIMIT_IN_MB", "64")
    trials = make(_acting("if size == 64: ctypes.string_at(0)"))
    assert trials.run(TrialRequest(64)).outcome is Outcome.OUT_OF_MEMORY
    assert trials.run(TrialRequest(32)).fits


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(0)", "exit code 0"),
        ("os._exit(7)", "exit code 7"),
    ],
)
def test_any_other_death_is_the_users(make, act, words):
    trials = make(_acting("print('last words', flush=True)\n" + act))
    with pytest.raises(UserCodeError, match=f"micro-batch 4 .*{words}") as caught:
        trials.run(TrialRequest(4))
    assert "last words" in caught.value.traceback_text


def test_a_hang_is_timed_out_and_its_processes_are_killed(make, tmp_path, late_once_written):
    act = f"""
    if size == 64:
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        open({str(tmp_path / "written")!r}, "w").write(str(child.pid))
        os.rename({str(tmp_path / "written")!r}, {str(tmp_path / "pid")!r})
        time.sleep(600)
    """
    trials = make(_acting(act), trial_timeout_seconds=2000.0)
    worker_pid = _pid(trials)
    late_once_written(tmp_path / "pid")
    result = trials.run(TrialRequest(64))
    assert result.outcome is Outcome.TIMED_OUT
    assert "2000 s" in result.detail
    assert _is_gone(worker_pid)
    assert _is_gone(int((tmp_path / "pid").read_text()))
    assert trials.run(TrialRequest(32)).fits


def test_a_trials_time_is_limited(make):
    trials = make(_acting("if size == 64: time.sleep(600)"))
    trials._timeout_seconds = 0.5
    began = time.monotonic()
    assert trials.run(TrialRequest(64)).outcome is Outcome.TIMED_OUT
    assert time.monotonic() - began >= 0.5


def test_a_traceback_starts_at_the_users_first_frame(make, tmp_path):
    with pytest.raises(UserCodeError, match="KeyError: 'mine'") as caught:
        make("def build():\n    deeper()\ndef deeper():\n    raise KeyError('mine')")
    lines = caught.value.traceback_text.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith(f'  File "{tmp_path}/target.py"')
    assert lines[1].endswith("in build")
    assert lines[-1] == "KeyError: 'mine'"


def test_an_error_in_a_trial_is_the_users(make):
    trials = make(_acting("raise KeyError('mine')"))
    with pytest.raises(UserCodeError, match="KeyError: 'mine'") as caught:
        trials.run(TrialRequest(4))
    assert "in act" in caught.value.traceback_text
    assert "autobatch/worker/main.py" not in caught.value.traceback_text


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("def build():\n    return None", TargetError, r"must return \(model, dataset\).*Received: None"),
        ("def build():\n    return 3, 4", TargetError, r"Received: \(int, int\)"),
        ("def build():\n    return Model(), 1, 2, 3", TargetError, r"Received: \(Model, int, int, int\)"),
        ("def built():\n    pass", TargetError, "no function 'build'. Did you mean 'built'?"),
        ("build = 3", TargetError, "is not a function"),
        ("def build(size):\n    pass", TargetError, "It asks for: size"),
        ("def build():\n    raise RuntimeError('mine')", UserCodeError, "RuntimeError: mine"),
        ("raise RuntimeError('at import')", UserCodeError, "at import"),
        ("import no_such_module_here", UserCodeError, "no_such_module_here"),
        ("def build(:", UserCodeError, "SyntaxError"),
        ("import sys\ndef build():\n    sys.exit('bye')", UserCodeError, r"called sys.exit\('bye'\)"),
        ("def build():\n    raise KeyboardInterrupt", UserCodeError, "KeyboardInterrupt"),
        ("import os\ndef build():\n    os._exit(0)", UserCodeError, "ended its process.*exit code 0"),
        ("import ctypes\ndef build():\n    ctypes.string_at(0)", UserCodeError, "SIGSEGV"),
        ("def build():\n    raise MemoryError", NoFeasibleBatchError, "The model itself does not fit"),
        ("import os\ndef build():\n    os.kill(os.getpid(), 9)", NoFeasibleBatchError, "The model itself does not fit"),
    ],
)
def test_a_target_that_cannot_be_opened(make, text, error, match):
    with pytest.raises(error, match=match):
        make(text)


def test_a_target_that_never_returns_tells_where_it_hangs(make, tmp_path, late_once_written):
    hangs = tmp_path / "hangs"
    late_once_written(hangs)
    target = f"import time\ndef build():\n    open({str(hangs)!r}, 'w').close()\n    time.sleep(600)"
    with pytest.raises(UserCodeError, match=r"not ready .* after 1500 s") as caught:
        make(target, trial_timeout_seconds=1500.0)
    assert "in build" in caught.value.traceback_text


def test_an_error_of_ours_about_the_target_is_one_line(tmp_path, make):
    (tmp_path / "target.py").write_text("")
    # autobatch.records is our code: what it refuses is refused by us.
    with pytest.raises(TargetError, match=r"target.py:build: micro_batch must be at least 1"):
        make("from autobatch.records import TrialRequest\ndef build():\n    return TrialRequest(0)")


def test_a_module_target(tmp_path, make, monkeypatch):
    make(_acting("pass")).close()
    monkeypatch.chdir(tmp_path)
    with WorkerTrials("target:build", opener="stub_opener:open_trials") as trials:
        assert trials.run(TrialRequest(1)).fits
    with pytest.raises(TargetError, match="no module 'absent_package'"):
        WorkerTrials("absent_package.inner:build", opener="stub_opener:open_trials")


def test_a_file_named_like_a_module_of_the_library_hides_nothing(tmp_path, make):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "queue.py"
    make(_acting("pass")).close()
    path.write_text((tmp_path / "target.py").read_text())
    with WorkerTrials(f"{path}:build", opener="stub_opener:open_trials") as trials:
        assert trials.run(TrialRequest(1)).fits


def test_a_model_that_differs_from_worker_to_worker_is_refused(make, tmp_path):
    text = f"""
    import os
    class Variable:
        dtype, trainable = "float32", True
        def __init__(self, n): self.shape = (n,)
    def act(size):
        os.kill(os.getpid(), 9)
    def build():
        counter = {str(tmp_path / "counter")!r}
        n = os.path.getsize(counter) if os.path.exists(counter) else 0
        open(counter, "a").write("x")
        model = Model()
        model.variables = [Variable(n)]
        return model, act
    """
    trials = make(text)
    trials.run(TrialRequest(64))
    with pytest.raises(WorkerError, match="does not build the same model each time: first 1 variables"):
        trials.run(TrialRequest(32))


def test_a_worker_that_cannot_start(make, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(WorkerError, match="could not be started"):
        make(_acting("pass"))


def test_an_interrupt_in_a_trial_leaves_no_worker(make):
    trials = make(_acting("time.sleep(600)"))
    pid = _pid(trials)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        trials.run(TrialRequest(4))
    assert _is_gone(pid)


def test_a_worker_ends_when_its_parent_is_killed(make, tmp_path):
    make(_acting(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")).close()
    program = f"""
from autobatch.records import TrialRequest
from autobatch.worker.trials import WorkerTrials
WorkerTrials({str(tmp_path / "target.py")!r} + ":build", opener="stub_opener:open_trials").run(TrialRequest(1))
"""
    root = str(Path(worker_trials.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root))}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    for _ in range(200):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    assert _is_gone(pid)


@pytest.mark.parametrize("device", ["TPU", "GPU:x", ""])
def test_a_device_that_cannot_be(make, device):
    with pytest.raises(ValueError, match="Received"):
        make(_acting("pass"), device=device)


def test_devices_are_counted_among_the_visible_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_devices.visible_devices("GPU:1") == {"CUDA_VISIBLE_DEVICES": "7"}
    assert visible_devices.visible_devices("cpu") == {"CUDA_VISIBLE_DEVICES": "-1"}
    with pytest.raises(ValueError, match=r"shows 2 device\(s\)"):
        visible_devices.visible_devices("GPU:2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices.visible_devices("GPU:1")["CUDA_VISIBLE_DEVICES"] == "1"


def test_frames_arrive_whole_however_they_are_cut():
    frames = pack({"kind": "a", "text": "ä\n\0"}) + pack({"kind": "b"})
    buffer, messages = bytearray(), []
    for byte in frames:
        buffer.append(byte)
        while (message := unpack(buffer)) is not None:
            messages.append(message)
    assert messages == [{"kind": "a", "text": "ä\n\0"}, {"kind": "b"}]
    assert not buffer


@pytest.mark.slow
def test_a_genuine_out_of_memory_in_a_limited_arena(tmp_path):
    path = tmp_path / "genuine.py"
    path.write_text(
        textwrap.dedent(
            """
            import keras
            import numpy

            def build():
                model = keras.Sequential([keras.layers.Input((512,)), keras.layers.Dense(4096), keras.layers.Dense(1)])
                model.compile("sgd", "mse")
                return model, (numpy.zeros((64, 512), "float32"), numpy.zeros((64, 1), "float32"))
            """
        )
    )
    with WorkerTrials(f"{path}:build", memory_limit="64MiB") as trials:
        assert trials.environment.limit_bytes == 64 * 2**20
        assert trials.environment.device.startswith(("CPU", "GPU"))
        failed = trials.run(TrialRequest(16384))
        assert failed.outcome is Outcome.OUT_OF_MEMORY, failed
        assert failed.requested_bytes or failed.detail
        fitted = trials.run(TrialRequest(16))
        assert fitted.fits
        assert 0 < fitted.peak_bytes < 64 * 2**20
