"""MultiWorkerMirroredStrategy: real processes on loopback, joined by TF_CONFIG, one of which may fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import nursery
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
    """The workers of trainings, one case after the other: what each printed, its exit code, and its weights."""

    def __init__(self, workers, cases, folder, left=None):
        ports = free_ports(workers)
        processes = []
        self._folders = [folder / str(index) for index in range(workers)]
        for index, own in enumerate(self._folders):
            cluster = {"worker": [f"localhost:{port}" for port in ports]}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
                "TF_NUM_INTRAOP_THREADS": "1",
            }
            own.mkdir()
            processes.append(nursery.Process(SCRIPT, own, json.dumps(cases), env=environment))
        self.codes, self.errors = [None] * workers, [""] * workers
        self._told = [{} for _ in range(workers)]
        try:
            for index in range(workers):
                if index != left:
                    out, self.errors[index] = processes[index].communicate(timeout=240)
                    self.codes[index] = processes[index].returncode
                    self._told[index] = dict(zip(cases, map(json.loads, out.splitlines()), strict=False))
        finally:
            for process in processes:
                process.kill()

    def told(self, case):
        """Return what each worker printed of a case, None where it did not come to its end."""
        return [told.get(case) for told in self._told]

    def weights(self, case):
        """Return the weights of each worker at the end of a case."""
        return [weights(folder / f"{case}.npz") for folder in self._folders if (folder / f"{case}.npz").exists()]


def weights(path):
    with np.load(path) as archive:
        return [archive[name] for name in archive.files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    cases = {"plain": {}, "masked": {}}
    done = nursery.run(SCRIPT, folder, json.dumps(cases), env=environment)
    assert done.returncode == 0, done.stderr
    told = dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))
    return {case: (weights(folder / f"{case}.npz"), told[case]) for case in cases}


# Of the second update's 10 samples a worker runs 3, 3, 3 and 1: micro-batches 4 to 7.
FULL = {"memory@4": 0, "memory@5": 1, "memory@7": 1}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Trainings that all come to their end, in the same two processes."""
    cases = {
        "unseeded": {"shuffle": True},  # before anything sets a seed
        "masked": {},
        "small": {"victim": 1},
        **{case: {"victim": victim} for case, victim in FULL.items()},
        "apart": {},
    }
    run = Run(2, cases, tmp_path_factory.mktemp("two"))
    assert run.codes == [0, 0], run.errors
    return run


def assert_as_alone(run, case, expected, *, recoveries=0):
    wanted, told = expected
    assert run.codes == [0] * len(run.codes), run.errors
    for worker in run.told(case):
        assert len(worker["recoveries"]) == recoveries
        assert worker["iterations"] == told["iterations"]
        assert sorted(worker["history"]) == sorted(told["history"])
        for name, values in told["history"].items():
            np.testing.assert_allclose(worker["history"][name], values, rtol=1e-5, err_msg=name)
    found = run.weights(case)
    assert len(found) == len(run.codes)
    for own in found:
        for actual, expected_weight in zip(own, wanted, strict=True):
            np.testing.assert_allclose(actual, expected_weight, atol=1e-5)


def test_three_workers_and_tails_that_do_not_divide(alone, tmp_path):
    assert_as_alone(Run(3, {"plain": {"micro_batch": "auto"}}, tmp_path), "plain", alone["plain"])


def test_masked_losses_have_the_denominator_of_all_workers(alone, two):
    assert_as_alone(two, "masked", alone["masked"])


def test_a_worker_with_less_memory_decides(alone, two):
    assert_as_alone(two, "small", alone["plain"])
    one, other = two.told("small")
    assert one["plan"] == other["plan"]
    assert one["plan"][0] <= 4


@pytest.mark.parametrize("case", FULL)
def test_out_of_memory_on_one_worker_is_recovered_from_on_all(alone, two, case):
    assert_as_alone(two, case, alone["plain"], recoveries=1)
    assert [worker["recoveries"] for worker in two.told(case)] == [[[1, "train", 3, 2]]] * 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_a_clear_error_on_the_other_and_a_restart_goes_on(alone, tmp_path, victim):
    options = {"backup": str(tmp_path / "backup"), "worker_timeout": 120}
    # 14 micro-batches in worker 0's first epoch with its validation, 16 in worker 1's.
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    run = Run(2, {"kill@18": {"victim": victim, **options}}, before)
    assert run.codes[victim] == -signal.SIGKILL
    survivor = run.told("kill@18")[1 - victim]
    assert survivor["error"] == "WorkerLostError", survivor
    assert f"Worker {victim} is lost, while the workers agreed on update" in survivor["message"]
    assert survivor["seconds"] < 120
    again = Run(2, {"plain": {**options, "micro_batch": "auto"}}, after)
    assert again.codes == [0, 0], again.errors
    wanted, told = alone["plain"]
    for worker in again.told("plain"):
        assert worker["epochs"] == [1]
        assert worker["trials"] == []  # the plan was kept
        assert worker["plan"] == [3, 4, 2]
        assert worker["iterations"] == told["iterations"]
    for own in again.weights("plain"):
        for actual, expected in zip(own, wanted, strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_worker_that_hangs_ends_the_others_within_the_timeout(tmp_path):
    run = Run(2, {"stop@5": {"victim": 1, "worker_timeout": 5}}, tmp_path, left=1)
    told = run.told("stop@5")[0]
    assert told["error"] == "WorkerLostError", told
    assert "did not answer within 5 s" in told["message"]


def test_an_error_of_the_users_own_on_one_worker_ends_all(tmp_path):
    one, other = Run(2, {"bug@5": {"victim": 1}}, tmp_path).told("bug@5")
    assert other["error"] == "UnknownError"
    assert "ZeroDivisionError" in other["message"]
    assert one["error"] == "WorkerLostError"
    assert "An error of its own ended worker 1 in update 1" in one["message"]


def test_workers_that_read_different_data_say_so(two):
    for worker in two.told("apart"):
        assert worker["error"] == "WorkersDisagreeError"
        assert "differ in the first sample" in worker["message"]


def test_without_a_seed_all_shuffle_alike(two):
    one, other = two.weights("unseeded")
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)
