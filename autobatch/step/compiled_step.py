"""The compiled steps of one model, on one device or on several replicas: what both of them offer.

An update is :meth:`CompiledStep.accumulate`, then :meth:`CompiledStep.apply`. A validation batch is
:meth:`CompiledStep.evaluate`, then :meth:`CompiledStep.evaluation_logs`. On replicas the second of each pair is a
collective, and the first is not. ``tests/step/test_contract.py`` holds both kinds to what is said here.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autobatch.differences.trace_findings import TraceFindings
from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.metrics.merged_logs import Logs
from autobatch.step.accumulators import Update
from autobatch.step.micro_step import MicroStep, Sink
from autobatch.step.update_room import UpdateReserve, guessed_bytes
from autobatch.tensors.batch_structure import Structure
from autobatch.tensors.snapshots import InGraphSnapshot
from autobatch.tensors.variables import distinct
from autobatch.types import Batch, ElementSpec, Model, Optimizer, Tensor, Variable

if TYPE_CHECKING:
    from typing_extensions import Self


class CompiledStep(abc.ABC):
    """The compiled steps of one model on data of one structure. Everything is traced at its first use.

    Args:
        model: a compiled Keras model.
        element_spec: describes a batch of any size, a nest of type specs.
    """

    def __init__(self, model: Model, element_spec: ElementSpec) -> None:
        self.model = model
        self.structure = Structure(element_spec)
        self.update_room = UpdateReserve()
        self.on_traced: Callable[[], None] = lambda: None
        """Is called when :attr:`traced` has changed."""
        self.on_optimizer_found: Callable[[], None] = lambda: None
        """Is called for an optimizer that nobody knew of, once it is built and before it has updated anything."""
        self._touched = TouchedVariables(model)
        self._touched.ignore(self.update_room.variables)
        self._micro: MicroStep | None = None
        self._findings = TraceFindings()

    @abc.abstractmethod
    def for_data(self, element_spec: ElementSpec) -> Self:
        """The steps of the same model on other data."""

    @abc.abstractmethod
    def prepare(self) -> bool:
        """Trace what :meth:`accumulate` and :meth:`apply` need; return True if anything was missing.

        Tracing builds what is not built yet and runs nothing. Afterwards :attr:`variables` is complete, but for eager
        models' optimizers that nobody knows of before they are applied.
        """

    @abc.abstractmethod
    def prepare_evaluation(self) -> bool:
        """Trace what :meth:`evaluate` needs; return True if anything was missing."""

    @abc.abstractmethod
    def accumulate(self, data: Batch, micro_batch: int) -> Any:
        """Sum the gradients of an effective batch, ``micro_batch`` samples at a time; no weight changes.

        Returns:
            Tensors that are there once all of it has run.
        """

    @abc.abstractmethod
    def apply(self) -> Logs:
        """Update the weights once with what :meth:`accumulate` summed; return the logs of the whole update."""

    @abc.abstractmethod
    def evaluate(self, data: Batch, micro_batch: int) -> Any:
        """Run ``model.test_step`` over a batch, ``micro_batch`` samples at a time.

        Returns:
            Tensors that are there once all of it has run.
        """

    @abc.abstractmethod
    def evaluation_logs(self) -> Logs:
        """Return the logs of the batch that :meth:`evaluate` has run."""

    @abc.abstractmethod
    def release_accumulators(self) -> None:
        """Let go of the accumulators, of their memory, and of what was traced with them."""

    @property
    @abc.abstractmethod
    def accumulators(self) -> list[Variable]:
        """The accumulators, in the order in which they were made."""

    @property
    @abc.abstractmethod
    def _updates(self) -> list[Update]:
        """The updates of the micro-step that was traced last."""

    @property
    @abc.abstractmethod
    def least_accumulator_bytes(self) -> int:
        """A lower bound on what a device's accumulators will take; known before anything is traced."""

    @property
    def copies(self) -> InGraphSnapshot | None:
        """What a step on a whole effective batch has changed before its update; None where there is no such step."""
        return None

    @property
    def tables_kept_as_rows(self) -> list[Variable]:
        """The embeddings' tables whose gradients are not summed but kept, a row for each token."""
        return []

    def update_has_begun(self) -> bool:
        """Return True if the step that has just failed came as far as its update: weights may have changed."""
        return self.update_room.has_begun()

    @property
    def traced(self) -> TraceFindings:
        """What the last trace of a training's micro-step has shown."""
        return self._findings if self._micro is None else self._micro.findings

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers known from the model, and those that a step was seen to apply."""
        return self._touched.optimizers

    @property
    def updating_optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers that the traced step applies; before, all that it could apply."""
        return tuple(update.optimizer for update in self._updates) or self.optimizers

    @property
    def variables(self) -> list[Variable]:
        """Every variable that a step traced so far can touch, accumulators apart."""
        return self._touched.variables

    @property
    def updated_variables(self) -> list[Variable]:
        """The variables that an optimizer's update changes: trainable weights and the optimizers' own."""
        return self._touched.updated_variables

    @property
    def changed_before_update(self) -> list[Variable]:
        """What a step can touch before its update or beside it: statistics, metrics, seeds, what a layer assigns."""
        return self._touched.changed_before_update

    @property
    def variables_written_by_micro_steps(self) -> list[Variable]:
        """What traced micro-steps write, accumulators apart; of the plain step, what it writes before its update."""
        return self._touched.written_variables

    @property
    def update_room_bytes(self) -> int:
        """What the optimizers' temporaries need; a guess before an update was traced."""
        return self.update_room.bytes or guessed_bytes(distinct(self.model.trainable_variables))

    def note_update(self, optimizer: Optimizer, gradients: list[Tensor], variables: list[Variable]) -> None:
        """Note that a step applies an optimizer, known or not, to these variables."""
        found = self._touched.note_update(optimizer, variables)
        self.update_room.note_gradients(gradients, variables)
        if found:
            self.on_optimizer_found()

    def _training_micro_step(self, sink: Sink, most_samples: int | None = None) -> MicroStep:
        return MicroStep(
            self.model,
            self.structure,
            self.model.train_step,
            self._touched,
            sink=sink,
            findings=self._findings,
            on_traced=lambda: self.on_traced(),
            most_samples=most_samples,
        )

    def _evaluating_micro_step(self, most_samples: int | None = None) -> MicroStep:
        step = self.model.test_step
        return MicroStep(self.model, self.structure, step, self._touched, sink=None, most_samples=most_samples)

    def _release_micro_step(self) -> None:
        if self._micro is not None:
            self._findings = self._micro.findings
            self._micro.release()
        self._micro = None
