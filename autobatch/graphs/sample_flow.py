"""Flow of a batch's samples through a traced graph, into its functions, branches and loops.

The rules in :mod:`autobatch.graphs.sample_rules` say what each operation makes of the samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import tensorflow as tf

from autobatch.graphs import lookup_rules, product_rules, shape_rules, slice_rules
from autobatch.graphs.dependence import FREE, Dependence, joined, merged, unknown
from autobatch.graphs.sample_rules import apply_rule
from autobatch.seams import graph_functions
from autobatch.types import Graph, Operation, Tensor

_RULES = (lookup_rules, product_rules, shape_rules, slice_rules)
"""The modules whose rules register themselves when they are imported."""

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_BRANCHES = ("If", "StatelessIf", "Case", "StatelessCase")
_LOOPS = ("While", "StatelessWhile")
_MOST_ROUNDS = 6
"""Most rounds in which a loop's variables are followed; a round that shows nothing new is the last."""


class SampleFlow:
    """Dependence of each tensor of one graph; worked out where it is asked for, and kept.

    ``arguments`` has the dependence of what the graph's function is given, by the tensors' names. What is captured from
    outside is a variable or a constant.
    """

    def __init__(self, arguments: Mapping[str, Dependence]) -> None:
        self._known: dict[str, Dependence] = dict(arguments)
        self.aliases: list[Any] = []  # keeps what :meth:`define` was given alive, so that no name is given twice

    @classmethod
    def of_leaves(cls, leaves: Iterable[Tensor], others: Iterable[Any]) -> SampleFlow:
        """Make the flow from a micro-batch's leaves; ``others`` are arguments that are alike in all micro-batches."""
        arguments: dict[str, Dependence] = {}
        for leaf in leaves:
            if isinstance(leaf, tf.Tensor):
                arguments[leaf.name] = shape_rules.of_argument(leaf)
            elif isinstance(leaf, tf.RaggedTensor):
                parts = tf.nest.flatten(leaf, expand_composites=True)
                arguments[parts[0].name] = Dependence(axis=0, data=True, parts=None)
                arguments.update((part.name, unknown("ragged rows")) for part in parts[1:])
            else:
                parts = tf.nest.flatten(leaf, expand_composites=True)
                arguments.update((part.name, unknown("a sparse tensor")) for part in parts)
        arguments.update((other.name, FREE) for other in others)
        return cls(arguments)

    def define(self, tensor: Tensor, value: Dependence) -> None:
        """Set the dependence of a tensor, whatever it was computed from."""
        self.aliases.append(tensor)
        self._known[tensor.name] = value

    def of(self, tensor: Tensor) -> Dependence:
        """Return the dependence of a tensor."""
        pending = [tensor]
        while pending:
            current = pending[-1]
            if current.name in self._known:
                pending.pop()
                continue
            missing = [each for each in current.op.inputs if each.name not in self._known]
            if missing:
                pending += missing
                continue
            for output, found in zip(current.op.outputs, self._outputs(current.op), strict=True):
                self._known.setdefault(output.name, found)
            pending.pop()
        return self._known[tensor.name]

    def _outputs(self, op: Operation) -> list[Dependence]:
        inputs = [self._known[each.name] for each in op.inputs]
        if op.type in ("Const", "VarHandleOp", "Placeholder"):
            return [self._of_source(op)]
        if op.type in ("ReadVariableOp", "VariableShape"):
            return [replace(FREE, weights=op.type == "ReadVariableOp")]
        if op.type in _CALLS:
            return self._through(graph_functions.called_graph(op), inputs, op)
        if op.type in _BRANCHES:
            return self._branches(op, inputs)
        if op.type in _LOOPS:
            return self._loop(op, inputs)
        return apply_rule(op, inputs)

    @staticmethod
    def _of_source(op: Operation) -> Dependence:
        if op.type != "Const":
            return FREE
        value = tf.get_static_value(op.outputs[0])
        zero = value is not None and value.dtype.kind in "fiu" and value.size <= 64 and not value.any()
        return replace(FREE, zero=bool(zero))

    def _through(self, graph: Graph, inputs: list[Dependence], op: Operation) -> list[Dependence]:
        if graph is None or len(graph.inputs) != len(inputs) or len(graph.outputs) < len(op.outputs):
            return [self._lost(op, inputs)] * len(op.outputs)
        inner = SampleFlow({each.name: value for each, value in zip(graph.inputs, inputs, strict=True)})
        return [inner.of(output) for output in graph.outputs[: len(op.outputs)]]

    def _branches(self, op: Operation, inputs: list[Dependence]) -> list[Dependence]:
        found: list[list[Dependence]] = []
        for graph in graph_functions.branch_graphs(op):
            found.append(self._through(graph, inputs[1:], op))
        if not found:
            return [self._lost(op, inputs)] * len(op.outputs)
        results: list[Dependence] = []
        for each in zip(*found, strict=True):
            result: Dependence | None = None
            for value in each:
                result = joined(result, value)
            assert result is not None
            results.append(result)
        if not inputs[0].data:
            return results
        # The batch may decide which branch runs, as where a mask has no gaps. A number of the batch is no sum then.
        return [value if value.axis is not None else replace(value, linear=False) for value in results]

    def _loop(self, op: Operation, inputs: list[Dependence]) -> list[Dependence]:
        body = graph_functions.body_graph(op)
        if body is None:
            return [self._lost(op, inputs)] * len(op.outputs)
        known = list(inputs)
        for _ in range(_MOST_ROUNDS):
            found = self._through(body, known, op)
            after = [joined(before, new) or FREE for before, new in zip(known, found, strict=True)]
            if after == known:
                return known
            known = after
        return [self._lost(op, inputs)] * len(op.outputs)

    @staticmethod
    def _lost(op: Operation, inputs: list[Dependence]) -> Dependence:
        depends = any(each.data or each.axis is not None or each.unknown for each in inputs)
        return unknown(op.name) if depends else merged(FREE, inputs)
