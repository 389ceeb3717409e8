"""Receiver of the gradients of micro-steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from autobatch.seams.optimizers import ApplyHandler
from autobatch.types import Tensor, Variable


class Sink(Protocol):
    """Receiver of gradients: the :class:`autobatch.step.accumulators.Accumulators` of one device or of several."""

    @property
    def variables(self) -> list[Variable]:
        """Variables that hold the sums."""

    def expect(self, variables: Iterable[Variable]) -> None:
        """Make the sums for variables that are sure to get gradients."""

    def capture(self, fraction: Tensor) -> ApplyHandler:
        """Return the handler that is called in place of an optimizer's ``apply``."""

    def settle(self) -> None:
        """Let go of sums that were made and are not used."""
