"""A script under ``autobatch run``: what is passed on, what is started again, and what ends it. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from running import BAD_ALLOC, command, environment, run, script, starts

AGAIN = "ended by SIGABRT for want of host memory: starting again"


def logged(tmp_path, path, *arguments, **options):
    """Run with standard error in a file, whose end the command reads; return the end and what stands there."""
    with open(tmp_path / "log", "w") as log:
        done = run(*arguments, path, stderr=log, **options)
    return done, (tmp_path / "log").read_text()


def test_arguments_outputs_and_input_are_the_scripts_own(tmp_path):
    path = script(tmp_path, "print(sys.argv[1:], sys.stdin.read(), __name__); print('seen', file=sys.stderr)")
    done = run("--restarts", "2", path, "--restarts", "x", "--", "-m", "--help", input="typed")
    assert done.stdout == "['--restarts', 'x', '--', '-m', '--help'] typed __main__\n"
    assert done.stderr == "seen\n"
    assert done.returncode == 0


def test_a_module_a_folder_and_a_double_dash(tmp_path):
    script(tmp_path, "print(__name__, sys.argv[1:])", "mine.py")
    (tmp_path / "packed").mkdir()
    script(tmp_path / "packed", "print('folder', sys.argv[1:])", "__main__.py")
    for arguments, printed in (
        (["-m", "mine", "--lr", "1"], "__main__ ['--lr', '1']\n"),
        (["-mmine", "-m"], "__main__ ['-m']\n"),
        (["--", "mine.py", "--", "a"], "__main__ ['--', 'a']\n"),
        (["--restarts=1", "packed", "a"], "folder ['a']\n"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert (done.stdout, done.stderr, done.returncode) == (printed, "", 0)


@pytest.mark.parametrize("code", [0, 1, 3, 134, 137, 139, 255])
def test_an_exit_code_of_the_scripts_own_is_ours(tmp_path, code):
    path = script(tmp_path, f"sys.exit({code})")
    done = run(path)
    assert (done.returncode, done.stderr, starts(path)) == (code, "", 1)


def test_a_bug_is_passed_on(tmp_path):
    path = script(tmp_path, "raise MemoryError('mine')")
    done = run(path)
    assert done.returncode == 1
    assert done.stderr.endswith("MemoryError: mine\n")
    assert starts(path) == 1


@pytest.mark.parametrize("by", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_death_without_a_sign_of_memory_is_passed_on_and_explained(tmp_path, by):
    path = script(tmp_path, f"os.kill(os.getpid(), signal.{by})")
    done = run(path)
    assert done.returncode == -signal.Signals[by]
    assert f"by {by}, and nothing tells of memory (" in done.stderr
    assert done.stderr.endswith("it is not started again\n")
    assert starts(path) == 1


@pytest.mark.parametrize("by", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGPIPE"])
def test_another_signal_is_passed_on_without_a_word(tmp_path, by):
    path = script(tmp_path, f"signal.signal(signal.{by}, signal.SIG_DFL); os.kill(os.getpid(), signal.{by})")
    done = run(path)
    assert (done.returncode, done.stderr, starts(path)) == (-signal.Signals[by], "", 1)


def test_the_script_starts_with_the_signals_that_every_program_starts_with(tmp_path):
    path = script(
        tmp_path,
        """
        lines = Path("/proc/self/status").read_text().splitlines()
        masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk", "SigIgn"))]
        print([hex(mask & 2**31 - 1) for mask in masks])  # what is above is the C library's own
        """,
    )
    plain = subprocess.run([sys.executable, path], env=environment(), text=True, capture_output=True, check=True)
    assert run(path).stdout == plain.stdout


def test_death_in_an_allocator_starts_it_again(tmp_path):
    path = script(tmp_path, "print('start', start, flush=True)\nif start < 3: die_of_host_memory()\nsys.exit(7)")
    done, log = logged(tmp_path, path)
    assert done.returncode == 7
    assert done.stdout == "start 1\nstart 2\nstart 3\n"
    assert log.count(AGAIN) == 2
    assert ", from its beginning (" in log


def test_three_deaths_without_a_backup_end_it_with_what_is_known(tmp_path):
    path = script(tmp_path, "die_of_host_memory()")
    done, log = logged(tmp_path, path)
    assert done.returncode == -signal.SIGABRT
    assert starts(path) == 3
    last = log[log.rindex("autobatch: ") :]
    assert "it is not started again after 3 deaths without a new backup between them" in last
    assert [line[2:5] for line in last.splitlines()[1:4]] == ["1. ", "2. ", "3. "]
    assert "has not come to autobatch.fit" in last


def test_new_backups_let_it_go_on(tmp_path):
    path = script(
        tmp_path,
        """
        note(backups=int(start <= 4), kept_update=10 * start, doing=2, micro_batch=64, smaller=48)
        if start < 7: die_of_host_memory()
        """,
    )
    done, log = logged(tmp_path, path)
    # The first four have each written a backup: 1 2 3 | 4 5 6 die, and only the last two without a new one before.
    assert done.returncode == -signal.SIGABRT
    assert starts(path) == 6
    assert log.count(AGAIN) == 5
    assert "with shorter queues, behind update 10 (" in log
    assert "Give autobatch.fit a shorter backup_every" in log


@pytest.mark.parametrize("restarts", [0, 1])
def test_no_more_restarts_than_allowed(tmp_path, restarts):
    path = script(tmp_path, "die_of_host_memory()")
    done, log = logged(tmp_path, path, "--restarts", restarts)
    assert done.returncode == -signal.SIGABRT
    assert starts(path) == restarts + 1
    assert log.endswith(f"it is not started again, as --restarts is {restarts}\n")


def test_what_was_written_before_the_start_is_no_last_word(tmp_path):
    path = script(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "log").write_text("an earlier run: std::bad_alloc\n")
    with open(tmp_path / "log", "a") as log:
        run(path, stderr=log)
    assert starts(path) == 1


def test_the_next_process_is_told_the_cause(tmp_path):
    path = script(
        tmp_path,
        """
        if start == 1:
            note(doing=2, micro_batch=64, smaller=48, device_is_host=True)
            die_of_host_memory()
        print(next(Path(os.environ["AUTOBATCH_RUN_FOLDER"]).glob("causes.json")).read_text())
        """,
    )
    done, log = logged(tmp_path, path)
    told = json.loads(done.stdout)
    words = "ended by SIGABRT for want of host memory"
    assert told == {
        "deaths": [{"words": words, "training": 1, "doing": "update", "micro_batch": 64}],
        "host_deaths": 1,
    }
    assert "starting again with shorter queues and at micro-batch 48, from its beginning, as fit has no backup" in log


def test_a_poisoned_device_starts_it_again_if_that_has_ended_it(tmp_path):
    text = """
        if start == 1:
            note(doing=2, micro_batch=64, smaller=48, poison="InternalError: CUDA_ERROR_LAUNCH_FAILED")
            sys.exit({code})
    """
    done = run(script(tmp_path, text.format(code=1)))
    assert done.returncode == 0
    assert done.stderr == (
        "autobatch: device lost: starting again at micro-batch 48, from its beginning, as fit has no backup yet "
        "(InternalError: CUDA_ERROR_LAUNCH_FAILED)\n"
    )
    other = run(script(tmp_path, text.format(code=2), "other.py"))
    assert (other.returncode, other.stderr) == (2, "")


def test_a_worker_of_the_script_notes_nothing_in_its_name(tmp_path):
    path = script(
        tmp_path,
        """
        note(doing=2, micro_batch=64)
        if not os.fork():
            note(poison="CUDA_ERROR_LAUNCH_FAILED")
            os._exit(0)
        os.wait()
        sys.exit(1)
        """,
    )
    done = run(path)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_a_dead_script_has_left_running_is_ended(tmp_path):
    path = script(
        tmp_path,
        """
        def work():
            signal.signal(signal.SIGTERM, signal.SIG_IGN if start_of_workers % 2 else signal.SIG_DFL)
            time.sleep(600)
        if start == 1:
            pids = []
            for start_of_workers in range(12):
                pid = os.fork()
                if not pid: work()
                pids.append(pid)
            daemon = os.fork()
            if not daemon:
                os.setsid()
                os.closerange(0, 3)
                Path(__file__).with_suffix(".daemon").touch()
                time.sleep(600)
            while not Path(__file__).with_suffix(".daemon").exists(): time.sleep(0.01)
            print(*pids, daemon, flush=True)
            die_of_host_memory()
        """,
    )
    done, log = logged(tmp_path, path)
    *workers, daemon = map(int, done.stdout.split())
    assert done.returncode == 0
    assert "ended what it had left running (12 processes)" in log
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    os.kill(daemon, signal.SIGKILL)  # it was left alone, or this would raise


def test_a_file_as_input_is_read_again_from_where_it_was(tmp_path):
    (tmp_path / "input").write_text("first\nsecond\nthird\n")
    path = script(tmp_path, "print(sys.stdin.read().split(), flush=True)\nif start == 1: die_of_host_memory()")
    with open(tmp_path / "input") as file:
        os.lseek(file.fileno(), 6, os.SEEK_SET)
        done, _ = logged(tmp_path, path, stdin=file)
    assert done.stdout == "['second', 'third']\n" * 2


def test_nobody_who_reads_the_outputs_changes_nothing(tmp_path):
    path = script(tmp_path, "time.sleep(0.3)\nif start == 1: os.kill(os.getpid(), signal.SIGKILL)")
    process = subprocess.Popen(command(path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == -signal.SIGKILL


def until(true, seconds=20):
    patience = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.02)


@pytest.mark.parametrize("by", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_to_us_alone_reaches_the_script_once(tmp_path, by):
    path = script(
        tmp_path,
        f"""
        got = []
        signal.signal(signal.{by}, lambda *_: got.append(1))
        Path(__file__).with_suffix(".ready").touch()
        while not got: time.sleep(0.01)
        time.sleep(0.3)
        print(len(got), flush=True)
        die_of_host_memory()
        """,
    )
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(path), env=environment(), stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        until(path.with_suffix(".ready").exists)
        process.send_signal(signal.Signals[by])
        out, _ = process.communicate(timeout=60)
    assert out == "1\n"
    assert starts(path) == 1, "somebody has asked for the end"
    assert process.returncode == -signal.SIGABRT


def test_another_signal_is_for_the_script_alone(tmp_path):
    path = script(
        tmp_path,
        """
        got = []
        signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
        Path(__file__).with_suffix(f".ready{start}").touch()
        while not got: time.sleep(0.01)
        if start == 1: die_of_host_memory()
        """,
    )
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command(path), env=environment(), stderr=log)
        for start in (1, 2):
            until(path.with_suffix(f".ready{start}").exists)
            process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 0
    assert starts(path) == 2


def test_an_ignored_hangup_stays_ignored(tmp_path):
    path = script(tmp_path, "os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.3); print('alive')")
    done = run(path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.stdout, done.returncode) == ("alive\n", 0)


def test_the_folder_is_gone_at_the_end(tmp_path):
    path = script(tmp_path, "print(os.environ['AUTOBATCH_RUN_FOLDER'], flush=True)\nos.kill(os.getpid(), 9)")
    folder = run(path).stdout.strip()
    assert folder
    assert not os.path.exists(folder)


def test_the_parent_imports_no_tensorflow_and_no_rich(tmp_path):
    path = script(tmp_path, "pass")
    code = (
        "import sys; from autobatch.cli import main; assert main(['run', sys.argv[1]]) == 0; "
        "print([name for name in ('tensorflow', 'keras', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], env=environment(), text=True, capture_output=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_the_last_words_of_a_step_are_read_where_standard_error_is_no_file(tmp_path, inside):
    path = script(
        tmp_path,
        f"""
        from autobatch.terminal import kept_aside
        if start == 1:
            with kept_aside.window():
                os.write(2, b"{BAD_ALLOC}\\n")
                if {inside}: os.abort()
            os.abort()  # what was written in a step that went well is no last word
        """,
    )
    done = run(path, env={"TF_CPP_MIN_LOG_LEVEL": "2"})
    assert starts(path) == (2 if inside else 1)
    assert done.returncode == (0 if inside else -signal.SIGABRT)
    assert done.stderr.startswith(f"{BAD_ALLOC}\nautobatch: ended by SIGABRT")


def test_a_folder_that_somebody_has_tidied_up_is_made_anew(tmp_path):
    path = script(
        tmp_path,
        """
        import shutil
        folder = os.environ["AUTOBATCH_RUN_FOLDER"]
        print(os.listdir(folder), flush=True)
        shutil.rmtree(folder)
        if start == 1: die_of_host_memory()
        """,
    )
    done, log = logged(tmp_path, path)
    assert (done.returncode, done.stdout) == (0, "[]\n['causes.json']\n")
    assert "Traceback" not in log


def test_children_that_are_not_the_scripts_are_left_alone(tmp_path):
    path = script(tmp_path, "if start == 1: die_of_host_memory()")
    with open(tmp_path / "log", "w") as log:
        shell = ["sh", "-c", 'sleep 60 >/dev/null & echo $!; exec "$@"', "sh", *command(path)]
        done = subprocess.run(shell, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True, timeout=60)
    assert (done.returncode, starts(path)) == (0, 2)
    os.kill(int(done.stdout), signal.SIGKILL)  # or this would raise


def test_a_death_behind_a_training_whose_backups_are_removed_is_no_progress(tmp_path):
    path = script(
        tmp_path,
        """
        from autobatch.handover import status
        note()
        status.note_backup(10)
        status.note_backups_removed()
        die_of_host_memory()
        """,
    )
    done, log = logged(tmp_path, path)
    assert (done.returncode, starts(path)) == (-signal.SIGABRT, 3)
    assert "from its beginning" in log
