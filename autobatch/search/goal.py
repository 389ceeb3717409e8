"""Goal of a search, room that its trials may take, and limits of the search itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from autobatch.search.planning import require_objective


def _require_positive(**arguments: float | None) -> None:
    for name, value in arguments.items():
        # No upper bound, and 0 is no way to say "none": None is.
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, or None. Received: {value!r}")


@dataclass(frozen=True, slots=True)
class Goal:
    """The size that is looked for.

    Attributes:
        target_batch: The effective batch, None if there is none. With it, only the distinct ``ceil(target_batch / k)``
            are run.
        max_micro_batch: The largest size worth trying.
        objective: "throughput" or "largest".
        exact: Prove it: one more than the size returned (with a target: the next candidate) is run and fails.
        one_shape: Each size is compiled by itself, so that under the objective "throughput" sizes that divide the
            target are preferred (see :mod:`autobatch.search.planning`). One more of them may be run at the end, in
            place of what training would compile.

    Raises:
        ValueError: a number is not above 0, or the objective is unknown.
    """

    target_batch: int | None = None
    max_micro_batch: int | None = None
    objective: str = "throughput"
    exact: bool = False
    one_shape: bool = False

    def __post_init__(self) -> None:
        require_objective(self.objective)
        _require_positive(target_batch=self.target_batch, max_micro_batch=self.max_micro_batch)

    @property
    def by_speed(self) -> bool:
        """True if sizes that fit compete for speed."""
        return self.target_batch is not None and self.objective == "throughput"

    @property
    def prefers_divisors(self) -> bool:
        """True if sizes that divide the target go before others of their kind."""
        return self.one_shape and self.objective == "throughput" and not self.exact


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a trial may take, in bytes.

    Attributes:
        budget_bytes: Upper bound on a peak, None if unknown.
        headroom_bytes: Memory that the allocator has beside the budget; what it loses in pieces may be lost there.
        fixed_bytes_hint: A lower bound on every peak: weights, accumulators and optimizer slots. None if unknown.

    Raises:
        ValueError: the budget is not above 0, or another of them is negative.
    """

    budget_bytes: int | None
    headroom_bytes: int = 0
    fixed_bytes_hint: int | None = None

    def __post_init__(self) -> None:
        _require_positive(budget_bytes=self.budget_bytes)
        if self.headroom_bytes < 0:
            raise ValueError(f"headroom_bytes must not be negative. Received: {self.headroom_bytes!r}")
        if self.fixed_bytes_hint is not None and self.fixed_bytes_hint < 0:
            raise ValueError(f"fixed_bytes_hint must not be negative. Received: {self.fixed_bytes_hint!r}")

    def without_headroom(self) -> Room:
        """Return the same room with the headroom made part of the budget."""
        if self.budget_bytes is None:
            return self
        return dataclasses.replace(self, budget_bytes=self.budget_bytes + self.headroom_bytes, headroom_bytes=0)


@dataclass(frozen=True, slots=True)
class Limits:
    """The point at which a search ends with the best that was run.

    Attributes:
        max_trials: Most trials.
        max_seconds: Time after which no trial is started, other than the first. Needs ``clock``.
        clock: Function that returns seconds from any origin, like ``time.monotonic``.

    Raises:
        ValueError: a number is not above 0, or ``max_seconds`` has no clock.
    """

    max_trials: int | None = None
    max_seconds: float | None = None
    clock: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        _require_positive(max_trials=self.max_trials, max_seconds=self.max_seconds)
        if self.max_seconds is not None and self.clock is None:
            raise ValueError(
                f"max_seconds needs a clock, such as time.monotonic. Received: max_seconds={self.max_seconds!r}, "
                f"clock={self.clock!r}"
            )

    def begun(self) -> Callable[[int], str | None]:
        """Return a function that says which limit is reached after some trials, counted from now; None if none is."""
        started = 0.0 if self.clock is None else self.clock()

        def reached(trials: int) -> str | None:
            if self.max_trials is not None and trials >= self.max_trials:
                return f"limit of {self.max_trials} trial{'s' if self.max_trials > 1 else ''} reached"
            late = (
                self.max_seconds is not None and self.clock is not None and self.clock() - started >= self.max_seconds
            )
            return f"limit of {self.max_seconds:g} s reached" if late and trials else None

        return reached


NO_LIMITS = Limits()
"""A search that ends by itself."""
