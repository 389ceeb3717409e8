"""Interface of one model's compiled steps, on one device or on several replicas.

An update is :meth:`CompiledStep.accumulate`, then :meth:`CompiledStep.apply`. A validation batch is
:meth:`CompiledStep.evaluate`, then :meth:`CompiledStep.evaluation_logs`. On replicas the second of each pair is a
collective, and the first is not. ``tests/step/test_contract.py`` tests both implementations against this interface.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from autobatch.differences.trace_findings import TraceFindings
from autobatch.graphs import row_numbers
from autobatch.graphs.touched_variables import TouchedVariables
from autobatch.metrics.merged_logs import Logs
from autobatch.seams import gradients, models
from autobatch.seams.summaries import SummaryTurn
from autobatch.seams.trainable import TrainableState
from autobatch.step.accumulators import Update
from autobatch.step.micro_step import MicroStep
from autobatch.step.sink import Sink
from autobatch.step.update_room import UpdateReserve, guessed_bytes
from autobatch.tensors.batch_structure import Structure
from autobatch.tensors.snapshots import InGraphSnapshot, SnapshotTaker
from autobatch.tensors.variables import distinct
from autobatch.types import Batch, ElementSpec, Graph, Model, Optimizer, Tensor, Variable

if TYPE_CHECKING:
    from typing_extensions import Self


class CompiledStep(abc.ABC):
    """Compiled steps of one model on data of one structure. Everything is traced at its first use.

    Args:
        model: a compiled Keras model.
        element_spec: describes a batch of any size, a nest of type specs.
    """

    def __init__(self, model: Model, element_spec: ElementSpec) -> None:
        self.model = model
        self.structure = Structure(element_spec)
        self.update_room = UpdateReserve()
        self.summaries = SummaryTurn(lambda: bool(model.jit_compile))
        self.on_traced: Callable[[], None] = lambda: None
        """Callback for a change of :attr:`traced`."""
        self.on_optimizer_found: Callable[[], None] = lambda: None
        """Callback for an optimizer unknown before; called once it is built, before it updates anything."""
        self._touched = TouchedVariables(model)
        self._touched.ignore(self.update_room.variables)
        self._touched.on_graph = self._look_for_rows
        self.cannot_be_cut = ""
        """Reason, with the user's line, for which batches can be neither cut nor joined; empty if none was traced."""
        self._micro: MicroStep | None = None
        self._findings = TraceFindings()
        self.trained_as: TrainableState | None = None
        """State of the model that steps are traced in; None takes the present one."""
        self.kept_under: tuple[Any, Any] | None = None
        """Keeper of this step for the next training, a :class:`.kept_steps.KeptSteps`, and its key there, or None."""
        self.findings_kept: dict[Any, Any] = {}
        """Findings of trials with this step, for the next training, by their conditions."""
        self.evaluations: dict[str, Self] = {}
        """Steps for validation data, by the structure of the data."""
        self.recorders: dict[Any, SnapshotTaker] = {}
        """Makers of snapshots of this step's variables, by what they are for."""

    @abc.abstractmethod
    def for_data(self, element_spec: ElementSpec) -> Self:
        """Return the steps of the same model for data of another structure."""

    def renewed(self) -> Self:
        """Return steps of the same model and data, to be traced anew."""
        return self.for_data(self.structure.given_spec)

    @abc.abstractmethod
    def prepare(self) -> bool:
        """Trace what :meth:`accumulate` and :meth:`apply` need; return True if anything was missing.

        Tracing builds what is not built yet and runs nothing. Afterwards :attr:`variables` is complete, except for
        optimizers of an eager model that are unknown until they are applied.
        """

    @abc.abstractmethod
    def prepare_evaluation(self) -> bool:
        """Trace what :meth:`evaluate` needs; return True if anything was missing."""

    @abc.abstractmethod
    def accumulate(self, data: Batch, micro_batch: int) -> Any:
        """Sum the gradients of an effective batch, ``micro_batch`` samples at a time; no weight changes.

        If the step updates more than once, this makes all of its updates but the last.

        Returns:
            Tensors that have a value once all of it has run.
        """

    @abc.abstractmethod
    def apply(self) -> Logs:
        """Update the weights with what :meth:`accumulate` summed; return the logs of the whole effective batch."""

    @abc.abstractmethod
    def evaluate(self, data: Batch, micro_batch: int) -> Any:
        """Run ``model.test_step`` over a batch, ``micro_batch`` samples at a time.

        Returns:
            Tensors that have a value once all of it has run.
        """

    @abc.abstractmethod
    def evaluation_logs(self) -> Logs:
        """Return the logs of the batch that :meth:`evaluate` has run."""

    @abc.abstractmethod
    def release_accumulators(self) -> None:
        """Let go of the accumulators, their memory, and the functions traced with them."""

    def rest(self) -> bool:
        """Let go of memory and keep the traces, for the next training; return False if that is not possible."""
        return False

    def evaluation_for(self, element_spec: ElementSpec) -> Self:
        """Return the step for validation data of another structure, which is kept with this one."""
        key = repr(element_spec)
        if key not in self.evaluations:
            self.evaluations[key] = self.for_data(element_spec)
            self.evaluations[key].trained_as = self.trained_as
        return self.evaluations[key]

    @contextlib.contextmanager
    def _traced_as(self) -> Iterator[None]:
        """Put the model into the state in which its steps are traced; no trace outlives this step."""
        if self.model.run_eagerly:
            yield
            return
        as_trained = contextlib.nullcontext() if self.trained_as is None else self.trained_as.restored()
        with gradients.registered_while_alive(self), as_trained:
            yield

    @property
    @abc.abstractmethod
    def accumulators(self) -> list[Variable]:
        """Accumulators, in the order in which they were made."""

    @property
    @abc.abstractmethod
    def _updates(self) -> list[Update]:
        """Updates of the micro-step that was traced last."""

    @property
    @abc.abstractmethod
    def least_accumulator_bytes(self) -> int:
        """Lower bound on the bytes that a device's accumulators will take; known before anything is traced."""

    @property
    def copies(self) -> InGraphSnapshot | None:
        """Copies of what a step on a whole effective batch changes before its update; None if there are none."""
        return None

    @property
    def tables_kept_as_rows(self) -> list[Variable]:
        """Embedding tables whose gradients are not summed but kept, a row for each token."""
        return []

    def update_has_begun(self) -> bool:
        """Return True if the step that has just failed had begun its update, so that weights may have changed."""
        return self.update_room.has_begun()

    @property
    def traced(self) -> TraceFindings:
        """Findings from the last trace of a training's micro-step."""
        return self._findings if self._micro is None else self._micro.findings

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Optimizers known from the model, and those that a step was seen to apply."""
        return self._touched.optimizers

    @property
    def updating_optimizers(self) -> tuple[Optimizer, ...]:
        """Optimizers that the traced step applies, each once; before the trace, all known ones."""
        applied = {id(update.optimizer): update.optimizer for update in self._updates}
        return tuple(applied.values()) or self.optimizers

    def computes_between_updates(self, *, whole: bool) -> bool:
        """Return True if a forward and backward pass may follow an update, within the same step.

        ``whole`` asks for the step on a whole effective batch, else for the accumulated one.
        """
        return whole and len(self.updating_optimizers) > 1

    @property
    def variables(self) -> list[Variable]:
        """Variables that the steps traced so far can touch, accumulators apart."""
        return self._touched.variables

    @property
    def hidden_draws(self) -> list[str]:
        """Types of operations in the traced steps whose random numbers come from no variable."""
        return self._touched.hidden_draws

    @property
    def updated_variables(self) -> list[Variable]:
        """Variables that an optimizer's update changes: trainable weights and the optimizers' own."""
        return self._touched.updated_variables

    @property
    def changed_before_update(self) -> list[Variable]:
        """Variables that a step can touch outside of its update: statistics, metrics, seeds, those a layer assigns."""
        return self._touched.changed_before_update

    @property
    def variables_written_by_micro_steps(self) -> list[Variable]:
        """Variables that traced micro-steps write, accumulators apart, or the plain step writes before its update."""
        return self._touched.written_variables

    @property
    def update_room_bytes(self) -> int:
        """Bytes that the optimizers' temporaries need; a guess until an update was traced."""
        return self.update_room.bytes or guessed_bytes(distinct(self.model.trainable_variables))

    def _look_for_rows(self, graph: Graph) -> None:
        if not self.cannot_be_cut and not self.structure.takes_elements_whole:
            self.cannot_be_cut = row_numbers.taken_by_number(graph, self.structure.specs)

    def note_update(self, optimizer: Optimizer, gradients: list[Tensor], variables: list[Variable]) -> None:
        """Note that a step applies an optimizer, known before or not, to these variables."""
        found = self._touched.note_update(optimizer, variables)
        self.update_room.note_gradients(gradients, variables)
        if found:
            self.on_optimizer_found()

    def _training_micro_step(self, sink: Sink, most_samples: int | None = None, each: int | None = None) -> MicroStep:
        return MicroStep(
            self.model,
            self.structure,
            self.summaries.once(models.untraced(self.model.train_step)),
            self._touched,
            sink=sink,
            findings=self._findings,
            on_traced=lambda: self.on_traced(),
            most_samples=most_samples,
            each=each,
        )

    def _evaluating_micro_step(self, most_samples: int | None = None, each: int | None = None) -> MicroStep:
        return MicroStep(
            self.model,
            self.structure,
            self.summaries.once(models.untraced(self.model.test_step)),
            self._touched,
            sink=None,
            most_samples=most_samples,
            each=each,
        )

    def _release_micro_step(self) -> None:
        if self._micro is not None:
            self._findings = self._micro.findings
            self._micro.release()
        self._micro = None
