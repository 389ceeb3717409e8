"""Findings from tracing a micro-step: which parts of the user's code may differ under accumulation.

A loss is exact if the graph shows how it is made of the samples (:mod:`autobatch.losses.loss_terms`) and no sample
depends on the others. A gradient is exact if nothing but linear operations lies between the tape and the optimizer.
The sentences on everything else are in :mod:`autobatch.differences.rules`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from autobatch.graphs import draws, linearity, writes
from autobatch.graphs.dependence import Dependence
from autobatch.tensors.variables import components
from autobatch.types import Layer, Optimizer, Tensor, Variable


class TraceFindings:
    """Findings about one micro-step, filled while it is traced. An eager step fills in what needs no graph."""

    def __init__(self) -> None:
        self.scalar_metrics: tuple[str, ...] = ()
        """Names of metrics that make one number of a batch which is not known to be a mean."""
        self.updated_in_parts: dict[str, str] = {}
        """Metrics that may be no sums over samples, and are updated with each micro-batch: name to reason."""
        self.loose_logs: tuple[str, ...] = ()
        """Names of returned values that may not be the effective batch's; an empty string for one without a name."""
        self.held_sample_bytes = 0
        """Bytes kept for each sample until the effective batch ends, for metrics that must see it whole."""
        self.applied: list[Any] = []
        """Optimizers that were applied, in order."""
        self.adding_layers: list[Any] = []
        """Layers that called ``add_loss`` with a value that depends on the data."""
        self.changed_for: list[Any] = []
        """Optimizers whose gradients were changed, other than linearly, between the tape and ``apply``."""
        self.comparing = ""
        """Name of an operation that combines samples of a batch on the way to the differentiated value."""
        self.mixed: frozenset[str] = frozenset()
        """Names of operations that made a sample depend on the others of its batch."""
        self.untold = ""
        """Name of the operation that hides how a loss is made of the samples."""
        self.is_told = False
        """True if the graph shows how every differentiated value is made of the samples."""
        self.draws: tuple[draws.Draw, ...] | None = None
        """Random draws that a trace or an eager micro-batch has shown; None before."""
        self.settled: list[Any] = []
        """Handles of variables whose assignments make no difference from the second micro-batch on."""
        self.sees_updates: bool | None = None
        """True if code after an optimizer's ``apply`` reads a variable that it changed; None if not known."""
        self.repeated_rows: list[Any] | None = None
        """Tables whose gradients have a row for each look-up, and may repeat a row; None if not known."""
        self._applied_at: list[tuple[Any, int, list[Any]]] = []
        self._takes_gradients_after_an_update = False
        self.once_an_update: list[Any] = []
        """Keras variables assigned once, after the last micro-batch (:mod:`autobatch.averages.running_averages`)."""
        self.averaged_apart: tuple[str, ...] = ()
        """Paths of those variables whose statistics the step itself computes with."""
        self.differentiated: list[Any] = []
        """Values that tapes have differentiated, kept only as long as the graph."""
        self._gradients: list[Tensor] = []
        self._on_arguments: dict[Any, bool] = {}

    def note_dependence(self, found: Dependence) -> None:
        """Note the dependence of a loss, or of a value that a step differentiates or reports."""
        self.mixed |= found.mixed
        if found.unknown and not found.compares and not self.untold:
            self.untold = found.unknown
        if found.compares and not self.comparing:
            self.comparing = found.unknown.partition(" ")[0]

    def note_added_loss(self, layer: Layer, losses: Any) -> None:
        """Note that a layer calls ``add_loss``."""
        parts = [part for part in tf.nest.flatten(losses) if tf.is_tensor(part)]
        exact = [part for part in parts if _is_symbolic(part) and not self._depends_on_data(part)]
        if len(exact) < len(parts) and all(layer is not known for known in self.adding_layers):
            self.adding_layers.append(layer)

    def note_differentiated(self, target: Any, gradients: Any) -> None:
        """Note what a tape differentiated and what it returned."""
        self._takes_gradients_after_an_update |= bool(self.applied)
        parts = [part for part in tf.nest.flatten(target) if tf.is_tensor(part)]
        self.differentiated += [part for part in parts if _is_symbolic(part)]
        if all(_is_symbolic(part) for part in parts):
            self.is_told = not self.untold
            if self.untold and not self.comparing:
                operations = map(linearity.comparing_operation, parts)
                self.comparing = next((each.name for each in operations if each is not None), "")
        self._gradients += [part for part in _dense_parts(gradients) if _is_symbolic(part)]

    def note_applied(self, optimizer: Optimizer, gradients: list[Tensor], variables: list[Variable]) -> None:
        """Note the gradients that an optimizer is given, and the variables that they belong to."""
        self.applied.append(optimizer)
        if not tf.executing_eagerly():
            self._note_place(gradients, variables)
        given = [part for part in _dense_parts(gradients) if _is_symbolic(part)]
        if not self._gradients or not given:
            return
        following = linearity.what_follows(self._gradients)
        for part in given:
            operation = linearity.not_linear_in(part, self._gradients, lambda each: id(each) not in following)
            # The inside of a function is not examined.
            if operation is not None and not operation.type.endswith("PartitionedCall"):
                if all(optimizer is not known for known in self.changed_for):
                    self.changed_for.append(optimizer)
                return

    def _note_place(self, gradients: list[Tensor], variables: list[Variable]) -> None:
        graph = tf.compat.v1.get_default_graph()
        self._applied_at.append((graph, len(graph.get_operations()), variables))
        rows = [
            variable
            for gradient, variable in zip(gradients, variables, strict=True)
            if isinstance(gradient, tf.IndexedSlices) and not linearity.are_distinct(gradient.indices)
        ]
        self.repeated_rows = [*(self.repeated_rows or []), *components(rows)]

    def note_end(self, logs: Any) -> None:
        """Note what can be seen only after the step has returned these logs."""
        if tf.executing_eagerly():
            self.sees_updates = None if self._takes_gradients_after_an_update else False
            return
        graph = tf.compat.v1.get_default_graph()
        self.draws = draws.draws_of(graph, tf.nest.flatten(logs, expand_composites=True))
        if any(each is not graph for each, _, _ in self._applied_at):
            return  # applied in a function of the user's: what comes before and after is not known
        self.sees_updates = any(
            writes.is_read_after(graph, variables, position) for _, position, variables in self._applied_at[:-1]
        )
        updated = [variable for _, _, variables in self._applied_at for variable in variables]
        applied_at = min((position for _, position, _ in self._applied_at), default=0)
        self.settled = writes.settled_handles(graph, updated, applied_at)

    def _depends_on_data(self, tensor: Tensor) -> bool:
        return linearity.depends_on_arguments(tensor, self._on_arguments)

    def take_over(self, other: TraceFindings) -> None:
        """Take over the findings on losses from ``other``, a trace of the same code."""
        self.mixed, self.untold, self.is_told = other.mixed, other.untold, other.is_told
        self.comparing, self.adding_layers = other.comparing, other.adding_layers

    def forget_tensors(self) -> None:
        """Let go of the graph, and keep the findings."""
        self._gradients, self._on_arguments, self._applied_at, self.differentiated = [], {}, [], []


def _dense_parts(gradients: Any) -> list[Any]:
    parts = tf.nest.flatten(gradients)
    return [part.values if isinstance(part, tf.IndexedSlices) else part for part in parts if part is not None]


def _is_symbolic(tensor: Tensor) -> bool:
    return isinstance(tensor, tf.Tensor) and hasattr(tensor, "graph")
