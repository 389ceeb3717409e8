"""The state machine, enumerated: every state that five candidates can reach, every observation in it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from autobatch.search.bracket import Bracket, Stage

CANDIDATES = (1, 2, 5, 9, 10)


def all_states() -> list[Bracket]:
    sides = [None, *CANDIDATES]
    return [
        Bracket(CANDIDATES, low, high)
        for low, high in itertools.product(sides, sides)
        if low is None or high is None or low < high
    ]


def test_the_stage_tells_which_sides_are_known() -> None:
    for state in all_states():
        known = (state.largest_fit is not None, state.smallest_failure is not None)
        expected = {
            (False, False): Stage.UNTRIED,
            (True, False): Stage.ALL_FIT,
            (False, True): Stage.ALL_FAILED,
            (True, True): Stage.BRACKETED,
        }
        assert state.stage is expected[known]


def test_every_legal_transition_moves_one_side_and_shortens_what_is_untried() -> None:
    for state in all_states():
        for micro_batch in state.untried:
            fitted = state.observe(micro_batch, fits=True)
            assert (fitted.largest_fit, fitted.smallest_failure) == (micro_batch, state.smallest_failure)
            failed = state.observe(micro_batch, fits=False)
            assert (failed.largest_fit, failed.smallest_failure) == (state.largest_fit, micro_batch)
            assert len(fitted.untried) < len(state.untried)
            assert len(failed.untried) < len(state.untried)


@pytest.mark.parametrize("fits", [True, False])
def test_every_illegal_transition_raises_and_changes_nothing(fits: bool) -> None:
    for state in all_states():
        before = dataclasses.astuple(state)
        for micro_batch in set(range(-1, 13)) - set(state.untried):
            with pytest.raises(ValueError, match=f"Received: {micro_batch}"):
                state.observe(micro_batch, fits=fits)
            assert dataclasses.astuple(state) == before


def test_a_state_cannot_be_assigned_to() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bracket(CANDIDATES).largest_fit = 5  # type: ignore[misc]


def test_floor_is_the_largest_untried_candidate_that_is_not_above() -> None:
    for state in all_states():
        for micro_batch in range(13):
            if state.is_closed:
                with pytest.raises(ValueError, match="closed"):
                    state.floor(micro_batch)
                continue
            expected = max((size for size in state.untried if size <= micro_batch), default=state.untried[0])
            assert state.floor(micro_batch) == expected


@pytest.mark.parametrize(
    ("candidates", "low", "high"),
    [((), None, None), ((0, 1), None, None), ((1, 2), 3, None), ((1, 2), None, 0), ((1, 2), 2, 1), ((1, 2), 2, 2)],
)
def test_an_impossible_state_cannot_be_made(candidates: tuple[int, ...], low: int | None, high: int | None) -> None:
    with pytest.raises(ValueError, match="Received:"):
        Bracket(candidates, low, high)


def test_a_range_of_a_million_candidates_costs_nothing() -> None:
    state = Bracket(range(1, 2**20 + 1)).observe(8, fits=True).observe(1000, fits=False)
    assert state.untried == range(9, 1000)
