"""Operations of a traced graph, made again in another graph with other inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tensorflow as tf

from autobatch.seams.graph_functions import copied_operation
from autobatch.types import Graph, Operation, Tensor


class Source:
    """A traced graph whose operations are made again, with what it has captured and its arguments in their order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.captured = {id(inner): outer for outer, inner in graph.captures}
        self.arguments = [tensor for tensor in graph.inputs if id(tensor) not in self.captured]


class Replay:
    """Operations of ``source`` in the current graph.

    ``given`` holds tensors of the current graph that stand for tensors of the source, by the ids of these.
    """

    def __init__(self, source: Source, given: Mapping[int, Any]) -> None:
        self._source = source
        self._made: dict[int, Any] = dict(given)

    def run(self, operations: Iterable[Operation], conditions: Mapping[int, Tensor]) -> None:
        """Make operations again, in the order given; what is given already is left as it is.

        ``conditions`` are tensors of the source which are true if an operation is to run, by its id. Such an operation
        has no outputs.
        """
        for operation in operations:
            if id(operation) in conditions:
                self.run_if(conditions[id(operation)], functools.partial(self._copy, operation))
                continue
            outputs = self._copy(operation)
            for old, new in zip(operation.outputs, outputs, strict=True):
                self._made.setdefault(id(old), new)

    def run_if(self, condition: Tensor | None, run: Callable[[], object]) -> None:
        """Call ``run``, in a branch that is chosen if a tensor of the source is true; None stands for true."""
        if condition is None:
            run()
            return

        def branch() -> Any:
            run()
            return tf.constant(True)

        tf.cond(self.of(condition), branch, lambda: tf.constant(False))

    def _copy(self, operation: Operation) -> list[Any]:
        return copied_operation(operation, [self.of(each) for each in operation.inputs])

    def give(self, tensor: Tensor, value: Any) -> None:
        """Let ``value`` stand for a tensor of the source."""
        self._made[id(tensor)] = value

    def of(self, tensor: Tensor) -> Any:
        """Return what stands for a tensor of the source."""
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        return self._source.captured[id(tensor)]

    def nest_of(self, nest: Any) -> Any:
        """Return what stands for a nest of tensors, those made of several included; other parts stay as they are."""
        return tf.nest.map_structure(
            lambda part: self.of(part) if tf.is_tensor(part) and hasattr(part, "graph") else part,
            nest,
            expand_composites=True,
        )
