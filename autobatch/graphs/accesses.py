"""Effects of a traced graph's operations on variables, and on the world outside of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.graphs import writes
from autobatch.graphs.draws import is_drawing
from autobatch.seams.graph_functions import functions_of
from autobatch.types import Graph, Operation, Tensor

OUTSIDE = -1
"""Key of everything that an operation may change and that is no variable: files, Python's objects."""

_HARMLESS = frozenset(["Assert", "Print", "PrintV2", "CheckNumerics", "CheckNumericsV2"])
"""Operations that must run, and neither change nor read anything."""

_SILENT = frozenset(["Placeholder", "PlaceholderWithDefault", "NoOp"])
_STATELESS = frozenset(["PartitionedCall", "StatelessIf", "StatelessCase", "StatelessWhile"])


@dataclass(frozen=True, slots=True)
class Access:
    """Effects of one operation, besides that it computes its outputs from its inputs.

    ``reads`` and ``writes`` are keys of variables, see :func:`key_of`. ``draws`` is True if it draws random numbers
    whose seed is not among its inputs: a second run would draw others. ``seeded`` is True if it may draw with a seed
    that is among its inputs. ``must_run`` is True if it has an effect: it runs whether its outputs are needed or not.
    """

    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    draws: bool = False
    seeded: bool = False
    must_run: bool = False

    @property
    def once(self) -> bool:
        """True if the operation must not run a second time for the same micro-batch."""
        return self.draws or self.must_run


PURE = Access()


@dataclass(frozen=True, slots=True)
class _Content:
    """Effects of a function that the operation which calls it does not show."""

    draws: bool = False
    seeded: bool = False
    acts: bool = False

    def __or__(self, other: _Content) -> _Content:
        return _Content(self.draws or other.draws, self.seeded or other.seeded, self.acts or other.acts)


class Accesses:
    """Accesses of the operations of one graph, which may still grow."""

    def __init__(self, graph: Graph) -> None:
        self._outer = {id(inner): outer for outer, inner in graph.captures}
        self._contents: dict[int, _Content] = {}

    def key_of(self, handle: Tensor) -> int:
        """Return the key of the variable that a handle in the graph stands for: the id of the handle outside."""
        while handle.op.type == "Identity":
            handle = handle.op.inputs[0]
        return id(self._outer.get(id(handle), handle))

    def of(self, operation: Operation) -> Access:
        """Return what an operation does."""
        functions = functions_of(operation)
        return self._of_one(operation) if functions is None else self._of_call(operation, functions)

    def _of_one(self, operation: Operation) -> Access:
        kind = operation.type
        keys = tuple(self.key_of(each) for each in operation.inputs if each.dtype == tf.resource)
        if kind == "VariableShape" or kind in _SILENT:
            return PURE
        if kind in writes.READING:
            return Access(reads=keys)
        if not operation.op_def.is_stateful:
            return Access(seeded=True) if is_drawing(kind) else PURE
        if kind in _HARMLESS:
            return Access(must_run=True)
        if is_drawing(kind) and not keys:
            return Access(draws=True)
        return Access(writes=keys or (OUTSIDE,), draws=is_drawing(kind), must_run=True)

    def _of_call(self, operation: Operation, functions: list[Any]) -> Access:
        found = self._within(functions)
        only_read = set(operation.node_def.attr["_read_only_resource_inputs"].list.i)
        handles = [(place, each) for place, each in enumerate(operation.inputs) if each.dtype == tf.resource]
        read = {id(each): each for place, each in handles if place in only_read}
        changed = {id(each): each for _, each in handles if id(each) not in read}
        if operation.type in _STATELESS:
            return Access(seeded=found.seeded)
        keys = tuple(map(self.key_of, changed.values()))
        return Access(
            reads=tuple(map(self.key_of, read.values())),
            writes=(*keys, OUTSIDE) if found.acts else keys,
            draws=found.draws,
            seeded=found.seeded,
            must_run=bool(keys) or found.acts,
        )

    def _within(self, functions: list[Any]) -> _Content:
        """Return what the operations within these functions' graphs do, those known by their inputs left out."""
        content = _Content()
        for graph in functions:
            if graph is None:
                return _Content(True, True, True)
            if id(graph) not in self._contents:
                self._contents[id(graph)] = self._content_of(graph)
            content |= self._contents[id(graph)]
        return content

    def _content_of(self, graph: Graph) -> _Content:
        content = _Content()
        for operation in graph.get_operations():
            inner = functions_of(operation)
            if inner is not None:
                content |= self._within(inner)
            elif is_drawing(operation.type):
                content |= _Content(draws=operation.op_def.is_stateful, seeded=not operation.op_def.is_stateful)
            elif operation.op_def.is_stateful and operation.type not in writes.READING | _SILENT:
                content |= _Content(acts=all(each.dtype != tf.resource for each in operation.inputs))
        return content
