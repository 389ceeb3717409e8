"""A script that the kernel kills for memory, in a real control group with a limit."""

import os
import signal
import subprocess

from running import command, environment, join, run, script, starts

EATS = """
def eat():
    held = []
    while True: held.append(os.urandom(10**6) * 4)
"""


def test_the_kernels_kill_starts_it_again(tmp_path, group):
    path = script(tmp_path, EATS + "print('start', start, flush=True)\nif start < 3: eat()")
    done = run(path, preexec_fn=lambda: join(group))
    assert done.returncode == 0
    assert done.stdout == "start 1\nstart 2\nstart 3\n"
    first, second = done.stderr.splitlines()
    assert first.startswith("autobatch: killed by the kernel for host memory: starting again, from its beginning (")
    assert f"(oom_kill of {group}: 0 -> 1)" in first
    assert f"(oom_kill of {group}: 1 -> 2)" in second


def test_a_script_that_moves_into_a_group_is_followed(tmp_path, group):
    moves = f"Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid())); time.sleep(1.2)\n"
    path = script(tmp_path, EATS + f"if start == 1:\n    {moves}    eat()")
    done = run(path)
    assert done.returncode == 0
    assert f"(oom_kill of {group}: 0 -> 1)" in done.stderr


def test_three_kills_end_it_by_the_kill(tmp_path, group):
    path = script(tmp_path, EATS + "eat()")
    done = run(path, preexec_fn=lambda: join(group))
    assert done.returncode == -signal.SIGKILL
    assert starts(path) == 3
    assert "after 3 deaths without a new backup between them" in done.stderr


def test_a_kill_of_somebodys_in_the_same_group_is_no_kill_for_memory(tmp_path, group):
    path = script(tmp_path, "print(os.getpid(), flush=True)\ntime.sleep(60)")
    process = subprocess.Popen(
        command(path),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: join(group),
    )
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert "killed by SIGKILL, and nothing tells of memory (the kernel counts no kill for memory" in err
    assert starts(path) == 1


def test_a_worker_that_the_kernel_kills_is_told_of_where_the_script_fails(tmp_path, group):
    path = script(tmp_path, EATS + "if not os.fork(): eat()\nos.wait()\nsys.exit(4)")
    done = run(path, preexec_fn=lambda: join(group))
    assert done.returncode == 4
    assert "the kernel has killed a process for host memory, and the script ended by itself with 4" in done.stderr
    assert starts(path) == 1
