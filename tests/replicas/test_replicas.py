"""MirroredStrategy on logical CPU devices ends where a single device ends, whatever happens on one of them."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import nursery
import pytest

SCRIPT = Path(__file__).parents[1] / "integration" / "replicas_fit.py"
CASES = {
    2: (
        "weighted",
        "masked_losses",
        "losses_of_ones_own",
        "metrics_of_batches",
        "searched",
        "reduced_once",
        "a_smaller_device_decides",
        "a_slower_device_is_named",
        "out_of_memory_on_one_replica",
        "out_of_memory_in_the_update",
        "rolled_back_bit_for_bit",
        "running_averages",
        "other_data",
        "a_step_of_its_own",
        "an_optimizer_out_of_sight",
        "trainable_and_made_anew",
        "trained_twice",
        "refusals",
    ),
    4: ("weighted", "fewer_samples_than_replicas", "out_of_memory_on_one_replica", "running_averages"),
}


@functools.cache
def run(replicas):
    done = nursery.run(SCRIPT, replicas, *CASES[replicas])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def of(case, replicas=2):
    return run(replicas)[case]


def assert_as_on_one_device(result):
    assert result["weights"] < 1e-5
    assert result["history"] < 1e-5
    assert result["names"]
    assert result["alike"], "the replicas' weights differ"
    assert result["iterations"][0] == result["iterations"][1]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("replicas", [2, 4])
def test_weighted_losses_clipping_and_a_tail_that_does_not_divide(replicas):
    result = of("weighted", replicas)
    assert_as_on_one_device(result)
    assert result["plan"][2] == replicas
    assert result["recoveries"] == []


@pytest.mark.parametrize("replicas", [2, 4])
def test_running_averages_follow_the_samples_of_all_replicas(replicas):
    result = of("running_averages", replicas)
    assert result["names"][-2:] == ["moving_mean", "moving_variance"]
    assert max(result["errors"]) < 1e-5
    assert result["alike"], "the replicas' averages differ"


def test_a_tail_with_fewer_samples_than_replicas():
    assert_as_on_one_device(of("fewer_samples_than_replicas", 4))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_masked_losses_have_the_denominator_of_all_replicas(reduction):
    assert_as_on_one_device(of("masked_losses")[reduction])


def test_losses_of_ones_own_add_up_over_all_replicas():
    found = of("losses_of_ones_own")
    assert len(found) == 11
    for case, (weights, losses, alike) in found.items():
        assert alike, case
        assert weights < 1e-5, case
        assert losses < 1e-4, case


def test_a_metric_is_given_a_replicas_whole_share():
    result = of("metrics_of_batches")
    assert result["history"].keys() == result["expected"].keys()
    for name, values in result["expected"].items():
        assert result["history"][name] == pytest.approx(values, rel=1e-6, abs=1e-6), name
    assert result["said"] == []


def test_the_search_runs_on_all_replicas():
    result = of("searched")
    assert_as_on_one_device(result)
    assert result["plan"] == [10, 1, 2]


def test_an_update_reduces_once_whatever_the_number_of_micro_batches():
    result = of("reduced_once")
    # The gradients, and with them the few numbers that the metrics are made of.
    (size,) = result["sizes"]
    assert result["weights"] < size <= result["weights"] + 8


def test_a_smaller_device_decides():
    result = of("a_smaller_device_decides")
    assert_as_on_one_device(result)
    assert result["plan"][0] <= 4
    assert result["recoveries"] == []


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("micro_step", ["first", "middle", "last"])
def test_out_of_memory_on_one_replica_rolls_all_back(micro_step, replicas):
    result = of("out_of_memory_on_one_replica", replicas)[micro_step]
    assert_as_on_one_device(result)
    assert result["recoveries"] == [[1, "train", 2, 1]]


def test_out_of_memory_in_the_update_on_one_replica():
    result = of("out_of_memory_in_the_update")
    assert_as_on_one_device(result)
    assert len(result["recoveries"]) == 1


def test_rolling_back_restores_every_copy_bit_for_bit():
    result = of("rolled_back_bit_for_bit")
    assert result["same"]
    assert result["values"] > 40
    assert result["iterations"] == 1
    assert "Not even one sample fits" in result["message"]


def test_datasets_and_several_steps_to_an_execution():
    result = of("other_data")
    assert result["weights"] < 1e-5
    assert result["history"] < 1e-5


def test_a_train_step_of_ones_own_and_a_loss_scale():
    assert_as_on_one_device(of("a_step_of_its_own"))


def test_what_is_trainable_is_what_keras_takes_it_to_be():
    assert max(of("trainable_and_made_anew")) < 1e-6


@pytest.mark.parametrize("how", ["searched", "given"])
def test_a_second_training_traces_nothing_anew(how):
    result = of("trained_twice")[how]
    assert result["weights"] < 1e-5
    assert result["loss"] < 1e-5
    assert len(set(result["traces"])) == 1
    if how == "searched":
        assert result["why"].startswith("remembered from an earlier search of this model")


def test_an_optimizer_that_is_none_of_the_models_attributes():
    result = of("an_optimizer_out_of_sight")
    assert_as_on_one_device(result)
    assert result["unseen"] == result["iterations"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("inside", "outside of the strategy's scope"),
        ("optimizer", "The optimizer was made outside"),
        ("unseen_optimizer", "The optimizer was made outside.*Received: 'made_outside'"),
        ("unseen_weights", "can only update the model's own trainable weights.*'unseen', applied to .*second/kernel"),
        ("eager", "run_eagerly and jit_compile=True are not supported"),
        ("synchronized", "Received: batch_normalization"),
        ("loop", "wrap_step works on one device"),
    ],
)
def test_what_cannot_be_is_refused_by_name(case, words):
    assert re.search(words, of("refusals")[case])


def test_the_time_of_each_replica_is_told_and_the_slowest_is_named():
    details = of("a_slower_device_is_named")
    assert details
    for detail in details:
        assert "on CPU:0, " in detail
        assert detail.endswith("the slowest is CPU:1")
