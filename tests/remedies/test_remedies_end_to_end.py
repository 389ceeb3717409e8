"""Remedies of real models, in real workers, in a limited arena."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import autobatch
from autobatch.cli import main
from autobatch.errors import NotApplicableError
from autobatch.records import Variant
from autobatch.report import json
from autobatch.worker.trials import WorkerTrials

_ROOT = str(Path(autobatch.__file__).parents[1])

pytestmark = pytest.mark.usefixtures("lean_children")  # a worker is started for each remedy

# A block holds eight tensors of its input's size for the backward pass, unless they are computed again.
_MODEL = """
import keras
import numpy as np
import tensorflow as tf
from keras import layers

class Block(layers.Layer):
    def call(self, x):
        for _ in range(4):
            x = x + tf.tanh(tf.sin(x))
        return x

def model():
    stack = [keras.Input((64,)), layers.Dense(512), *(Block() for _ in range(4)), layers.Dense(1)]
    made = keras.Sequential(stack, name="blocks")
    made.compile("adam", "mse")
    return made

def data():
    return np.zeros((4096, 64), "float32"), np.zeros((4096, 1), "float32")

def build():
    return model(), data()

def fixed():
    keras.config.set_dtype_policy("float32")
    made = model()
    made.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    return made, data()
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "blocks_target.py"
    path.write_text(_MODEL)
    return path


@pytest.mark.slow
def test_a_remedy_that_is_measured_to_help(module, tmp_path, capfd):
    saved = tmp_path / "report.json"
    command = ["report", f"{module}:build", "--memory-limit", "24MiB", "--max-trials", "6", "--remedies"]
    assert main([*command, "--format", "json", "--output", str(saved)]) == 0
    report = json.load(saved.read_text())
    found = {remedy.name: remedy for remedy in report.remedies}
    layers = found["rematerialised layers"]
    assert layers.largest_fit > 1.5 * report.largest_fit, found
    assert layers.code.count("'block") == 4
    assert any(remedy.recommended for remedy in found.values())
    for policy in ("mixed_bfloat16", "mixed_float16"):
        assert found[policy].largest_fit > 1.2 * report.largest_fit, found[policy]
        assert found[policy].samples_per_second > 0
    assert found["optimizer without slots"].largest_fit
    assert found["rematerialised activations"].why_not.startswith("does not apply: no layer of the model has an act")
    assert found["XLA on"].measured

    assert main(["show", str(saved)]) == 0
    out = capfd.readouterr().out
    assert "Remedies, measured" in out
    assert "(recommended)" in out


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (Variant(precision="mixed_bfloat16"), r"set their own dtype policy \(float32\)"),
        (Variant(slotless_optimizer=True), "has no slots"),
    ],
)
def test_a_worker_tells_why_a_remedy_does_not_apply(module, variant, reason):
    with pytest.raises(NotApplicableError, match=reason):
        WorkerTrials(f"{module}:fixed", variant=variant)


@pytest.mark.slow
def test_remedies_of_a_live_model(module):
    program = textwrap.dedent(
        """
        import autobatch
        autobatch.limit_memory("24MiB")
        import blocks_target
        from autobatch.remedies import measuring
        from autobatch.report import json

        # That all of them are tried is seen where the command tries them; a worker of its own is started for each.
        all_candidates = measuring.candidates
        asked_about = ("mixed_bfloat16", "rematerialised layers")
        measuring.candidates = lambda base: [each for each in all_candidates(base) if each.name in asked_about]
        model = blocks_target.model()
        before = [weight.copy() for weight in model.get_weights()]
        report = autobatch.tune(model, blocks_target.data(), target_batch=2048, remedies=True, max_trials=5)
        assert all((a == b).all() for a, b in zip(before, model.get_weights()))
        print("REPORT" + json.render(report))
        """
    )
    path = os.pathsep.join((str(module.parent), _ROOT, os.environ["PYTHONPATH"]))
    env = {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.load(done.stdout.partition("REPORT")[2])
    assert report.environment.limit_bytes == 24 * 2**20
    assert (report.model_name, report.plan.effective_batch) == ("blocks", 2048)
    found = {remedy.name: remedy for remedy in report.remedies}
    assert found["rematerialised layers"].largest_fit > report.largest_fit
    assert found["mixed_bfloat16"].update_seconds > 0
