"""Reports of a search over trials made by hand: what is said where nothing fits, and the plan for several replicas."""

from __future__ import annotations

import pytest

from autobatch.errors import NoFeasibleBatchError
from autobatch.memory.other_users import explain_pressure
from autobatch.records import Environment, Outcome, Plan, TrialResult
from autobatch.sizing import search_trials

GIB = 2**30


class FullCard:
    """Trials on a card that has no room for one sample."""

    environment = Environment("GPU:0", 8 * GIB, "all memory of a card", 7 * GIB, 0.05, "float32", False)
    largest_useful = 64
    fixed_bytes_hint = 6 * GIB
    model_name = "model"
    content = ""
    warnings = notes = ()
    host_uses = ()
    replicas = 1

    def estimate_sample(self):
        return None

    def run(self, request):
        return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY, requested_bytes=3 * GIB)

    def close(self):
        pass


def test_what_else_takes_the_memory_is_named():
    with pytest.raises(NoFeasibleBatchError) as raised:
        search_trials.search_with(FullCard(), target_batch=64)
    message = str(raised.value)
    assert "it needs at least 9 GiB, and the limit is 8 GiB (all memory of a card), of which 5% is" in message
    causes = explain_pressure("GPU:0")
    assert message.endswith(" ".join(["fewer slots.", *causes]))
    assert (raised.value.needed_bytes, raised.value.limit_bytes) == (9 * GIB, 8 * GIB)


def test_what_is_held_and_asked_for_is_said_where_it_is_less_than_the_limit():
    trials = FullCard()
    trials.fixed_bytes_hint = 2 * GIB
    with pytest.raises(NoFeasibleBatchError) as raised:
        search_trials.search_with(trials, target_batch=64)
    message = str(raised.value)
    assert (
        "fits on GPU:0: it ran out of memory, and the limit is 8 GiB (all memory of a card), of which 5% is headroom. "
        "Of that weights, optimizer and what else is held take at least 2 GiB, and the allocation that failed asked "
        "for 3 GiB more; the rest is other tensors, or free in pieces too small. Free memory, raise the limit"
    ) in message
    assert "needs at least" not in message


def test_a_search_that_was_stopped_too_early_does_not_say_that_nothing_fits():
    trials = FullCard()
    trials.run = lambda request: TrialResult(
        request.micro_batch, Outcome.OUT_OF_MEMORY if request.micro_batch > 2 else Outcome.FITS
    )
    with pytest.raises(NoFeasibleBatchError, match=r"was stopped \(limit of 1 trial reached\); the smallest .* is 8\."):
        search_trials.search_with(trials, target_batch=64, max_trials=1)


@pytest.mark.parametrize(
    ("replicas", "target_batch", "plan"),
    [
        (1, 64, Plan(64, 1, 64)),
        (1, 100, Plan(64, 1, 64)),  # more than there is to train on
        (2, 100, Plan(50, 1, 100, 2)),
        (2, 128, Plan(64, 1, 128, 2)),
        (2, 200, Plan(64, 1, 128, 2)),
        (2, None, None),
    ],
)
def test_sizes_are_those_of_one_replica_and_the_target_is_that_of_all(replicas, target_batch, plan):
    trials = FullCard()
    trials.replicas = replicas
    trials.run = lambda request: TrialResult(request.micro_batch, Outcome.FITS, step_seconds=1.0, apply_seconds=0.1)
    report = search_trials.search_with(trials, target_batch=target_batch)
    assert report.plan == plan
    assert max(trial.micro_batch for trial in report.trials) == (50 if target_batch == 100 and replicas == 2 else 64)
