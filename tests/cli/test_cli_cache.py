"""``autobatch cache``: what is remembered, shown and forgotten without TensorFlow."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch
from autobatch.cache.entry import Remembered
from autobatch.cache.key import Key
from autobatch.cache.store import ResultStore
from autobatch.cli import main


def remember(folder, digest="a", **fields):
    fields = {
        "largest_fit": 64,
        "smallest_failure": None,
        "is_bound": True,
        "limit_bytes": 512 * 2**20,
        "peak_bytes": None,
        "memory_model": None,
        "target_batch": 256,
        "model_name": "resnet",
        "device": "GPU:0",
        "stopped_because": "within 3 %",
        "created_seconds": 1.7e9,
        **fields,
    }
    result = Remembered(43, **fields)
    assert ResultStore(folder).put(Key(digest, result.limit_bytes, False), result)


def test_an_empty_cache(own_cache, capfd):
    assert main(["cache", "list"]) == 0
    assert capfd.readouterr().out == f"Nothing is remembered in {own_cache / 'results-1.db'}.\n"
    assert main(["cache", "clear"]) == 0
    assert capfd.readouterr().out.startswith("Forgot 0 results")
    assert not own_cache.exists()


def test_list_and_clear(own_cache, capfd):
    remember(own_cache, created_seconds=1.6e9)
    remember(own_cache, "b", model_name="odd\x1b[31m\tname\n", target_batch=None, limit_bytes=None)
    assert main(["cache", "list"]) == 0
    out, err = capfd.readouterr()
    heading, newest, oldest = [line.split("\t") for line in out.splitlines()]
    assert heading == ["Model", "Device", "Limit", "Micro-batch", "Target", "Largest", "When"]
    assert newest[:-1] == ["odd\\x1b[31m name", "GPU:0", "-", "43", "-", "64"]
    assert oldest[:-1] == ["resnet", "GPU:0", "512 MiB", "43", "256", "64"]
    assert oldest[-1].startswith("2020-09-1")
    assert err == ""
    assert main(["cache", "clear"]) == 0
    assert capfd.readouterr().out == f"Forgot 2 results in {own_cache / 'results-1.db'}.\n"
    assert ResultStore(own_cache).entries() == ()


@pytest.mark.parametrize("action", ["list", "clear"])
def test_a_broken_file_is_told_of_in_one_line(own_cache, capfd, action):
    own_cache.mkdir(parents=True)
    (own_cache / "results-1.db").write_bytes(b"broken" * 1000)
    assert main(["cache", action]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == err.count("\n") == 1
    assert err.startswith("autobatch: The remembered results in ")
    assert "was renamed to results-1.db.broken-" in err


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(tmp_path / "file"))
    assert main(["cache", "list"]) == 0
    assert capfd.readouterr().out.startswith("Nothing is remembered in ")


def test_neither_tensorflow_nor_numpy_is_imported(own_cache):
    remember(own_cache)
    program = (
        "import sys; from autobatch.cli import main; codes = main(['cache', 'list']), main(['cache', 'clear']); "
        "slow = {'tensorflow', 'keras', 'numpy', 'autobatch.api'} & set(sys.modules); "
        "assert codes == (0, 0) and not slow, (codes, slow)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(autobatch.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, env=env, stdout=subprocess.DEVNULL)


def test_a_terminal_gets_a_table(own_cache):
    remember(own_cache)
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(autobatch.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "autobatch", "cache", "list"]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=env)
    process.wait(timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert process.returncode == 0
    assert "resnet" in shown
    assert "512 MiB" in shown
    assert "\t" not in shown
