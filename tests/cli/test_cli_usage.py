"""The command as a process: usage errors, help, the terminal, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import autobatch.cli as cli
from autobatch.cli import main

pytestmark = pytest.mark.usefixtures("lean_children")

_ROOT = str(Path(cli.__file__).parents[2])
# Runs the command with the stand-in for the trials in its workers.
_STUBBED = (
    "import sys; from autobatch.worker import trials; trials.OPENER = 'stub_opener:open_trials'; "
    "from autobatch.cli import main; sys.exit(main(sys.argv[1:]))"
)


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), _ROOT)))
    return {**os.environ, "PYTHONPATH": path, **more}


def _run(*arguments: str, module: str = "autobatch") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60, check=False)


def test_help_imports_neither_tensorflow_nor_rich():
    program = (
        "import sys; from autobatch.cli import main; code = main(['report', '--help']); "
        "slow = {'tensorflow', 'keras', 'numpy', 'rich', 'autobatch.api'} & set(sys.modules); "
        "assert code == 0 and not slow, slow"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=_environment(), stdout=subprocess.DEVNULL)


def test_python_m_is_the_command():
    done = _run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: autobatch")
    assert "exit codes" in done.stdout
    assert _run("--version").stdout.startswith("autobatch ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exit codes:"),
        (["--"], "usage: autobatch [-h]"),
        (["unknown"], "invalid choice"),
        (["report"], "the following arguments are required: TARGET"),
        (["report", "nothing"], "TARGET is written as"),
        (["report", ":build"], "TARGET is written as"),
        (["report", "absent.py:build"], "The file 'absent.py' does not exist"),
        (["report", "absent/dir:build"], "does not exist"),
        (["report", "/:build"], "is a folder"),
        (["report", "a b:build"], "neither a Python file nor a module"),
        (["report", "module:"], "the name of a function"),
        (["report", "module:a.b"], "the name of a function"),
        (["report", "a\nb.py:build"], "does not exist"),
        (
            ["report", "x:y", "--target-batch", "0"],
            "argument --target-batch: N must be a whole number of at least 1. Received: '0'",
        ),
        (["report", "x:y", "--target-batch", "-1"], "argument --target-batch"),
        (["report", "x:y", "--target-batch", "2.5"], "Received: '2.5'"),
        (["report", "x:y", "--target-batch", "\u0665"], "argument --target-batch"),
        (["report", "x:y", "--target-batch", "9" * 5000], "argument --target-batch"),
        (["report", "x:y", "--memory-limit", "lots"], 'share of the device such as "80%", is a number of bytes'),
        (["report", "x:y", "--memory-limit", "lots"], """or text such as "512MiB" or "1.5GB". Received: 'lots'"""),
        (["report", "x:y", "--memory-limit", "0"], "Received: '0'"),
        (["report", "x:y", "--memory-limit", "9" * 400], "is a number of bytes above 0"),
        (
            ["report", "x:y", "--memory-limit", "99999999TB"],
            "must be less than 8 EiB (2**63 bytes). Received: '99999999TB'",
        ),
        (["report", "x:y", "--memory-limit", "10"], "at least 1 MiB"),
        (["report", "x:y", "--memory-limit", "0%"], "a percentage is above 0"),
        (["report", "x:y", "--memory-limit", "101%"], "a percentage is above 0"),
        (["report", "x:y", "--memory-limit", "nan%"], "a percentage is above 0"),
        (["report", "x:y", "--headroom", "1"], "argument --headroom"),
        (["report", "x:y", "--headroom", "-0.1"], "argument --headroom"),
        (["report", "x:y", "--headroom", "nan"], "such as 0.05 for 5 %. Received: 'nan'"),
        (["report", "x:y", "--headroom", "5%"], "headroom must be a number from 0 up to"),
        (["report", "x:y", "--headroom", "500"], """or bytes as "500MiB"; a share is a number such as 0.05 for 5 %."""),
        (["report", "x:y", "--headroom", "0MiB"], "headroom must be a number from 0 up to"),
        (
            ["report", "x:y", "--timeout", "0"],
            "argument --timeout: SECONDS must be a number of seconds above 0. Received: '0'",
        ),
        (["report", "x:y", "--max-seconds", "soon"], "SECONDS must be a number of seconds above 0. Received: 'soon'"),
        (["report", "x:y", "--timeout", "inf"], "argument --timeout"),
        (["report", "x:y", "--max-trials", "0"], "argument --max-trials"),
        (["report", "x:y", "--device", "TPU"], "argument --device"),
        (["report", "x:y", "--input", "224,0,3"], "argument --input"),
        (["report", "x:y", "--format", "pdf"], "argument --format: invalid choice"),
        (["report", "x:y", "--objective", "fun"], "argument --objective: invalid choice"),
        (["report", "x:y", "--target-batch", "8", "--fail-under", "9"], "can never be met"),
        (["report", "x:y", "--output", ""], "--output needs the name of a file"),
        (["report", "x:y", "--output", "/"], "--output names a folder"),
        (["report", "x:y", "--output", "/no/such/folder/file"], "--output: there is no folder"),
        (["run"], "autobatch run needs a SCRIPT, or -m MODULE"),
        (["run", "absent.py", "--restarts", "x"], "There is no such script. Received: 'absent.py'."),
        (["run", "python3", "absent.py"], "Leave the interpreter out: autobatch run train.py"),
        (["run", "-"], "A script on standard input can be read only once"),
        (["run", "/"], "A folder is run by its __main__.py, and this one has none. Received: '/'"),
        (["run", "a\0b"], "There is no such script"),
        (["run", "-m", "no_such_module.train"], "Python finds no such module. Received: -m 'no_such_module.train'"),
        (["run", "-m", "..train"], "Python finds no such module"),
        (["run", "-m"], "argument -m: expected one argument"),
        (["run", "--restarts", "-1", "x.py"], "N must be a whole number of at least 0. Received: '-1'"),
        (["run", "--restarts=1.5", "x.py"], "N must be a whole number of at least 0. Received: '1.5'"),
        (["run", "--restarts"], "argument --restarts: expected one argument"),
        (["run", "--restart", "1", "x.py"], "unrecognized arguments"),
        (["show", "absent.json"], "cannot be read"),
        (["show", "/"], "cannot be read"),
        (["devices", "more"], "unrecognized arguments"),
        (["cache"], "the following arguments are required: ACTION"),
        (["cache", "forget"], "invalid choice"),
        (["cache", "list", "more"], "unrecognized arguments"),
        (["cache", "clear", "--all"], "unrecognized arguments"),
    ],
)
def test_usage_errors(arguments, message, capfd):
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_usage_errors_import_no_tensorflow(tmp_path):
    program = (
        "import sys; from autobatch.cli import main; "
        f"assert main(['report', {str(tmp_path / 'absent.py')!r} + ':build', '--memory-limit', '1GiB']) == 2; "
        "slow = {'tensorflow', 'keras', 'rich', 'autobatch.api', 'autobatch.worker.trials'} & set(sys.modules); "
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=_environment())


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("def other(): ...", False),
        ("build = 1", True),
        ("import thing as build", True),
        ("if True:\n    def build(): ...", True),
        ("from thing import *", True),
        ("globals()['build'] = 1", True),
        ("def __getattr__(name): ...", True),
        ("def f():\n    global build\n    build = 1\nf()", True),
        ("def f():\n    build = 1", False),
        ("def build(:", True),
        ("class build: ...", True),
        ("for build in (): ...", True),
        ("a, (b, build) = 1, (2, 3)", True),
        ("", False),
    ],
)
def test_a_function_is_missed_at_once_only_where_it_is_certain(source, known, tmp_path):
    from autobatch.cli import target
    from autobatch.errors import TargetError

    path = tmp_path / "t.py"
    path.write_text(source)
    if known:
        target.check(f"{path}:build")
    else:
        with pytest.raises(TargetError, match="has no function 'build'"):
            target.check(f"{path}:build")


def test_a_file_that_may_not_be_read(tmp_path, capfd):
    path = tmp_path / "secret.py"
    path.write_bytes(b"\xff\xfe\x00")  # no source in any encoding; unreadable for root as well
    assert main(["report", f"{path}:build"]) == 3
    err = capfd.readouterr().err
    assert "SyntaxError" in err or "ValueError" in err
    assert "autobatch/worker/main.py" not in err


def test_a_syntax_error_is_shown_as_python_shows_it(tmp_path, capfd):
    path = tmp_path / "wrong.py"
    path.write_text("def build(:\n    pass\n")
    assert main(["report", f"{path}:build", "--remedies"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert f'File "{path}", line 1' in err
    assert "SyntaxError" in err.splitlines()[-1]
    assert "autobatch/worker/main.py" not in err


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"schema_version": 99}', b'{"schema_version": 1}']
)
def test_show_refuses_what_is_no_report_in_one_line(content, tmp_path, capfd):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    assert main(["show", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_show_reads_the_first_version_of_the_schema(capfd):
    path = Path(__file__).parent / "report_schema_1.json"
    assert main(["show", str(path)]) == 0
    assert "64 samples peak at 401 MiB" in capfd.readouterr().out


def test_devices(capfd):
    assert main(["devices"]) == 0
    out = capfd.readouterr().out
    assert "GPU" in out
    assert "Host: " in out
    assert "memory" in out


def test_fuzzed_command_lines_never_show_a_traceback(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    seed = 7
    rng = random.Random(seed)
    words = [
        *(
            "report",
            "show",
            "devices",
            "cache",
            "list",
            "clear",
            "--no-cache",
            "x:y",
            "a.py:b",
            "keras:",
            "keras:ResNet",
            ":",
            "::",
            "",
            "-",
            "--",
            "-h",
        ),
        *("--format", "json", "html", "--output", "/no/x", ".", "--target-batch", "0", "1", "-5", "1e9", "%", "1B"),
        *("--memory-limit", "80%", "--headroom", "nan", "--device", "GPU:99999", "--fail-under", "\udc80", "\0"),
        *("\0.py:f", "--timeout", "--jit", "--no-jit", "--input", "1,,2", "--classes", "\u2028", "--version"),
        *("--max-trials", "\U0001f600", "--remedies", "--remedies=1", "--no-remedies"),
    ]
    for _ in range(200):
        line = rng.choices(words, k=rng.randint(0, 6))
        # These would run a worker: what they do is tested elsewhere.
        line = [word for word in line if word not in ("x:y", "keras:ResNet") or "--help" in line]
        code = main(line)
        out, err = capfd.readouterr()
        assert code in (0, 2), line
        assert "Traceback" not in out + err, line


def test_output_into_a_closed_pipe(target):
    command = f'{sys.executable} -c "{_STUBBED}" report {target}:build --format html | head -c 10'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=_environment(), timeout=60)
    assert done.stdout == "<!DOCTYPE "
    assert done.stderr == ""


def test_an_ascii_only_terminal(target):
    command = [sys.executable, "-c", _STUBBED, "report", f"{target}:build", "--target-batch", "64"]
    env = _environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(command, capture_output=True, env=env, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")


def test_progress_is_on_standard_error_of_a_terminal(target):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", _STUBBED, "report", f"{target}:build", "--target-batch", "64"]
    env = _environment(TERM="xterm-256color")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side has closed
            break
        if not chunk:
            break
        shown += chunk
    out = process.communicate(timeout=60)[0]
    os.close(ours)
    assert process.returncode == 0
    assert b"Starting a worker" in shown
    assert b"micro-batch" in shown
    assert b"\x1b" not in out
    assert b"sizing report" in out


def test_a_terminal_has_colours_and_a_file_has_none(tmp_path):
    saved, written = Path(__file__).with_name("report_schema_1.json"), tmp_path / "report.txt"
    for options in ([], ["--output", str(written)]):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "autobatch", "show", str(saved), *options]
        env = _environment(TERM="xterm-256color")
        with subprocess.Popen(command, stdout=theirs, env=env) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # how Linux says that the other side has closed
                while chunk := os.read(ours, 4096):
                    shown += chunk
        os.close(ours)
        assert process.returncode == 0
        assert (b"\x1b[" in shown) == (not options)
    assert "sizing report" in written.read_text()
    assert "\x1b" not in written.read_text()


def test_an_interrupt_ends_the_worker_and_gives_130(target, tmp_path):
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", _STUBBED, "report", f"{target}:hangs"]
    env = _environment(AUTOBATCH_TEST_PID=str(pid_file))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    for _ in range(200):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert err == "autobatch: interrupted; the workers are gone\n"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_interrupt_among_the_remedies_prints_what_was_measured_until_then(target, tmp_path):
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", _STUBBED, "report", f"{target}:hangs_in_a_remedy", "--remedies"]
    env = _environment(AUTOBATCH_TEST_PID=str(pid_file))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "16 samples fit" in out
    assert "mixed_bfloat16, mixed_float16, XLA on" in out
    assert "not measured: interrupted" in " ".join(out.split())
    assert err == "autobatch: interrupted; the report has what was measured until then\n"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
