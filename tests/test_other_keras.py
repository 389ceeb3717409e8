"""Models of an older Keras, and Keras on another backend: one sentence each, and no traceback of an import."""

import os
import subprocess
import sys
from pathlib import Path

import optional
import pytest

from autobatch import arguments
from autobatch.cli import main

LEAN = str(Path(__file__).with_name("lean_children"))

ON_TORCH = """
import numpy as np, keras
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
"""
# The module names are all that tells a model of tf_keras; TensorFlow alone has one that can be looked at.
LEGACY = """
import numpy as np
from tensorflow.python.keras.engine.training import Model
class Mine(Model): pass
model = Mine()
"""
TOO_OLD = """
import numpy as np, keras, tensorflow as tf
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
"""
CALLS = """
import sys, autobatch
data = np.zeros((8, 3), "float32"), np.zeros((8, 1), "float32")
def call_all():
    for call in (
        lambda: autobatch.fit(model, *data, target_batch=8),
        lambda: autobatch.tune(model, *data, target_batch=8),
        lambda: autobatch.wrap_step(lambda batch: 0, model=model, optimizer=None, target_batch=8),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            print(type(error).__name__, error)
"""
ONCE = """
call_all()
print("tensorflow" in sys.modules)
"""
# Each version is put back, or the next calls would be refused for it.
WITH_VERSIONS = """
for package, version in {versions}:
    package, own = globals()[package], globals()[package].__version__
    package.__version__ = version
    call_all()
    package.__version__ = own
"""
BACKEND = (
    "ValueError autobatch works with Keras on the TensorFlow backend alone: set KERAS_BACKEND=tensorflow before keras "
    "is imported. Received: the backend 'torch'"
)


def run(model, calls=ONCE, **environment):
    process = subprocess.run(
        [sys.executable, "-c", model + CALLS + calls],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([LEAN, *sys.path]), **environment},
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_keras_on_another_backend():
    optional.torch()
    *said, _ = run(ON_TORCH, KERAS_BACKEND="torch")
    assert said == [BACKEND] * 3


def test_a_model_of_an_older_keras():
    *said, _ = run(LEGACY)
    assert len(said) == 3
    for line in said:
        assert line.startswith("TypeError autobatch works with models of Keras 3, and this one is of Keras 2 (tf_keras")
        assert line.endswith("make the model with keras. Received: __main__.Mine")


SENTENCES = {
    ("keras", "3.5.0"): 'Keras 3.6 or newer: run pip install "keras>=3.6". Received: Keras 3.5.0',
    ("tf", "2.15.1"): 'TensorFlow 2.16 or newer: run pip install "tensorflow>=2.16". Received: TensorFlow 2.15.1',
    ("tf", "2.9.0-rc1"): 'TensorFlow 2.16 or newer: run pip install "tensorflow>=2.16". Received: TensorFlow 2.9.0-rc1',
}


@pytest.fixture(scope="module")
def said_of_versions():
    """The lines that each version's calls print; all in one process."""
    said = run(TOO_OLD, WITH_VERSIONS.format(versions=list(SENTENCES)))
    assert len(said) == 3 * len(SENTENCES)
    return {version: said[3 * place : 3 * place + 3] for place, version in enumerate(SENTENCES)}


@pytest.mark.parametrize("version", SENTENCES, ids="-".join)
def test_a_version_that_is_too_old(said_of_versions, version):
    assert said_of_versions[version] == [f"ValueError autobatch needs {SENTENCES[version]}"] * 3


def test_the_oldest_versions_are_those_that_the_package_asks_for():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for package, oldest in (("tensorflow", arguments.OLDEST_TENSORFLOW), ("keras", arguments.OLDEST_KERAS)):
        assert f'  "{package}>={oldest[0]}.{oldest[1]}",' in project


@pytest.mark.parametrize("target", ["keras:ResNet50", "model.keras"])
def test_the_command_says_so_before_it_starts_a_worker(target, tmp_path, monkeypatch, capfd):
    (tmp_path / "model.keras").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert main(["report", target]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("autobatch: autobatch works with Keras on the TensorFlow backend alone")
    assert "Received: the backend 'jax'" in said


def test_a_worker_says_so_where_the_backend_is_missing(tmp_path, monkeypatch, capfd):
    (tmp_path / "train.py").write_text("def build():\n    import a_backend_that_is_not_there\n")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert main(["report", f"{tmp_path}/train.py:build"]) == 2
    assert "train.py:build: autobatch works with Keras on the TensorFlow backend alone" in capfd.readouterr().err
