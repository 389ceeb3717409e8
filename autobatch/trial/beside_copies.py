"""Trials of what training keeps on the device beside its steps: copies of the weights, to undo a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autobatch.memory import limits
from autobatch.recovery.keeper import Keeper, SnapshotPlace
from autobatch.recovery.out_of_memory import CAUGHT, memory_failure
from autobatch.step.compiled_step import CompiledStep
from autobatch.trial.timing import Timing


class BesideCopies:
    """Finder of whether a device has room for copies of the weights beside a step; if not, none are kept there."""

    def __init__(self, step: CompiledStep, keeper: Keeper, timing: Timing, device: str) -> None:
        self._step = step
        self._keeper = keeper
        self._timing = timing
        self._device = device
        self._tried: set[bool] = set()

    def given_up(self, whole: bool) -> bool:
        """Give up copies on the device if a step needed more memory beside them than there is.

        Return True if it did, so that the size is worth another trial. Training would recover in the same way.
        """
        if whole or not self._timing.ran_beside_copies or self._keeper.ran_out_beside_copies:
            return False
        if not self._step.update_has_begun():
            return False
        self._keeper.ran_out_beside_copies = True
        self._keeper.forget()
        return True

    def try_update(self, plain: Callable[[], Any] | None, is_over: Callable[[int | None], bool]) -> None:
        """Run an update beside the copies, once; if that is too much, training keeps none.

        An update needs the same at every micro-batch, so one run is enough. It is no part of a trial's peak.

        Args:
            plain: runs a whole effective batch; None for the update of accumulated gradients.
            is_over: tells of a peak, in bytes, if it is over the budget.
        """
        whole = plain is not None
        if whole in self._tried or self._keeper.ran_out_beside_copies:
            return
        if not whole and self._step.computes_between_updates(whole=False):
            return  # each trial has run beside them
        self._tried.add(whole)
        limits.reset_peak(self._device)
        try:
            kept = self._keeper.take(whole=False, proven=True)
            if kept.weights_at is SnapshotPlace.DEVICE:
                self._timing.seconds(plain or self._step.apply)
            kept.drop()
        except CAUGHT as error:
            memory_failure(error)
            self._keeper.ran_out_beside_copies = self._step.update_has_begun()
        else:
            self._keeper.ran_out_beside_copies = is_over(limits.peak_bytes(self._device))
        self._keeper.forget()
