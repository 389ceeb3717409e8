"""Bytes that a traced update holds at once, counted from its graph."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.seams.graph_functions import output_item_bytes

PIECES = 8
"""Number of pieces to ask for: few, as each costs microseconds of every step."""

_SHARED = frozenset(
    ("Reshape", "Identity", "IdentityN", "StopGradient", "PreventGradient", "ExpandDims", "Squeeze", "EnsureShape")
)
"""Operations whose outputs are their inputs' buffers."""

_WRITES = ("Assign", "Resource")
"""Beginnings of the names of operations that change a variable."""

_NOT_COMPUTED = frozenset(("Placeholder", "Const", "NoOp", "Empty"))

_IN_PLACE = frozenset(
    (
        *("Abs", "Add", "AddN", "AddV2", "Div", "DivNoNan", "Exp", "Log", "Maximum", "Minimum", "Mul", "Neg", "Pow"),
        *("RealDiv", "Reciprocal", "Rsqrt", "SelectV2", "Sign", "Sqrt", "Square", "SquaredDifference", "Sub", "Tanh"),
    )
)
"""Elementwise operations that write over an input of the same size if nothing else reads it."""

_BLOCK_BYTES = 256
"""Unit of the allocator: a smaller tensor takes as much."""


def temporaries(
    graph: tf.Graph, first: int, *, unknown_bytes: int, copied: Collection[tuple[int, ...]] = ()
) -> list[int]:
    """Return the blocks, in bytes, with room for what the operations of ``graph`` from ``first`` on hold at once.

    Each operation is taken to start as soon as it can. The memory that its kernel uses beside its outputs is unknown,
    and so are iterations of a loop that run at once. ``unknown_bytes`` is taken for a tensor whose shape is not in the
    trace. Variables' buffers are not counted, but copies of variables whose shape is one of ``copied`` are. The first
    block is for the largest tensor held at any moment, the second for the second largest, and so on. The last block is
    for all others.
    """
    names = {operation.name for operation in graph.get_operations()[first:]}
    definition = graph.as_graph_def(add_shapes=True)
    bodies = {function.signature.name: function.node_def for function in definition.library.function}
    nodes = [node for node in definition.node if node.name in names]
    traced = _Traced(bodies, unknown_bytes, frozenset(copied))
    return traced.held_by(nodes, traced.left_shared(nodes)).pieces()


def even_pieces(needed_bytes: int, largest_bytes: int) -> list[int]:
    """Return pieces as large as the largest block: a nearly full allocator may have pieces, but not the whole."""
    piece = max(largest_bytes, -(-needed_bytes // PIECES), 1)
    return [min(piece, max(0, needed_bytes - piece * index)) for index in range(PIECES)]


class _Held:
    """Blocks alive at one moment, and the most bytes ever alive in the largest, the second largest, and so on."""

    def __init__(self) -> None:
        self._alive: list[int] = []  # ascending
        self._bytes = 0
        self._most = [0] * PIECES
        self._others = 0

    def change(self, begun: Iterable[int], ended: Iterable[int]) -> None:
        """Remove blocks of the sizes ``ended``, then add blocks of the sizes ``begun``."""
        for size in ended:
            del self._alive[bisect.bisect_left(self._alive, size)]
            self._bytes -= size
        for size in begun:
            bisect.insort(self._alive, size)
            self._bytes += size

    def note(self, within: Iterable[int] = ()) -> None:
        """Note what is alive now, with the blocks ``within`` beside it."""
        within = list(within)
        self.change(within, ())
        largest = self._alive[: -PIECES - 1 : -1]
        self._most = [max(both) for both in itertools.zip_longest(self._most, largest, fillvalue=0)]
        self._others = max(self._others, self._bytes - sum(largest))
        self.change((), within)

    def pieces(self) -> list[int]:
        """Return room for whatever was noted, in even pieces where there are more large blocks than pieces."""
        if self._others > self._most[0]:
            return even_pieces(sum(self._most) + self._others, self._most[0])
        return [*self._most[:-1], self._most[-1] + self._others]


@dataclass(frozen=True, slots=True)
class _Traced:
    """Facts about a trace from which the memory that its operations hold is counted."""

    bodies: Mapping[str, Any]
    unknown_bytes: int
    copied: frozenset[tuple[int, ...]]

    def bodies_of(self, node: Any) -> Iterator[Iterable[Any]]:
        """Yield the nodes of each branch, loop's body or function that ``node`` may run."""
        for value in node.attr.values():
            for function in (*([value.func] if value.HasField("func") else ()), *value.list.func):
                yield self.bodies.get(function.name, ())

    def held_by(self, nodes: Iterable[Any], beside: Iterable[int] = ()) -> _Held:
        """Count what the nodes hold, with blocks ``beside`` that are there all the time."""
        nodes = list(nodes)
        readers = Counter(source for node in nodes for source in _data_inputs(node))
        buffers: dict[str, frozenset[str]] = {}
        step: dict[str, int] = {}
        last: defaultdict[str, int] = defaultdict(int)
        size: dict[str, int] = {}
        copied: dict[str, int] = {}
        reads: dict[str, str] = {}
        values: dict[str, int] = {}
        writes: defaultdict[str, list[int]] = defaultdict(list)
        within: defaultdict[int, list[int]] = defaultdict(list)
        for node in nodes:
            inputs = _data_inputs(node)
            begins = 1 + max((step.get(name.lstrip("^").split(":")[0], -1) for name in node.input), default=-1)
            needed = self._output_bytes(node)
            shared = frozenset[str]()
            if node.op in _SHARED:
                shared = frozenset().union(*(buffers.get(name, {name}) for name in inputs))
                if any(readers[name] > 1 for name in inputs):
                    readers[node.name] += 1  # something else reads the buffer under another name
            elif node.op in _IN_PLACE and needed:
                own = [buffers.get(name, frozenset({name})) for name in inputs if readers[name] == 1]
                shared = next((each for each in own if sum(size.get(name, 0) for name in each) == needed), shared)
            buffers[node.name] = shared or frozenset({node.name})
            step[node.name] = begins
            size[node.name] = 0 if shared else needed
            for name in (*inputs, node.name):
                for buffer in buffers.get(name, ()):
                    last[buffer] = max(last[buffer], begins)
            if node.op == "ReadVariableOp":
                reads[node.name], values[node.name] = inputs[0], self._shapes_bytes(node)
            elif node.op.startswith(_WRITES) and inputs:
                writes[inputs[0]].append(begins)
            if node.op == "AssignVariableOp":  # it copies the value if reading the variable copies it
                within[begins].append(copied.get(inputs[1], 0))
            elif self._is_copied(node):
                copied[node.name] = self._shapes_bytes(node)
            for body in self.bodies_of(node):
                within[begins] += self.held_by(body).pieces()
        begun: defaultdict[int, list[int]] = defaultdict(list)
        ended: defaultdict[int, list[int]] = defaultdict(list)
        for name, held in size.items():
            if held > _BLOCK_BYTES:
                begun[step[name]].append(held)
                ended[last[name] + 1].append(held)
        for name, handle in reads.items():  # a value that is read before a write and used after it is a copy by then
            changed = [moment for moment in writes[handle] if step[name] < moment < last[name]]
            if changed:
                begun[changed[0]].append(values[name])
                ended[last[name] + 1].append(values[name])
        found = _Held()
        # Single numbers wait for nothing: all of them may be alive from the first moment to the last.
        found.change([*beside, sum(held for held in size.values() if held <= _BLOCK_BYTES)], ())
        found.note()
        for moment in sorted({*begun, *ended, *within}):
            found.change(begun[moment], ended[moment])
            found.note(size for size in within[moment] if size)
        return found

    def left_shared(self, nodes: Iterable[Any]) -> list[int]:
        """Return the bytes that the next update needs for variables left with another variable's buffer.

        A variable that is assigned another's value takes its buffer, as when averages of weights are written over the
        weights. The first of the two to be changed then gets a buffer of its own.
        """
        read: dict[str, int] = {}
        shared: list[int] = []
        for node in nodes:
            inputs = _data_inputs(node)
            if node.op == "ReadVariableOp":
                read[node.name] = self._shapes_bytes(node)
            elif node.op in _SHARED:
                read[node.name] = sum(read.get(name, 0) for name in inputs)
            elif node.op == "AssignVariableOp" and inputs[1] in read:
                shared.append(read[inputs[1]])
            for body in self.bodies_of(node):
                shared += self.left_shared(body)
        return shared

    def _output_bytes(self, node: Any) -> int:
        """Return the bytes that are allocated for the outputs of ``node``."""
        if node.op in _NOT_COMPUTED or (node.op == "ReadVariableOp" and not self._is_copied(node)):
            return 0
        return self._shapes_bytes(node)

    def _is_copied(self, node: Any) -> bool:
        """Return True if ``node`` may return the value of a variable that is copied when it is read."""
        shapes = [_shape_of(each) for each in node.attr["_output_shapes"].list.shape]
        return bool(self.copied) and any(shape is None or shape in self.copied for shape in shapes)

    def _shapes_bytes(self, node: Any) -> int:
        """Return the bytes that the outputs of ``node`` take, each in whole blocks."""
        shapes = [_shape_of(each) for each in node.attr["_output_shapes"].list.shape]
        total = 0
        for shape, item_bytes in zip(shapes, output_item_bytes(node), strict=False):
            size = self.unknown_bytes if shape is None else math.prod(shape) * item_bytes
            total += -(-size // _BLOCK_BYTES) * _BLOCK_BYTES if item_bytes else 0
        return total


def _shape_of(shape: Any) -> tuple[int, ...] | None:
    """Return a shape from the trace; None where the trace has not all of it."""
    known = not shape.unknown_rank and all(dimension.size >= 0 for dimension in shape.dim)
    return tuple(dimension.size for dimension in shape.dim) if known else None


def _data_inputs(node: Any) -> list[str]:
    return [name.split(":")[0] for name in node.input if not name.startswith("^")]
