"""Policy for the next step's micro-batch: smaller after running out of memory, larger after enough good steps.

A failure costs ten seconds or more. A good step at a size a little too small costs next to nothing more than one at the
best size. So the policy waits longer rather than risk a failure. Its rules hold below a ceiling that the search proved
or the user chose:

* Sizes are evened for the largest effective batch seen: of all sizes that need as many accumulation steps, only the
  smallest is tried. So each larger size that is tried saves at least one accumulation step.
* After a failure at ``b`` the next size is the largest that fits the free memory according to the memory model. It is
  three quarters of ``b`` if there is no model, or if by the model ``b`` itself should have fitted. From the second
  failure in a row on it is then half of ``b``. If the policy had just grown to ``b``, the next size is the one before,
  which is known to fit.
* On the way down a size that failed is passed over. On the way up, sizes between the present one and the smallest
  larger one that failed come first. Each is the middle between the two, at most twice the present one, and is tried
  after :data:`PATIENCE` good steps. If no size is left between them, the failed one is tried again after :data:`CALM`
  times as many good steps since the last failure. The cause of the failure may have given its memory back meanwhile.
  With each further failure of that size it is tried :data:`RARER` times more rarely: a limit that lasts costs a few
  failures in a training of any length, and one that goes away does not slow down the rest of it.
* Each failure but the first doubles the patience, :data:`MOST_DOUBLINGS` times at most, until the ceiling is reached.
* Where each size is compiled by itself, new sizes are those that divide the largest effective batch, if one of them is
  more than half of what may be tried: a size that leaves a remainder has to be compiled twice.
"""

from __future__ import annotations

from typing import Any

PATIENCE = 16
"""Good steps at one size before a larger one that has not failed yet is tried."""

CALM = 16
"""Multiple of the patience that must pass without a failure before a failed size is tried again."""

RARER = 16
"""Factor on that multiple for each failure of the size but the first."""

MOST_DOUBLINGS = 3
"""Most times that failures double the patience."""


def evened(micro_batch: int, samples: int) -> int:
    """Return the smallest micro-batch that needs as many accumulation steps for ``samples`` as this one."""
    if micro_batch >= samples:
        return samples
    steps = -(-samples // micro_batch)
    return -(-samples // steps)


def dividing(at_most: int, samples: int) -> int:
    """Return the largest size up to ``at_most`` that cuts ``samples`` into equal parts."""
    return next(size for size in range(min(at_most, samples), 0, -1) if samples % size == 0)


class MicroBatchPolicy:
    """Choice of the micro-batch by this module's rules; :attr:`micro_batch` is the size that the next step uses.

    ``begin_at`` is the first size, if a training before this one had to go below the ``ceiling``; None begins there.
    ``one_shape`` says that each size is compiled by itself.
    """

    def __init__(self, ceiling: int, *, begin_at: int | None = None, one_shape: bool = False) -> None:
        if ceiling < 1:
            raise ValueError(f"ceiling must be at least 1. Received: {ceiling!r}")
        self.ceiling = ceiling
        self._one_shape = one_shape
        self.micro_batch = ceiling if begin_at is None else max(1, min(begin_at, ceiling))
        self._samples = 1  # of the largest effective batch so far
        self._good_steps = 0  # at this size
        self._calm_steps = 0  # since the last failure
        self._failures_in_a_row = 0
        self._doublings = -1
        self._failures: dict[int, int] = {}
        self._grown_from: int | None = None  # until this size has proven itself

    def as_plain(self) -> dict[str, Any]:
        """Return all that this policy knows as plain values, for :meth:`continue_from`."""
        return {**vars(self), "_failures": [list(each) for each in self._failures.items()]}

    def continue_from(self, plain: dict[str, Any]) -> None:
        """Take over what another policy knew, unless it stood below another ceiling."""
        if plain["ceiling"] == self.ceiling:
            vars(self).update(plain, _failures=dict(plain["_failures"]))

    def succeeded(self, samples: int) -> None:
        """Take note that a step of ``samples`` went well at :attr:`micro_batch`."""
        self._samples = max(self._samples, samples)
        self._failures_in_a_row = 0
        if samples < self.micro_batch and samples < self._samples:
            return  # fewer samples than a micro-batch: nothing is learnt about its size
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
        """Return the size to use after a step of ``samples`` ran out of memory at ``tried``; None if one sample failed.

        ``fitting_now`` is the size that fits the free memory according to the memory model; None if it is unknown.
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

    def begin_below(self, died_at: int, *, samples: int) -> int:
        """Return the size to begin with, where a process before this one died at ``died_at``: a failure like others."""
        before = self.micro_batch
        after = self.failed(died_at, samples=samples, fitting_now=None) or 1
        return self._go_to(min(before, after))

    def below(self, died_at: int, *, samples: int) -> int:
        """Return the size that :meth:`begin_below` would give, and change nothing."""
        trial = MicroBatchPolicy(self.ceiling, one_shape=self._one_shape)
        trial.continue_from(self.as_plain())
        return trial.begin_below(died_at, samples=samples)

    def shrink(self, micro_batch: int | None = None) -> int | None:
        """Go to a size below ``micro_batch``, by default below the present one; return it, or None if there is none."""
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
        """Return the largest evened size up to ``at_most`` that has not failed yet; 1 if all have."""
        size = self._new_size(at_most)
        while size > 1 and size in self._failures:
            size = self._new_size(size - 1)
        return size

    def _new_size(self, at_most: int) -> int:
        if self._one_shape:
            size = dividing(at_most, self._samples)
            if 2 * size > at_most:
                return size
        return evened(at_most, self._samples)

    @property
    def _patience(self) -> int:
        return PATIENCE << max(0, self._doublings)

    def _larger(self) -> int | None:
        """Return the next larger size to try; None if there is none now."""
        steps = -(-self._samples // self.micro_batch)
        if steps == 1:
            return None
        next_larger = -(-self._samples // (steps - 1))
        if next_larger > self.ceiling:
            return None
        failed = min((size for size in self._failures if size > self.micro_batch), default=None)
        if failed is None:
            return evened(self.ceiling, self._samples)
        if next_larger < failed:
            middle = min((self.micro_batch + failed) // 2, 2 * self.micro_batch)
            new = self._new_size(middle)
            return new if new > self.micro_batch else max(next_larger, evened(middle, self._samples))
        calm = CALM * RARER ** (self._failures[failed] - 1)
        return next_larger if self._calm_steps >= calm * self._patience else None
