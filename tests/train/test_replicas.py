"""MirroredStrategy on logical CPU devices ends where a single device ends, whatever happens on one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "integration" / "replicas_fit.py"
CASES = {
    "2": (
        "weighted",
        "masked_losses",
        "searched",
        "a_smaller_device_decides",
        "out_of_memory_on_one_replica",
        "out_of_memory_in_the_update",
        "rolled_back_bit_for_bit",
        "other_data",
        "a_step_of_its_own",
        "refusals",
    ),
    "4": ("weighted", "fewer_samples_than_replicas", "out_of_memory_on_one_replica"),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def found(request):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), request.param, *CASES[request.param]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {"replicas": int(request.param), **json.loads(done.stdout.splitlines()[-1])}


def of(found, case):
    if case not in found:
        pytest.skip(f"{case} needs no further number of replicas")
    return found[case]


def assert_as_on_one_device(result, updates=None):
    assert result["weights"] < 1e-5
    assert result["history"] < 1e-5
    assert result["names"]
    assert result["alike"], "the replicas' weights differ"
    assert result["iterations"][0] == result["iterations"][1]


pytestmark = pytest.mark.slow


def test_weighted_losses_clipping_and_a_tail_that_does_not_divide(found):
    result = of(found, "weighted")
    assert_as_on_one_device(result)
    assert result["plan"][2] == found["replicas"]
    assert result["recoveries"] == []


def test_a_tail_with_fewer_samples_than_replicas(found):
    assert_as_on_one_device(of(found, "fewer_samples_than_replicas"))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_masked_losses_have_the_denominator_of_all_replicas(found, reduction):
    assert_as_on_one_device(of(found, "masked_losses")[reduction])


def test_the_search_runs_on_all_replicas(found):
    result = of(found, "searched")
    assert_as_on_one_device(result)
    assert result["plan"] == [10, 1, 2]


def test_a_smaller_device_decides(found):
    result = of(found, "a_smaller_device_decides")
    assert_as_on_one_device(result)
    assert result["plan"][0] <= 4
    assert result["recoveries"] == []


@pytest.mark.parametrize("micro_step", ["first", "middle", "last"])
def test_out_of_memory_on_one_replica_rolls_all_back(found, micro_step):
    result = of(found, "out_of_memory_on_one_replica")[micro_step]
    assert_as_on_one_device(result)
    assert result["recoveries"] == [[1, "train", 2, 1]]


def test_out_of_memory_in_the_update_on_one_replica(found):
    result = of(found, "out_of_memory_in_the_update")
    assert_as_on_one_device(result)
    assert len(result["recoveries"]) == 1


def test_rolling_back_restores_every_copy_bit_for_bit(found):
    result = of(found, "rolled_back_bit_for_bit")
    assert result["same"]
    assert result["values"] > 40
    assert result["iterations"] == 1
    assert "Not even one sample fits" in result["message"]


def test_datasets_and_several_steps_to_an_execution(found):
    result = of(found, "other_data")
    assert result["weights"] < 1e-5
    assert result["history"] < 1e-5


def test_a_train_step_of_ones_own_and_a_loss_scale(found):
    assert_as_on_one_device(of(found, "a_step_of_its_own"))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("inside", "outside of the strategy's scope"),
        ("optimizer", "The optimizer was made outside"),
        ("eager", "run_eagerly and jit_compile=True are not supported"),
        ("synchronized", "Received: batch_normalization"),
        ("loop", "wrap_step works on one device"),
    ],
)
def test_what_cannot_be_is_refused_by_name(found, case, words):
    assert words in of(found, "refusals")[case]
