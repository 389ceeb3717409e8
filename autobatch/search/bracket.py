"""Bracket of the answer, between a size that is proven to fit and one that is proven not to: a state machine.

Its job is to make it impossible to return, or to ask for, a size that the rules do not allow. It knows sizes and
outcomes only, neither bytes nor seconds, and does no I/O.

State: two sizes, both from ``candidates`` (ascending, each at least 1), either of them None until it is known::

    largest_fit  <  smallest_failure

    stage        largest_fit   smallest_failure   what is untried
    UNTRIED      None          None               every candidate
    ALL_FAILED   None          known              the candidates below smallest_failure
    ALL_FIT      known         None               the candidates above largest_fit
    BRACKETED    known         known              the candidates strictly between the two

    UNTRIED    --fits--> ALL_FIT      UNTRIED    --fails--> ALL_FAILED
    ALL_FIT    --fits--> ALL_FIT      ALL_FIT    --fails--> BRACKETED
    ALL_FAILED --fits--> BRACKETED    ALL_FAILED --fails--> ALL_FAILED
    BRACKETED  --fits--> BRACKETED    BRACKETED  --fails--> BRACKETED

Rules:

1. Only an untried candidate can be observed. Anything else raises ``ValueError`` and changes nothing: the state is
   frozen, and a transition returns a new one. So no size is run twice and the two sides never cross, whatever the
   memory curve looks like. Even where the curve is not monotone, the bracket closes on a size that fits, next to one
   that does not.
2. A size that fits becomes ``largest_fit``, one that does not becomes ``smallest_failure``; nothing else moves.
   Hence both sides have always been run.
3. Every transition makes ``untried`` strictly shorter. Where it is empty, the bracket is closed and nothing moves.
4. A size that ran out of time counts as one that does not fit: training with it would not get on either.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace


class Stage(enum.Enum):
    """The sides of a bracket that are known."""

    UNTRIED = "untried"
    ALL_FAILED = "all_failed"
    ALL_FIT = "all_fit"
    BRACKETED = "bracketed"


@dataclass(frozen=True, slots=True)
class Bracket:
    """The proven sides among ``candidates``, which ascend: a ``range``, or the sizes that are useful for a target."""

    candidates: Sequence[int]
    largest_fit: int | None = None
    smallest_failure: int | None = None

    def __post_init__(self) -> None:
        if not self.candidates or self.candidates[0] < 1:
            raise ValueError(f"candidates must be sizes of at least 1. Received: {self.candidates!r}")
        for name in ("largest_fit", "smallest_failure"):
            side = getattr(self, name)
            if side is not None and not self._is_candidate(side):
                raise ValueError(f"{name} must be one of the candidates. Received: {side!r}")
        if (
            self.largest_fit is not None
            and self.smallest_failure is not None
            and self.largest_fit >= self.smallest_failure
        ):
            raise ValueError(
                "largest_fit must be below smallest_failure. "
                f"Received: largest_fit={self.largest_fit!r}, smallest_failure={self.smallest_failure!r}"
            )

    @property
    def stage(self) -> Stage:
        """The sides that are known."""
        if self.largest_fit is None:
            return Stage.UNTRIED if self.smallest_failure is None else Stage.ALL_FAILED
        return Stage.ALL_FIT if self.smallest_failure is None else Stage.BRACKETED

    @property
    def untried(self) -> Sequence[int]:
        """The candidates that may still be run, ascending."""
        start = 0 if self.largest_fit is None else bisect_right(self.candidates, self.largest_fit)
        if self.smallest_failure is None:
            return self.candidates[start:]
        return self.candidates[start : bisect_left(self.candidates, self.smallest_failure)]

    @property
    def is_closed(self) -> bool:
        """True if nothing is left to run: the largest fit is the top, or the next candidate failed, or all failed."""
        return not self.untried

    def floor(self, micro_batch: int) -> int:
        """Return the largest untried candidate that is at most ``micro_batch``, else the smallest untried one.

        Raises:
            ValueError: the bracket is closed.
        """
        untried = self.untried
        if not untried:
            raise ValueError(f"the bracket is closed, nothing is left to run. Received: {micro_batch!r}")
        return untried[max(0, bisect_right(untried, micro_batch) - 1)]

    def observe(self, micro_batch: int, *, fits: bool) -> Bracket:
        """Return the bracket after ``micro_batch`` was run.

        Raises:
            ValueError: it is not an untried candidate (rule 1).
        """
        untried = self.untried
        index = bisect_left(untried, micro_batch)
        if index == len(untried) or untried[index] != micro_batch:
            raise ValueError(
                f"only an untried candidate between {self.largest_fit} (fits) and {self.smallest_failure} (does not) "
                f"can be observed. Received: {micro_batch!r}"
            )
        return replace(self, largest_fit=micro_batch) if fits else replace(self, smallest_failure=micro_batch)

    def _is_candidate(self, micro_batch: int) -> bool:
        index = bisect_left(self.candidates, micro_batch)
        return index < len(self.candidates) and self.candidates[index] == micro_batch
