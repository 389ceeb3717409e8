"""One training at a time in a folder: who is refused, and what the dead leave behind."""

import json
import os
import signal
import subprocess
import sys

import pytest

from autobatch.backup.lock import FILE, FolderLock

HOLDER = """
import sys, time, pathlib
from autobatch.backup.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "a"


@pytest.fixture
def holder(folder):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def held_by_another(folder):
    """Whether a process of its own finds the folder locked."""
    done = subprocess.run(
        [sys.executable, "-c", HOLDER.replace("600", "0"), str(folder)], capture_output=True, text=True
    )
    return "in use by another training" in done.stderr


def test_another_process_is_refused_by_name_until_it_dies(folder, holder):
    lock = FolderLock(folder)
    with pytest.raises(
        ValueError, match=rf"process {holder.pid} \(.*\), since 20.*kill {holder.pid}.*Received: backup="
    ):
        lock.acquire()
    lock.release()
    assert (folder / FILE).exists(), "what was refused removes nothing"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / FILE).exists()
    lock.acquire()
    assert held_by_another(folder)
    lock.release()
    assert not folder.exists()


def test_what_a_dead_process_wrote_means_nothing_even_if_its_number_lives(folder):
    folder.mkdir(parents=True)
    (folder / FILE).write_text(json.dumps({"process": os.getpid(), "host": os.uname().nodename}))
    lock = FolderLock(folder)
    lock.acquire()
    lock.release()


def test_a_second_one_in_this_process_is_refused_too(folder):
    first, second = FolderLock(folder), FolderLock(folder)
    first.acquire()
    with pytest.raises(ValueError, match="of this process itself"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_child_that_outlives_its_parent_does_not_hold_it(folder):
    lock = FolderLock(folder)
    lock.acquire()
    (end, begin), (started, says) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(begin)
        os.write(says, b"x")
        os.read(end, 1)
        os._exit(0)
    try:
        os.close(end)
        os.read(started, 1)
        os.close(lock._descriptor)  # as the parent's end does, which unlocks nothing by itself
        other = FolderLock(folder)
        other.acquire()
        other.release()
    finally:
        for descriptor in (begin, started, says):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_other_files_stay_and_the_folder_with_them(folder):
    lock = FolderLock(folder)
    lock.acquire()
    (folder / "mine").write_text("")
    lock.release()
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_where_no_folder_can_be_made_nobody_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    lock = FolderLock(tmp_path / "file" / "a")
    lock.acquire()
    lock.release()
