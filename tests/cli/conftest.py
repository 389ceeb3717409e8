"""A target whose worker answers without TensorFlow: up to ``LIMIT`` samples fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autobatch.worker import trials

_OPENER = """
from autobatch.records import Environment, Outcome, TrialResult

class Stub:
    environment = Environment("CPU:0", 100_000, "stub", 95_000, 0.05, "float32", False, (("Stub", "1"),))
    largest_useful = 64
    replicas = 1
    fixed_bytes_hint = None
    model_name = "stub"
    warnings = notes = ()
    host_uses = ()
    content = "stub"

    def __init__(self, act):
        self.act = act

    def estimate_sample(self):
        return None

    def run(self, request):
        limit = self.act(request.micro_batch)
        n = request.micro_batch
        if n > limit:
            return TrialResult(n, Outcome.OUT_OF_MEMORY, detail="stub")
        return TrialResult(n, Outcome.FITS, 1000 * n, 0.01 * n, 0.001)

    def close(self):
        pass

def open_trials(model, dataset, y, *, target_batch, memory_limit_bytes, headroom):
    return Stub(dataset)
"""

_TARGET = """
import os, sys, time
class Model:
    variables = ()
    def fit(self): ...
    def train_step(self): ...
def act(size):
    print("printed by the user")
    return 16
def build():
    return Model(), act
def nothing_fits():
    return Model(), lambda size: 0
def raises():
    raise RuntimeError("mine")
def returns_none():
    return None
def dies():
    os._exit(9)
def hangs_in_a_remedy():
    if "keras" in sys.modules:  # the stand-in needs no Keras, a dtype policy does
        hangs()
    return Model(), act
def hangs():
    print("hanging", flush=True)
    open(os.environ["AUTOBATCH_TEST_PID"], "w").write(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of the target's file."""
    (tmp_path / "stub_opener.py").write_text(_OPENER)
    path = tmp_path / "target.py"
    path.write_text(_TARGET)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(trials, "OPENER", "stub_opener:open_trials")
    return str(path)
