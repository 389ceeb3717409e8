"""Many processes write at once, and some are killed: what was committed is there, and the file is sound."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from remembered import a_key, a_result

from autobatch.cache.store import ResultStore

_SCRIPT = Path(__file__).with_name("remembered.py")


def writer(folder, name, count):
    command = [sys.executable, str(_SCRIPT), str(folder), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_all_there(folder, digests):
    store = ResultStore(folder)
    assert store.find(a_key(digests[0])) is not None
    connection = sqlite3.connect(store.path)
    found = {digest for (digest,) in connection.execute("SELECT digest FROM results")}
    assert set(digests) <= found
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    assert not list(folder.glob("*.broken-*"))


def test_concurrent_writers_lose_nothing(tmp_path):
    folder = tmp_path / "new"  # which they all try to make
    writers = [writer(folder, f"w{number}", 30) for number in range(5)]
    outcomes = [process.communicate(timeout=120) for process in writers]
    assert [err for _, err in outcomes] == [""] * 5
    committed = [digest for out, _ in outcomes for digest in out.split()]
    assert len(committed) == 5 * 30
    assert_all_there(folder, committed)


def test_a_kill_at_any_moment_loses_no_committed_row(tmp_path):
    rng = random.Random(3)
    committed: list[str] = []
    killed = 0
    for turn in range(6):
        writers = [writer(tmp_path, f"t{turn}w{number}", 10_000) for number in range(3)]
        committed += [process.stdout.readline().strip() for process in writers]  # all of them are under way
        for process in writers:
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        for process in writers:
            out, err = process.communicate(timeout=60)
            assert err == ""
            killed += process.returncode == -signal.SIGKILL
            # The last line may be half a line.
            committed += out[: out.rfind("\n") + 1].split()
    assert killed == 18
    assert_all_there(tmp_path, committed)


def test_a_kill_between_two_writes_of_one_transaction(tmp_path):
    store = ResultStore(tmp_path)
    assert store.put(a_key("before"), a_result())
    # Spill the transaction to the file before it is committed, then die without a word.
    program = (
        "import os, signal, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN IMMEDIATE'); c.execute('DELETE FROM results'); "
        "[c.execute(\"INSERT INTO results SELECT ?, 0, 0, 0, ?, '', 0, 0, 0, 0, 0, 0, 0, ''\", (str(i), 'x' * 4000)) "
        "for i in range(200)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(store.path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.path.with_name(store.path.name + "-journal").stat().st_size > 0
    assert store.find(a_key("before")) == a_result()
    assert len(store.entries()) == 1


def test_processes_that_find_a_broken_file_at_once_lose_nothing(tmp_path):
    path = ResultStore(tmp_path).path
    path.write_bytes(b"no database at all\n" * 1000)
    writers = [writer(tmp_path, f"w{number}", 20) for number in range(4)]
    outcomes = [process.communicate(timeout=120) for process in writers]
    committed = [digest for out, _ in outcomes for digest in out.split()]
    assert len(committed) == 4 * 20
    (aside,) = tmp_path.glob("*.broken-*")
    assert aside.read_bytes().startswith(b"no database")
    assert sum("was renamed to" in err for _, err in outcomes) == 1
    aside.unlink()
    assert_all_there(tmp_path, committed)
