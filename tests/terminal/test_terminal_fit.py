"""Real trainings in a real terminal, and in a log file: what is on the screen when trials and steps have failed."""

import concurrent.futures
import os
import re
import subprocess
import sys

import pytest
from screen import HERE, run_in_terminal

SCRIPT = str(HERE / "terminal_fit.py")
ALLOCATOR = re.compile(r"allocat|OOM|Chunk|RESOURCE_EXHAUSTED|InUse|rendezvous|OP_REQUIRES")


def environment(**more):
    return {"PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "1", **more}


def in_arena():
    # An arena's allocator waits ten seconds before it fails; without a replay one trial runs out of memory.
    more = environment(TF_ENABLE_ONEDNN_OPTS="1", AUTOBATCH_RECORD_ALLOCATIONS="0")
    return run_in_terminal([SCRIPT, "arena"], columns=100, environment=more)


def with_recoveries():
    more = environment(TF_ENABLE_ONEDNN_OPTS="0", PYTHONWARNINGS="ignore")
    return run_in_terminal([SCRIPT, "hungry"], columns=80, environment=more)


def with_recoveries_logged(path):
    more = environment(TF_ENABLE_ONEDNN_OPTS="0", PYTHONWARNINGS="ignore", PYTHONUNBUFFERED="1")
    with path.open("wb") as log:
        return subprocess.run(
            [sys.executable, SCRIPT, "hungry"],
            stdout=log,
            stderr=log,
            env={**os.environ, **more},
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The three processes, side by side: they wait for the most part."""
    log = tmp_path_factory.mktemp("terminal") / "log"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = pool.submit(in_arena), pool.submit(with_recoveries), pool.submit(with_recoveries_logged, log)
        arena, recovered, logged = (each.result() for each in started)
    return {"arena": arena, "recovered": recovered, "logged": (logged.returncode, log.read_text("utf-8", "replace"))}


@pytest.mark.slow
def test_a_search_in_a_terminal_shows_its_trials_and_leaves_one_line(runs):
    code, last, screens = runs["arena"]
    text = "\n".join(last)
    assert code == 0, text
    assert re.search(r"failed: \[.*\d.*\]", text), text  # else the test shows nothing
    assert not ALLOCATOR.search(text), text
    told = [line for line in last if line.startswith("autobatch: ")]
    assert len(told) == 1, text
    line = r"autobatch: micro-batch \d+ x \d+ for 512 on CPU:0 \(\d+ trials, \d+ s; peak \d\d\.\d of 96 MiB\)"
    assert re.fullmatch(line, told[0]), told
    # It stands above Keras's own lines, and below what the model has printed while it was traced.
    order = [last.index(told[0]), last.index("Epoch 1/2"), max(i for i, row in enumerate(last) if "traced" in row)]
    assert order[2] < order[0] < order[1], text
    assert last.count("printed while traced") == last.count("told while traced") >= 1, text
    # While it ran there was a table: heading, a trial, and what was under way with its seconds.
    tables = ["\n".join(screen) for screen in screens if any(row.startswith(" Micro-batch") for row in screen)]
    assert any(re.search(r"autobatch: sequential, CPU:0, limit 96 MiB\n Micro-batch +Outcome", each) for each in tables)
    assert any(
        re.search(r"\n +\d+ +(?:fits|out of memory) .*\d s\nTrying micro-batch \d+ … \d s$", each) for each in tables
    )
    for screen in screens:
        assert sum(row.startswith(" Micro-batch") for row in screen) <= 1, screen
        assert not any(ALLOCATOR.search(row) for row in screen), screen


def test_a_recovery_and_a_growth_are_lines_below_keras_own_bar(runs):
    code, last, _ = runs["recovered"]
    text = "\n".join(last)
    assert code == 0, text
    assert not ALLOCATOR.search(text), text
    told = [line for line in last if "autobatch: " in line]
    assert told == [
        "autobatch: out of memory in update 3: micro-batch 20 -> 14 x 3",
        "autobatch: out of memory in update 3: micro-batch 14 -> 7 x 6",
        "autobatch: larger again from update 35 on: micro-batch 7 -> 10 x 4",
        told[-1],
    ]
    assert re.fullmatch(r"autobatch: micro-batch 20 x 2 for 40 on CPU:0 \(\d trials, [\d.]+ s\)", told[-1])
    bars = [line for line in last if "━" in line]
    assert all(re.fullmatch(r" ?\d+/40 ━+ .* loss: \S+", bar) for bar in bars), bars
    assert bars[-1].startswith("40/40")
    assert last.index("silent until here") == last.index("silent from here") + 1, text


def test_in_a_log_file_the_last_line_of_a_search_is_all(runs):
    code, text = runs["logged"]
    assert code == 0, text
    ours = [line for line in text.splitlines() if "autobatch: " in line]
    # A bar in a log file is drawn over itself as well; our lines are none of its own.
    assert [line.partition(" (")[0] for line in ours] == [
        "autobatch: out of memory in update 3: micro-batch 20 -> 14 x 3",
        "autobatch: out of memory in update 3: micro-batch 14 -> 7 x 6",
        "autobatch: larger again from update 35 on: micro-batch 7 -> 10 x 4",
        "autobatch: micro-batch 20 x 2 for 40 on CPU:0",
    ]
    assert not ALLOCATOR.search(text), text
    between = text[text.index("autobatch: micro-batch") :]
    assert "\x1b" not in between, between
    assert "Micro-batch" not in text
