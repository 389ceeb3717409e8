"""Record of the optimizers and variables that a model's compiled steps use. Tracing adds to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from autobatch.graphs import draws, writes
from autobatch.seams import models
from autobatch.seams.optimizers import optimizers_of
from autobatch.tensors.variables import components, distinct
from autobatch.types import Graph, Model, Optimizer, Variable


class TouchedVariables:
    """The optimizers and variables of one model's steps: those known from the model, and those that traces have shown.

    A variable that a strategy mirrors counts with each of its copies in this process.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.optimizers = optimizers_of(model)
        self._ignored: dict[int, Any] = {}
        self._in_graphs: dict[int, Any] = {}
        self._written: dict[int, Any] = {}
        self._updated: list[Any] = []
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._updating_graph: Callable[[], Any] = lambda: None
        self.on_graph: Callable[[Graph], None] = lambda graph: None
        """Callback for each traced function."""

    def note_graph(self, graph: Graph) -> None:
        """Note the variables of a traced function."""
        self.on_graph(graph)
        self._graphs.add(graph)
        for variable in graph.variables:
            self._in_graphs.setdefault(id(variable), variable)

    def note_written(self, graph: Graph) -> None:
        """Note the variables that a traced function writes so far."""
        # While a graph is being traced, it does not list its variables.
        written = writes.written_variables(graph, [*self.variables, *graph.variables])
        self._written.update((id(variable), variable) for variable in written)

    def note_update(self, optimizer: Optimizer, variables: list[Variable]) -> bool:
        """Note that a step applies an optimizer to these variables; return True if the optimizer is new.

        An optimizer that is not built yet is built outside of the trace. What the step's graph has written before its
        first update is no part of the update.
        """
        found = False
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if graph is not None and self._updating_graph() is not graph:
            self.note_written(graph)
            self._updating_graph = weakref.ref(graph)
        if all(optimizer is not known for known in self.optimizers):
            self.optimizers = (*self.optimizers, optimizer)
            found = True
        self._updated = distinct([*self._updated, *variables])
        if not optimizer.built:
            with tf.init_scope():
                optimizer.build(variables)
        return found

    def ignore(self, variables: Iterable[Variable]) -> None:
        """Ignore variables that a step uses for its own work, and that are no state of the model."""
        self._ignored.update((id(variable), variable) for variable in variables)

    def forget(self, variables: Iterable[Variable]) -> None:
        """Forget variables that no longer exist."""
        for variable in variables:
            for known in (self._ignored, self._in_graphs, self._written):
                known.pop(id(variable), None)

    @property
    def hidden_draws(self) -> list[str]:
        """Types of operations in the traced functions whose random numbers come from no variable."""
        return sorted({op for graph in self._graphs for op in draws.hidden_draws(graph)})

    def _of_the_model(self, variables: Iterable[Variable]) -> list[Any]:
        return [variable for variable in components(variables) if id(variable) not in self._ignored]

    @property
    def variables(self) -> list[Variable]:
        """Every variable that a step traced so far can touch."""
        own = [*self._model.variables, *(variable for metric in self._model.metrics for variable in metric.variables)]
        own += [variable for optimizer in self.optimizers for variable in optimizer.variables]
        return self._of_the_model(
            [*own, *self._updated, *models.global_seed_variables(), *self._in_graphs.values()],
        )

    @property
    def updated_variables(self) -> list[Variable]:
        """The variables that an optimizer's update changes: trainable weights and the optimizers' own."""
        own = [variable for optimizer in self.optimizers for variable in optimizer.variables]
        return components([*self._model.trainable_variables, *self._updated, *own])

    @property
    def written_variables(self) -> list[Variable]:
        """The variables that :meth:`note_written` has found."""
        return self._of_the_model(self._written.values())

    @property
    def changed_before_update(self) -> list[Variable]:
        """The variables that a step can touch outside its update: statistics, metrics, seeds, what a layer assigns."""
        before = {id(variable) for variable in self.written_variables}
        in_update = {id(variable) for variable in self.updated_variables} - before
        return [variable for variable in self.variables if id(variable) not in in_update]
