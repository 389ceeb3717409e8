"""What a search may do next, what it was asked for, and what both ways of choosing a size share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autobatch.records import SampleEstimate
from autobatch.search.bracket import Bracket

CLOSE_TO_PREDICTION = 0.9725
"""The same where "can fit" is only predicted, which may itself be a little low."""

COARSE = 1.1
"""Candidates this factor apart are worth a risk: the next one makes fewer accumulation steps."""


@dataclass(frozen=True, slots=True)
class Run:
    """Run this untried candidate."""

    micro_batch: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Run this size for its peak alone; a larger one fits already."""

    micro_batch: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing more to run; ``reason`` is a short sentence for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Terms:
    """What a search was asked for. ``top_name`` names the largest candidate in the reason for stopping.

    ``replayed`` is the largest size that fits where the allocations of the last trial that recorded them are replayed.
    """

    budget_bytes: int | None
    fixed_bytes_hint: int
    exact: bool
    top_name: str
    unlimited: bool = False
    estimate: SampleEstimate | None = None
    headroom_bytes: int = 0
    replayed: int | None = None


def between(bracket: Bracket, low: int, high: int) -> int:
    """Bisect by ratio while the sides are far apart, then by count."""
    if high > 2 * low:
        return bracket.floor(math.isqrt(low * high))
    return bracket.untried[(len(bracket.untried) - 1) // 2]
