"""Which micro-batch the next step uses: smaller after running out of memory, larger again after enough good steps.

A failure costs ten seconds or more, a good step at a size a little too small next to nothing. So failures are few, and
waiting is what they are avoided with. The rules, for a ceiling that the search proved (or that the user chose):

* Sizes are evened out for the largest effective batch seen: of the sizes that need as many accumulation steps, the
  smallest. No other is worth trying, so that each size tried saves at least one accumulation step.
* After a failure at ``b`` the next size is the largest that the memory model says fits what is free now. Where there
  is no model, or it holds that ``b`` itself should have fitted, it is three quarters of ``b``, and half of it from the
  second failure in a row on. Where ``b`` had just been grown to, it is the size before, which is known to fit.
* A size that failed is passed over on the way down. Growing back, sizes between the present one and the smallest
  larger one that failed come first, the middle of what is left at a time but at most twice the present one, each after
  :data:`PATIENCE` good steps at the one before. Only then, and once :data:`CALM` times as many steps have gone well
  since the last failure, is that one tried again: whatever took the memory may have given it back by then.
* Each failure but the first doubles the patience, :data:`MOST_DOUBLINGS` times at most, until the ceiling is reached.
* A size that failed twice is not tried again, nor is anything above it.
"""

from __future__ import annotations

PATIENCE = 16
"""Good steps at one size before a larger one is tried that has not failed yet."""

CALM = 16
"""Times the patience without a failure before a size that failed is tried again: that try is its last."""

MOST_DOUBLINGS = 3

GIVE_UP_AFTER = 2
"""Failures of one size after which neither it nor a larger one is tried again."""


def evened(micro_batch: int, samples: int) -> int:
    """The smallest micro-batch that needs as many accumulation steps for ``samples`` as this one does."""
    if micro_batch >= samples:
        return samples
    steps = -(-samples // micro_batch)
    return -(-samples // steps)


class MicroBatchPolicy:
    """The state behind the rules above; ``micro_batch`` is the size that the next step uses.

    ``begin_at`` is the first, where a training before this one had to go below the ceiling.
    """

    def __init__(self, ceiling: int, *, begin_at: int | None = None) -> None:
        if ceiling < 1:
            raise ValueError(f"ceiling must be at least 1. Received: {ceiling!r}")
        self.ceiling = ceiling
        self.micro_batch = ceiling if begin_at is None else max(1, min(begin_at, ceiling))
        self._samples = 1  # of the largest effective batch so far
        self._good_steps = 0  # at this size
        self._calm_steps = 0  # since the last failure
        self._failures_in_a_row = 0
        self._doublings = -1
        self._failures: dict[int, int] = {}
        self._grown_from: int | None = None  # until this size has proven itself

    def succeeded(self, samples: int) -> None:
        """A step of ``samples`` went well at :attr:`micro_batch`."""
        self._samples = max(self._samples, samples)
        self._failures_in_a_row = 0
        if samples < self.micro_batch and samples < self._samples:
            return  # fewer than a micro-batch: nothing is learnt about its size
        self._good_steps += 1
        self._calm_steps += 1
        if self._good_steps < self._patience:
            return
        self._grown_from = None
        larger = self._larger()
        if larger is not None:
            self._grown_from, self.micro_batch = self.micro_batch, larger
            self._good_steps = 0
        elif self.micro_batch >= evened(self.ceiling, self._samples):
            self._doublings = -1

    def failed(self, tried: int, *, samples: int, fitting_now: int | None) -> int | None:
        """A step of ``samples`` ran out of memory at ``tried``; return the next size, None when one sample failed.

        ``fitting_now`` is what the memory model says fits what is free at this moment, None if it cannot say.
        """
        self._samples = max(self._samples, samples)
        self._failures[tried] = self._failures.get(tried, 0) + 1
        self._failures_in_a_row += 1
        self._doublings = min(self._doublings + 1, MOST_DOUBLINGS)
        self._calm_steps = 0
        if tried <= 1:
            return None
        before, self._grown_from = self._grown_from, None
        if before is not None and before < tried:
            return self._go_to(before)
        if fitting_now is not None and 1 <= fitting_now < tried:
            return self._go_to(self._not_failed(fitting_now))
        return self.shrink(tried)

    def shrink(self, micro_batch: int | None = None) -> int | None:
        """Go to a size below ``micro_batch``, or below the present one; return it, None where there is none."""
        above = self.micro_batch if micro_batch is None else micro_batch
        if above <= 1:
            return None
        share = above * 3 // 4 if self._failures_in_a_row <= 1 else above // 2
        return self._go_to(self._not_failed(max(1, share)))

    def _go_to(self, micro_batch: int) -> int:
        self.micro_batch = micro_batch
        self._good_steps = 0
        return micro_batch

    def _not_failed(self, at_most: int) -> int:
        """The largest evened size up to this one that has not failed yet; 1 if all have."""
        size = evened(at_most, self._samples)
        while size > 1 and size in self._failures:
            size = evened(size - 1, self._samples)
        return size

    @property
    def _patience(self) -> int:
        return PATIENCE << max(0, self._doublings)

    def _larger(self) -> int | None:
        """The next size to try; None while there is none."""
        steps = -(-self._samples // self.micro_batch)
        if steps == 1:
            return None
        next_larger = -(-self._samples // (steps - 1))
        barred = min((size for size, times in self._failures.items() if times >= GIVE_UP_AFTER), default=None)
        top = self.ceiling if barred is None else min(self.ceiling, barred - 1)
        if next_larger > top:
            return None
        failed = min((size for size in self._failures if size > self.micro_batch), default=None)
        if failed is None:
            return evened(top, self._samples)
        if next_larger < failed:
            middle = min((self.micro_batch + failed) // 2, 2 * self.micro_batch)
            return max(next_larger, evened(middle, self._samples))
        return next_larger if self._calm_steps >= CALM * self._patience else None
