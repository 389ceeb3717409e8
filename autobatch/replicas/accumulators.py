"""The accumulators of several replicas: each replica sums its own gradients, on its own device."""

from __future__ import annotations

from collections.abc import Iterable

from autobatch.seams import strategies
from autobatch.seams.optimizers import ApplyHandler
from autobatch.step.accumulators import Accumulators, Update
from autobatch.tensors.variables import distinct
from autobatch.types import Tensor, Variable


class SumsByReplica:
    """Accumulators of this process's replicas. A trace goes to those of the replica that is being traced."""

    def __init__(self, of_each: list[Accumulators]) -> None:
        self.of_each = of_each

    @property
    def here(self) -> Accumulators:
        """Accumulators of the replica that is being traced."""
        return self.of_each[strategies.replica_here()]

    @property
    def variables(self) -> list[Variable]:
        return [variable for sums in self.of_each for variable in sums.variables]

    @property
    def updates(self) -> list[Update]:
        """The updates of a replica's last trace; they are the same on all."""
        return self.of_each[0].updates

    def expect(self, variables: Iterable[Variable]) -> None:
        expected = distinct(variables)
        for sums in self.of_each:
            sums.expect(expected)

    def capture(self, fraction: Tensor) -> ApplyHandler:
        return self.here.capture(fraction)

    def settle(self) -> None:
        for sums in self.of_each:
            sums.settle()

    def rest(self) -> None:
        for sums in self.of_each:
            sums.rest()

    def reserve(self) -> None:
        for sums in self.of_each:
            sums.reserve()

    def release(self) -> None:
        for sums in self.of_each:
            sums.release()
