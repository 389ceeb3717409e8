"""Branches of a step that TensorFlow chooses, of which one applies an optimizer: an update every n-th step, say.

Such a branch is traced in the graph of the step itself, and what it changes is changed under its condition. Both
branches are computed. Which conditions these are shows only when a branch has been traced and applies an optimizer.
That trace is finished, so that the variables that it makes get their values. Then the step is traced anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from autobatch.seams.conditions import conditions_taken
from autobatch.types import Graph, Tensor


class Guard(NamedTuple):
    """Operations of the step's graph, by their positions, that count only if a tensor is true."""

    operations: range
    holds: Tensor


class Conditions:
    """Conditions of one trace of the step whose graph is ``graph``; ``inlined`` are the places of those to inline."""

    def __init__(self, graph: Graph, inlined: frozenset[int]) -> None:
        self._graph = graph
        self._inlined = inlined
        self._count = 0
        self._place: int | None = None
        self.found: set[int] = set()
        """Places of other conditions of which a branch applies an optimizer."""
        self.guards: list[Guard] = []
        """Guards of all inlined branches, those of inner ones first."""
        self.holds: Any = None
        """The tensor that is true if the branch that is being traced is chosen; None outside of inlined branches."""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inline, within this context, the conditions that are to be."""
        with conditions_taken(self._take):
            yield

    def is_within(self) -> bool:
        """Return True while an inlined branch is traced."""
        return self.holds is not None

    def note_found(self) -> bool:
        """Note that the branch that is being traced applies an optimizer; return False if it is none of a condition."""
        if self._place is not None:
            self.found.add(self._place)
        return self._place is not None

    def _take(
        self,
        original: Callable[..., Any],
        pred: Any,
        true_fn: Callable[[], Any],
        false_fn: Callable[[], Any],
    ) -> Any:
        if tf.compat.v1.get_default_graph() is not self._graph:
            return original(pred, true_fn, false_fn)
        place, self._count = self._count, self._count + 1
        if place not in self._inlined:
            self._place = place
            try:
                return original(pred, true_fn, false_fn)
            finally:
                self._place = None
        chosen = tf.cast(tf.reshape(pred, []), tf.bool)
        results = [self._traced(true_fn, chosen), self._traced(false_fn, tf.logical_not(chosen))]
        if all(result is None for result in results):
            return None
        return original(chosen, lambda: results[0], lambda: results[1])

    def _traced(self, branch: Callable[[], Any], chosen: Tensor) -> Any:
        outer = self.holds
        self.holds = chosen if outer is None else tf.logical_and(outer, chosen)
        own = self.holds
        first = len(self._graph.get_operations())
        try:
            result = branch()
        finally:
            self.holds = outer
        self.guards.append(Guard(range(first, len(self._graph.get_operations())), own))
        return tf.nest.map_structure(lambda part: None if isinstance(part, tf.Operation) else part, result)
