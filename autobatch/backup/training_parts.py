"""Parts of a training that a backup is taken of, and its place between two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autobatch.backup import variables
from autobatch.data import host_memory
from autobatch.data.effective_batches import EffectiveBatches
from autobatch.data.effective_iterator import EffectiveIterator
from autobatch.errors import warn
from autobatch.records import Report
from autobatch.recovery.abstract_transaction import AnyTransaction
from autobatch.seams import fitting, random_states
from autobatch.types import Model


@dataclass(frozen=True, slots=True)
class Training:
    """Parts of a training that a backup is taken of."""

    model: Model
    batches: EffectiveBatches
    transaction: AnyTransaction
    callbacks: list[Any]
    report: Report

    @property
    def variables(self) -> list[Any]:
        """Variables that decide how the training goes on."""
        return [*self.transaction.variables, *random_states.global_generator_variables()]

    @property
    def alike(self) -> list[Any]:
        """Variables among these that are the same on all replicas, in all processes: what the updates change."""
        return self.transaction.updated_variables

    def host_has_room(self) -> bool:
        """Return True if the host has room for a copy of the variables."""
        limit = host_memory.available()
        known = None if limit is None else limit.limit_bytes
        return known is None or variables.bytes_kept(self.variables, self.alike) <= known

    def warn_of_hidden_draws(self) -> None:
        """Warn of random numbers of the model's that no backup holds."""
        hidden = self.transaction.hidden_draws
        if hidden:
            warn(
                f"The model draws random numbers whose state cannot be read ({', '.join(hidden)}), so that they begin "
                "anew after a restart, and the end is not that of a training without one. Use keras.random with a "
                "keras.random.SeedGenerator, or a tf.random.Generator, in their place."
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Place between two steps: those of the epoch that were made, and those of the same pass in earlier epochs."""

    epoch: int
    steps: int
    earlier_steps: int
    length: int | None
    iterator: EffectiveIterator

    @classmethod
    def behind(cls, epoch_iterator: Any, epoch: int, steps: int, iterator: EffectiveIterator) -> Place:
        """Return the place behind so many ``steps`` of an epoch, as Keras's ``epoch_iterator`` has it now."""
        seen, length = fitting.steps_in_pass(epoch_iterator)
        return cls(epoch, steps, max(0, seen - steps), length, iterator)
