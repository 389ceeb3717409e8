"""Moves that a search may make, terms that it was asked for, and what both ways of choosing a size share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autobatch.records import SampleEstimate
from autobatch.search.bracket import Bracket

CLOSE_TO_PREDICTION = 0.9725
"""Share of the largest size that is predicted to fit at which the search stops, unless it is exact. The prediction may
itself be a little low."""

COARSE = 1.1
"""Factor between two candidates from which on the larger is worth a risk: it makes fewer accumulation steps."""


@dataclass(frozen=True, slots=True)
class Run:
    """The move to run an untried candidate."""

    micro_batch: int


@dataclass(frozen=True, slots=True)
class Measure:
    """The move to run a size for its peak alone, although a larger one fits already."""

    micro_batch: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The move to end the search; ``reason`` is a short sentence for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class SearchTerms:
    """The terms of a search. ``top_name`` names the largest candidate in the reason for stopping.

    ``replayed`` is the largest size that fits in a replay of the last trial that recorded its allocations; None if
    there is none that is believed. ``in_parallel`` is True if operations ran side by side in that trial, and
    ``is_compiled`` if nearly all that it asked for was one block of a compiled program.
    """

    budget_bytes: int | None
    fixed_bytes_hint: int
    exact: bool
    top_name: str
    unlimited: bool = False
    estimate: SampleEstimate | None = None
    headroom_bytes: int = 0
    replayed: int | None = None
    in_parallel: bool = False
    is_compiled: bool = False


def size_between(bracket: Bracket, low: int, high: int) -> int:
    """Bisect by ratio while the sides are far apart, then by count."""
    if high > 2 * low:
        return bracket.floor(math.isqrt(low * high))
    return bracket.untried[(len(bracket.untried) - 1) // 2]
