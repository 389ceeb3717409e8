"""MultiWorkerMirroredStrategy: real processes on loopback, joined by TF_CONFIG, one of which may fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "integration" / "worker_fit.py"
pytestmark = pytest.mark.slow


def free_ports(count):
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in found]


class Run:
    """The workers of one training: what each printed, its exit code, and its weights."""

    def __init__(self, workers, case, folder, options=None, victim=0, last_is_left=False):
        ports = free_ports(workers)
        processes = []
        for index in range(workers):
            cluster = {"worker": [f"localhost:{port}" for port in ports]}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
                "AUTOBATCH_TEST_VICTIM": str(victim),
                "TF_NUM_INTRAOP_THREADS": "1",
            }
            command = [sys.executable, str(SCRIPT), case, str(folder / f"{index}.npz"), json.dumps(options or {})]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        self.told, self.codes, self.errors = [None] * workers, [None] * workers, [""] * workers
        order = [index for index in range(workers) if not (last_is_left and index == victim)]
        try:
            for index in order:
                out, self.errors[index] = processes[index].communicate(timeout=240)
                self.codes[index] = processes[index].returncode
                self.told[index] = json.loads(out.splitlines()[-1]) if out.strip() else None
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
        self.weights = []
        for index in range(workers):
            if (folder / f"{index}.npz").exists():
                with np.load(folder / f"{index}.npz") as archive:
                    self.weights.append([archive[name] for name in archive.files])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")

    def train(case):
        path = folder / f"{case}.npz"
        if not path.exists():
            environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
            command = [sys.executable, str(SCRIPT), case, str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            (folder / f"{case}.json").write_text(done.stdout.splitlines()[-1])
        with np.load(path) as archive:
            return [archive[name] for name in archive.files], json.loads((folder / f"{case}.json").read_text())

    return train


def assert_as_alone(run, expected, *, recoveries=0):
    weights, told = expected
    assert run.codes == [0] * len(run.codes), run.errors
    for worker in run.told:
        assert len(worker["recoveries"]) == recoveries
        assert worker["iterations"] == told["iterations"]
        assert sorted(worker["history"]) == sorted(told["history"])
        for name, values in told["history"].items():
            np.testing.assert_allclose(worker["history"][name], values, rtol=1e-5, err_msg=name)
    for own in run.weights:
        for actual, wanted in zip(own, weights, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_three_workers_and_tails_that_do_not_divide(alone, tmp_path):
    assert_as_alone(Run(3, "plain", tmp_path, {"micro_batch": "auto"}), alone("plain"))


def test_masked_losses_have_the_denominator_of_all_workers(alone, tmp_path):
    assert_as_alone(Run(2, "masked", tmp_path), alone("masked"))


def test_a_worker_with_less_memory_decides(alone, tmp_path):
    run = Run(2, "small", tmp_path, victim=1)
    assert_as_alone(run, alone("plain"))
    assert run.told[0]["plan"] == run.told[1]["plan"]
    assert run.told[0]["plan"][0] <= 4


# Of the second update's 10 samples a worker runs 3, 3, 3 and 1: micro-batches 4 to 7.
@pytest.mark.parametrize(("call", "victim"), [(4, 0), (5, 1), (7, 1)])
def test_out_of_memory_on_one_worker_is_recovered_from_on_all(alone, tmp_path, call, victim):
    run = Run(2, f"memory@{call}", tmp_path, victim=victim)
    assert_as_alone(run, alone("plain"), recoveries=1)
    assert [worker["recoveries"] for worker in run.told] == [[[1, "train", 3, 2]]] * 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_a_clear_error_on_the_other_and_a_restart_goes_on(alone, tmp_path, victim):
    options = {"backup": str(tmp_path / "backup"), "worker_timeout": 120}
    # 14 micro-batches in worker 0's first epoch with its validation, 16 in worker 1's.
    run = Run(2, "kill@18", tmp_path, options, victim=victim)
    assert run.codes[victim] == -signal.SIGKILL
    survivor = run.told[1 - victim]
    assert survivor["error"] == "WorkerLostError", survivor
    assert f"Worker {victim} is lost, while the workers agreed on update" in survivor["message"]
    assert survivor["seconds"] < 120
    again = Run(2, "plain", tmp_path, {**options, "micro_batch": "auto"}, victim=victim)
    assert again.codes == [0, 0], again.errors
    weights, told = alone("plain")
    for worker in again.told:
        assert worker["epochs"] == [1]
        assert worker["trials"] == []  # the plan was kept
        assert worker["plan"] == [3, 4, 2]
        assert worker["iterations"] == told["iterations"]
    for own in again.weights:
        for actual, wanted in zip(own, weights, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_a_worker_that_hangs_ends_the_others_within_the_timeout(tmp_path):
    run = Run(2, "stop@5", tmp_path, {"worker_timeout": 5}, victim=1, last_is_left=True)
    assert run.told[0]["error"] == "WorkerLostError", run.told
    assert "did not answer within 5 s" in run.told[0]["message"]


def test_an_error_of_the_users_own_on_one_worker_ends_all(tmp_path):
    run = Run(2, "bug@5", tmp_path, victim=1)
    assert run.told[1]["error"] == "UnknownError"
    assert "ZeroDivisionError" in run.told[1]["message"]
    assert run.told[0]["error"] == "WorkerLostError"
    assert "An error of its own ended worker 1 in update 1" in run.told[0]["message"]


def test_workers_that_read_different_data_say_so(tmp_path):
    run = Run(2, "apart", tmp_path)
    for worker in run.told:
        assert worker["error"] == "WorkersDisagreeError"
        assert "differ in the first sample" in worker["message"]


def test_without_a_seed_all_shuffle_alike(tmp_path):
    run = Run(2, "unseeded", tmp_path, {"shuffle": True})
    assert run.codes == [0, 0], run.errors
    for one, other in zip(*run.weights, strict=True):
        np.testing.assert_array_equal(one, other)
