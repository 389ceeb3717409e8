"""The room that an optimizer's update needs: kept small, told from the trace, asked for before the update begins.

Keras changes each variable by operations that wait for nothing of the others', and TensorFlow starts whatever can be
started, so that the temporaries of many variables are alive at once. Here each operation waits for the one before
(:func:`autobatch.train.strategy_seams.updates_in_turn`). Of six weights of the same size, on two threads, that leaves 2
temporaries of a weight's size for Adam instead of 5 to 8, for Lion 2 instead of 9 to 14, for RMSprop with momentum 2
instead of 18 to 21 (``benchmarks/update_room.py``).

How much it is :func:`temporaries` tells from the graph. :class:`UpdateRoom` asks the allocator for as much, in blocks
of the sizes of the largest temporaries, before the first variable changes, and notes that the update has begun.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.train.graphs import output_item_bytes
from autobatch.train.strategy_seams import updates_in_turn
from autobatch.trial.snapshot import bytes_of, distinct

NAME = "autobatch_update_room"
"""By this the pieces can be told among what an update allocates."""

_ROW_BYTES = 2**10
"""Room is asked for in rows, for a dimension is an int32."""

_PIECES = 8
"""Pieces to ask for: few, for each costs microseconds of every step."""

_SHARED = frozenset(
    ("Reshape", "Identity", "IdentityN", "StopGradient", "PreventGradient", "ExpandDims", "Squeeze", "EnsureShape")
)
"""Operations whose outputs are their inputs' buffers."""

_WRITES = ("Assign", "Resource")
"""How the names of operations begin that change a variable."""

_NOT_COMPUTED = frozenset(("Placeholder", "Const", "NoOp", "Empty"))

_IN_PLACE = frozenset(
    (
        *("Abs", "Add", "AddN", "AddV2", "Div", "DivNoNan", "Exp", "Log", "Maximum", "Minimum", "Mul", "Neg", "Pow"),
        *("RealDiv", "Reciprocal", "Rsqrt", "SelectV2", "Sign", "Sqrt", "Square", "SquaredDifference", "Sub", "Tanh"),
    )
)
"""Operations, element by element, that write over an input of the same size which nobody else will read."""

_BLOCK_BYTES = 256
"""The allocator's unit: what is smaller takes as much."""


class UpdateRoom:
    """Around each update of one model: makes sure of the memory of its temporaries, then notes that it has begun."""

    def __init__(self) -> None:
        self._pieces = [0] * _PIECES
        self._copied: set[tuple[int, ...]] = set()
        with tf.device("CPU:0"):
            self._has_begun = tf.Variable(False, trainable=False, name="autobatch_update_begun")
            # Lengths that are not known beforehand: else the graph's optimiser would find no use for the pieces.
            self._shapes = tf.Variable([[0, _ROW_BYTES]] * _PIECES, trainable=False, dtype=tf.int32, name=NAME)

    @property
    def bytes(self) -> int:
        """What the updates traced by now were found to need."""
        return sum(self._pieces)

    @property
    def variables(self) -> tuple[Any, ...]:
        """The variables of its own."""
        return self._has_begun, self._shapes

    def note_begun(self, begun: Any = False) -> Any:
        """Note whether an update has begun; in a graph, the operation that does."""
        with tf.device("CPU:0"):
            return self._has_begun.assign(begun, read_value=False)

    def has_begun(self) -> bool:
        """What was noted last."""
        return bool(self._has_begun.numpy())

    def note_gradients(self, gradients: Iterable[Any], variables: Iterable[Any]) -> None:
        """Note what gradients are, before the update is traced: of rows that are added here and there, or whole ones.

        A variable that rows were once added to, be it a weight, an average or an accumulator, is copied whenever it is
        read from then on, and what it is assigned is copied too (``copy_on_read_mode`` in TensorFlow's kernels).
        """
        pairs = zip(gradients, variables, strict=True)
        self._copied.update(tuple(each.shape) for gradient, each in pairs if isinstance(gradient, tf.IndexedSlices))

    @contextlib.contextmanager
    def update_of(self, variables: list[Any]) -> Iterator[None]:
        """Around what is traced to update ``variables``, or does so eagerly; nothing is written to the room."""
        inner = distinct(variables)
        if not inner:
            yield
            return
        largest = max(bytes_of([variable]) for variable in inner)
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if graph is None:  # one operation after another, and no trace to tell what they need
            self._settle(_even_pieces(guessed_bytes(inner), largest))
        begun = self.note_begun(self._ask(inner[0].device))
        first = 0 if graph is None else len(graph.get_operations())
        with tf.control_dependencies([begun]), updates_in_turn():
            yield
        if graph is not None:
            self._settle(temporaries(graph, first, unknown_bytes=largest, copied=self._copied))

    def _settle(self, pieces: list[int]) -> None:
        """Ask for ``pieces`` (bytes each) from now on, or for what was found before where that is more."""
        self._pieces = [max(both) for both in zip(self._pieces, pieces, strict=True)]
        with tf.init_scope():
            self._shapes.assign([[-(-size // _ROW_BYTES), _ROW_BYTES] for size in self._pieces])

    def _ask(self, device: str) -> Any:
        """Ask the allocator of ``device``: a boolean scalar, always true, once all pieces were there together."""
        with tf.device("CPU:0"):
            shapes = tf.unstack(self._shapes.read_value())
        with tf.device(device), tf.name_scope(NAME):
            pieces = [tf.raw_ops.Empty(shape=shape, dtype=tf.uint8) for shape in shapes]
        with tf.device("CPU:0"):
            # One operation that needs all of them, so that none is given back before the last is there.
            return tf.reduce_all(tf.stack(tf.shape_n(pieces)) >= 0)


def guessed_bytes(variables: Iterable[Any]) -> int:
    """What an update of ``variables`` needs, as long as no trace tells."""
    sizes = [bytes_of([variable]) for variable in variables]
    return sum(sizes) + 2 * max(sizes, default=0)


def temporaries(
    graph: tf.Graph, first: int, *, unknown_bytes: int, copied: Collection[tuple[int, ...]] = ()
) -> list[int]:
    """The blocks that make room for what the operations of ``graph`` from the ``first`` on hold at once, in bytes.

    Each operation is taken to start as soon as it can; what its kernel works with beside its outputs, and iterations of
    a loop that run at once, are not known. ``unknown_bytes`` is taken for a tensor whose shape the trace does not tell.
    Variables' buffers are not counted, but copies of variables whose shape is one of ``copied``. The first block is for
    the largest of what is held at any moment, the second for the second largest, and so on; the last for all others.
    """
    names = {operation.name for operation in graph.get_operations()[first:]}
    definition = graph.as_graph_def(add_shapes=True)
    bodies = {function.signature.name: function.node_def for function in definition.library.function}
    nodes = [node for node in definition.node if node.name in names]
    traced = _Traced(bodies, unknown_bytes, frozenset(copied))
    return traced.held_by(nodes, traced.left_shared(nodes)).pieces()


def _even_pieces(needed_bytes: int, largest_bytes: int) -> list[int]:
    """As large as the largest block: a nearly full allocator has pieces where it has not the whole."""
    piece = max(largest_bytes, -(-needed_bytes // _PIECES), 1)
    return [min(piece, max(0, needed_bytes - piece * index)) for index in range(_PIECES)]


class _Held:
    """The blocks alive at one moment, and the most that was ever alive of the largest, of the second largest, ..."""

    def __init__(self) -> None:
        self._alive: list[int] = []  # ascending
        self._bytes = 0
        self._most = [0] * _PIECES
        self._others = 0

    def change(self, begun: Iterable[int], ended: Iterable[int]) -> None:
        """Blocks of these sizes have ended, then others have begun."""
        for size in ended:
            del self._alive[bisect.bisect_left(self._alive, size)]
            self._bytes -= size
        for size in begun:
            bisect.insort(self._alive, size)
            self._bytes += size

    def note(self, within: Iterable[int] = ()) -> None:
        """Note what is alive now, and these blocks beside it."""
        within = list(within)
        self.change(within, ())
        largest = self._alive[: -_PIECES - 1 : -1]
        self._most = [max(both) for both in itertools.zip_longest(self._most, largest, fillvalue=0)]
        self._others = max(self._others, self._bytes - sum(largest))
        self.change((), within)

    def pieces(self) -> list[int]:
        """Room for whatever was noted; of even pieces where there are more large blocks than pieces."""
        if self._others > self._most[0]:
            return _even_pieces(sum(self._most) + self._others, self._most[0])
        return [*self._most[:-1], self._most[-1] + self._others]


@dataclass(frozen=True, slots=True)
class _Traced:
    """What must be known of a trace to tell what its operations hold."""

    bodies: Mapping[str, Any]
    unknown_bytes: int
    copied: frozenset[tuple[int, ...]]

    def bodies_of(self, node: Any) -> Iterator[Iterable[Any]]:
        """The nodes of each branch, loop's body or function that ``node`` may run."""
        for value in node.attr.values():
            for function in (*([value.func] if value.HasField("func") else ()), *value.list.func):
                yield self.bodies.get(function.name, ())

    def held_by(self, nodes: Iterable[Any], beside: Iterable[int] = ()) -> _Held:
        """What the nodes hold, beside blocks that are there all the time."""
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
                    readers[node.name] += 1  # somebody else reads the buffer under another name
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
            if node.op == "AssignVariableOp":  # it copies what it is given, where what is read from it is copied
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
        # Single numbers wait for nothing: all of them may be there from the first to the last.
        found.change([*beside, sum(held for held in size.values() if held <= _BLOCK_BYTES)], ())
        found.note()
        for moment in sorted({*begun, *ended, *within}):
            found.change(begun[moment], ended[moment])
            found.note(size for size in within[moment] if size)
        return found

    def left_shared(self, nodes: Iterable[Any]) -> list[int]:
        """What the next update will need for variables that this one leaves with another variable's buffer.

        A variable that is assigned another's value takes its buffer (averages of weights, written over them, do so);
        the first of the two to be changed gets a buffer of its own.
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
        """What is allocated for the outputs of ``node``."""
        if node.op in _NOT_COMPUTED or (node.op == "ReadVariableOp" and not self._is_copied(node)):
            return 0
        return self._shapes_bytes(node)

    def _is_copied(self, node: Any) -> bool:
        """Whether ``node`` returns what may be the value of a variable that is copied when it is read."""
        shapes = [_shape_of(each) for each in node.attr["_output_shapes"].list.shape]
        return bool(self.copied) and any(shape is None or shape in self.copied for shape in shapes)

    def _shapes_bytes(self, node: Any) -> int:
        """What the outputs of ``node`` take, each in whole blocks."""
        shapes = [_shape_of(each) for each in node.attr["_output_shapes"].list.shape]
        total = 0
        for shape, item_bytes in zip(shapes, output_item_bytes(node), strict=False):
            size = self.unknown_bytes if shape is None else math.prod(shape) * item_bytes
            total += -(-size // _BLOCK_BYTES) * _BLOCK_BYTES if item_bytes else 0
        return total


def _shape_of(shape: Any) -> tuple[int, ...] | None:
    """A shape as the trace tells it, None where it does not tell all of it."""
    known = not shape.unknown_rank and all(dimension.size >= 0 for dimension in shape.dim)
    return tuple(dimension.size for dimension in shape.dim) if known else None


def _data_inputs(node: Any) -> list[str]:
    return [name.split(":")[0] for name in node.input if not name.startswith("^")]
