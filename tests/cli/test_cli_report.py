"""``autobatch report`` in this process, its workers with a stand-in for the trials."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import uneven

from autobatch.cli import main
from autobatch.report.json import load

pytestmark = pytest.mark.usefixtures("lean_children")

_NOISY = """
import keras, numpy, tensorflow as tf

class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.net = keras.Sequential([keras.layers.Dense(512, activation="relu"), keras.layers.Dense(1)])
        self.build((None, 512))

    def build(self, shape):
        self.net.build(shape)

    def call(self, inputs):
        return self.net(inputs)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((self.net(x + tf.random.normal(tf.shape(x))) - y) ** 2)
        weights = self.net.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}

def build():
    model = Own()
    model.compile("sgd")
    return model, (numpy.zeros((2048, 512), "float32"), numpy.zeros((2048, 1), "float32"))
"""


def test_the_report_goes_to_standard_output(target, capfd):
    assert main(["report", f"{target}:build", "--target-batch", "64"]) == 0
    out, err = capfd.readouterr()
    assert "autobatch sizing report: stub" in out
    assert "effective batch 64" in out
    assert "printed by the user" not in out + err
    assert err == ""  # no progress where there is no terminal
    assert "\x1b" not in out


def test_json(target, capfd):
    assert main(["report", f"{target}:build", "--target-batch", "64", "--format", "json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["plan"]["effective_batch"] == 64
    assert data["largest_fit"] <= 16
    assert all(trial["micro_batch"] for trial in data["trials"])


def test_output_is_a_whole_file_and_show_renders_it_again(target, tmp_path, capfd):
    path = tmp_path / "report.json"
    path.write_text("before")
    path.chmod(0o640)
    command = ["report", f"{target}:build", "--target-batch", "32", "--format", "json", "--output", str(path)]
    assert main(command) == 0
    assert capfd.readouterr().out == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert not list(tmp_path.glob(".autobatch*"))
    report = load(path.read_text())
    assert report.plan is not None

    assert main(["show", str(path)]) == 0
    assert "effective batch 32" in capfd.readouterr().out
    page = tmp_path / "report.html"
    assert main(["show", str(path), "--format", "html", "--output", str(page)]) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_output_follows_a_link(target, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "file.txt")
    assert main(["report", f"{target}:build", "--output", str(link)]) == 0
    assert link.is_symlink()
    assert "sizing report" in (tmp_path / "real" / "file.txt").read_text()


def test_output_to_a_device_does_not_replace_it(target, capfd):
    assert main(["report", f"{target}:build", "--output", "/dev/null"]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.slow
def test_what_differs_is_what_the_trace_shows(tmp_path, capfd):
    path = tmp_path / "noisy.py"
    path.write_text(_NOISY)
    command = ["report", f"{path}:build", "--target-batch", "2048", "--memory-limit", "24MiB", "--format", "json"]
    assert main(command) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["plan"]["accumulation_steps"] > 1
    assert report["warnings"] == ["Own.train_step draws new random numbers in each micro-batch."]


@pytest.mark.slow
def test_elements_that_cannot_be_cut_are_taken_whole(tmp_path, capfd):
    """Nothing but a trace shows that the rows of these graphs belong together."""
    path = tmp_path / "graphs.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(uneven.__file__).parent)!r})\n"
        "import uneven\ndef build():\n    return uneven.made(uneven.graph), uneven.graphs((4, 4), (6, 6), (8, 8))\n"
    )
    assert main(["report", f"{path}:build", "--target-batch", "4", "--format", "json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert (report["plan"]["micro_batch"], report["plan"]["effective_batch"]) == (1, 1)
    assert any("neither cut nor joined" in warning for warning in report["warnings"])
    assert err == ""


@pytest.mark.parametrize(("minimum", "code"), [(1, 0), (16, 0), (17, 1), (64, 1)])
def test_the_gate(target, minimum, code, capfd):
    assert main(["report", f"{target}:build", "--fail-under", str(minimum)]) == code
    out, err = capfd.readouterr()
    assert "sizing report" in out
    assert err == ("" if code == 0 else f"autobatch: the largest micro-batch is 16, under {minimum}\n")


def test_nothing_fits(target, capfd):
    assert main(["report", f"{target}:nothing_fits", "--target-batch", "8"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("autobatch: ")
    assert "Traceback" not in err


def test_the_users_own_error_is_shown_from_their_frame_on(target, capfd):
    assert main(["report", f"{target}:raises"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith(f'  File "{target}"')
    assert lines[-1] == "autobatch: RuntimeError: mine"


@pytest.mark.parametrize(("function", "words"), [("dies", "exit code 9"), ("hangs", "not ready")])
def test_user_code_that_ends_its_process_or_never_comes_back(target, function, words, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AUTOBATCH_TEST_PID", str(tmp_path / "pid"))
    assert main(["report", f"{target}:{function}", "--timeout", "1.5"]) == 3
    assert words in capfd.readouterr().err


@pytest.mark.parametrize("function", ["returns_none", "absent"])
def test_a_target_that_cannot_be_used_is_one_line(target, function, capfd):
    assert main(["report", f"{target}:{function}"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("autobatch: ")


def test_gpu_that_is_not_there(target, capfd):
    assert main(["report", f"{target}:build", "--device", "GPU:0"]) == 2
    assert "TensorFlow sees no such device" in capfd.readouterr().err


def _trials(report_text):
    return [trial["micro_batch"] for trial in json.loads(report_text)["trials"]]


def test_a_second_report_confirms_what_is_remembered_with_one_trial(target, capfd):
    command = ["report", f"{target}:build", "--target-batch", "64", "--format", "json"]
    outputs = []
    for more in ([], [], ["--no-cache"], ["--fail-under", "1"], ["--exact"], ["--max-trials", "9"]):
        assert main([*command, *more]) == 0
        outputs.append(capfd.readouterr().out)
    first, again, without, gate, proven, limited = map(_trials, outputs)
    assert len(first) > 1
    assert again == [json.loads(outputs[0])["plan"]["micro_batch"]] == limited
    assert json.loads(outputs[1])["plan"] == json.loads(outputs[0])["plan"]
    assert "remembered from" in json.loads(outputs[1])["stopped_because"]
    assert without == gate == first
    assert len(proven) > 1


def test_a_broken_cache_is_one_line_on_standard_error(target, own_cache, capfd):
    own_cache.mkdir(parents=True)
    (own_cache / "results-1.db").write_bytes(b"broken" * 1000)
    assert main(["report", f"{target}:build", "--target-batch", "64"]) == 0
    out, err = capfd.readouterr()
    assert "sizing report" in out
    assert err.startswith("autobatch: The remembered results in ")
    assert err.count("\n") == 1
