"""What a search that finds nothing tells its user."""

from __future__ import annotations

import pytest

from autobatch.errors import NoFeasibleBatchError
from autobatch.memory.other_users import explain_pressure
from autobatch.records import Environment, Outcome, TrialResult
from autobatch.sizing import search_trials

GIB = 2**30


class FullCard:
    """Trials on a card that has no room for one sample."""

    environment = Environment("GPU:0", 8 * GIB, "all memory of a card", 7 * GIB, 0.05, "float32", False)
    largest_useful = 64
    fixed_bytes_hint = 6 * GIB
    model_name = "model"
    content = ""
    warnings = ()
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
