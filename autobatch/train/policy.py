"""Which micro-batch the next step uses: smaller after running out of memory, larger again after enough good steps.

The rules, for a ceiling that the search proved (or that the user chose):

* After a failure at ``b`` the next size is the largest that the memory model says fits what is free now. Where there
  is no model, or it holds that ``b`` itself should have fitted, it is three quarters of ``b``, and half of it from the
  second failure in a row on: each failure waits ten seconds or more, so that a careful descent is the slow one.
* Sizes are evened out: of the sizes that need as many accumulation steps, the smallest, so that the last micro-batch
  is not much smaller than the others.
* After :data:`PATIENCE` good steps in a row the size is doubled, up to the ceiling. A size that fails after growing
  doubles the patience.
* A size that failed twice is not tried again, nor is anything above it.
"""

from __future__ import annotations

PATIENCE = 16
"""Good steps in a row before a larger micro-batch is tried."""

GIVE_UP_AFTER = 2
"""Failures of one size after which neither it nor a larger one is tried again."""


def evened(micro_batch: int, samples: int) -> int:
    """The smallest micro-batch that needs as many accumulation steps for ``samples`` as this one does."""
    if micro_batch >= samples:
        return samples
    steps = -(-samples // micro_batch)
    return -(-samples // steps)


class MicroBatchPolicy:
    """The state behind the rules above; ``micro_batch`` is the size that the next step uses."""

    def __init__(self, ceiling: int, *, patience: int = PATIENCE) -> None:
        if ceiling < 1:
            raise ValueError(f"ceiling must be at least 1. Received: {ceiling!r}")
        self.ceiling = ceiling
        self.micro_batch = ceiling
        self._patience = patience
        self._good_steps = 0
        self._failures_in_a_row = 0
        self._failures: dict[int, int] = {}
        self._barred: int | None = None

    def succeeded(self) -> None:
        """A step went well at :attr:`micro_batch`."""
        self._failures_in_a_row = 0
        if self.micro_batch >= self.ceiling:
            return
        self._good_steps += 1
        larger = self._larger()
        if self._good_steps >= self._patience and larger is not None:
            self.micro_batch = larger
            self._good_steps = 0

    def failed(self, tried: int, *, samples: int, fitting_now: int | None) -> int | None:
        """A step of ``samples`` ran out of memory at ``tried``; return the next size, None when one sample failed.

        ``fitting_now`` is what the memory model says fits what is free at this moment, None if it cannot say.
        """
        self._failures[tried] = self._failures.get(tried, 0) + 1
        self._failures_in_a_row += 1
        if self._good_steps == 0 and self._failures[tried] > 1:
            self._patience *= 2
        self._good_steps = 0
        if self._failures[tried] >= GIVE_UP_AFTER:
            self._barred = tried if self._barred is None else min(self._barred, tried)
        if tried <= 1:
            return None
        by_model = fitting_now if fitting_now is not None and 1 <= fitting_now < tried else None
        by_rule = tried * 3 // 4 if self._failures_in_a_row == 1 else tried // 2
        smaller = max(1, by_model if by_model is not None else by_rule)
        self.micro_batch = min(evened(smaller, samples), tried - 1)
        return self.micro_batch

    def _larger(self) -> int | None:
        larger = min(2 * self.micro_batch, self.ceiling)
        if self._barred is not None:
            larger = min(larger, self._barred - 1)
        return larger if larger > self.micro_batch else None
