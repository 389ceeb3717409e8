"""The room that an optimizer's update needs: kept small, told from the trace, asked for before the update begins.

Keras changes each variable by operations that wait for nothing of the others', and TensorFlow starts whatever can be
started, so that the temporaries of many variables are alive at once. Here each variable waits for the one before
(:func:`autobatch.train.strategy_seams.updates_in_turn`). Of six weights of the same size, on two threads, that leaves 2
temporaries of a weight's size for Adam instead of 6, for Lion 4 instead of 14, for RMSprop with momentum 6 instead of
22, in no more time (``benchmarks/update_room.py``).

How much it is :func:`temporaries_bytes` tells from the graph. :class:`UpdateRoom` asks the allocator for as much, in
pieces of the largest weight's size, before the first variable changes, and notes that the update has begun.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from autobatch.train.strategy_seams import updates_in_turn
from autobatch.trial.snapshot import bytes_of, distinct

NAME = "autobatch_update_room"
"""By this the pieces can be told among what an update allocates."""

_ROW_BYTES = 2**10
"""Room is asked for in rows, for a dimension is an int32."""

_PIECES = 8
"""The most pieces to ask for: few, for each costs microseconds of every step."""

_SHARED = frozenset(
    ("Reshape", "Identity", "IdentityN", "StopGradient", "PreventGradient", "ExpandDims", "Squeeze", "EnsureShape")
)
"""Operations whose outputs are their inputs' buffers."""

_NOT_COMPUTED = frozenset(("Placeholder", "Const", "ReadVariableOp", "NoOp", "Empty"))

_IN_PLACE = frozenset(
    (
        *("Abs", "Add", "AddN", "AddV2", "Div", "DivNoNan", "Exp", "Log", "Maximum", "Minimum", "Mul", "Neg", "Pow"),
        *("RealDiv", "Reciprocal", "Rsqrt", "SelectV2", "Sign", "Sqrt", "Square", "SquaredDifference", "Sub", "Tanh"),
    )
)
"""Operations, element by element, that write over an input of the same size which nobody else will read."""

_BODIES = {
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "While": ("body",),
    "StatelessWhile": ("body",),
}


class UpdateRoom:
    """Around each update of one model: makes sure of the memory of its temporaries, then notes that it has begun."""

    def __init__(self) -> None:
        self.bytes = 0
        """What the updates traced by now were found to need."""
        with tf.device("CPU:0"):
            self._has_begun = tf.Variable(False, trainable=False, name="autobatch_update_begun")
            # Lengths that are not known beforehand: else the graph's optimiser would find no use for the pieces.
            self._shapes = tf.Variable([[0, _ROW_BYTES]] * _PIECES, trainable=False, dtype=tf.int32, name=NAME)

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
            self._settle(guessed_bytes(inner), largest)
        begun = self.note_begun(self._ask(inner[0].device))
        first = 0 if graph is None else len(graph.get_operations())
        with tf.control_dependencies([begun]), updates_in_turn():
            yield
        if graph is not None:
            self._settle(temporaries_bytes(graph, first, unknown_bytes=largest), largest)

    def _settle(self, needed_bytes: int, largest_bytes: int) -> None:
        """Ask for ``needed_bytes`` from now on, or for what was found before if that is more.

        The pieces are as large as the largest weight: a nearly full allocator has pieces where it has not the whole.
        """
        if needed_bytes <= self.bytes:
            return
        self.bytes = needed_bytes
        piece = max(largest_bytes, -(-needed_bytes // _PIECES), 1)
        sizes = [min(piece, max(0, needed_bytes - piece * index)) for index in range(_PIECES)]
        with tf.init_scope():
            self._shapes.assign([[-(-size // _ROW_BYTES), _ROW_BYTES] for size in sizes])

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


def temporaries_bytes(graph: tf.Graph, first: int, *, unknown_bytes: int) -> int:
    """What the operations of ``graph`` from the ``first`` on hold at once, each started as soon as it can be.

    ``unknown_bytes`` is taken for a tensor whose shape the trace does not tell. Variables' buffers are not counted.
    """
    names = {operation.name for operation in graph.get_operations()[first:]}
    definition = graph.as_graph_def(add_shapes=True)
    bodies = {function.signature.name: function.node_def for function in definition.library.function}
    return _most_alive([node for node in definition.node if node.name in names], bodies, unknown_bytes)


def _most_alive(nodes: Iterable[Any], bodies: Mapping[str, Any], unknown_bytes: int) -> int:
    nodes = list(nodes)
    readers = Counter(source for node in nodes for source in _data_inputs(node))
    buffers: dict[str, frozenset[str]] = {}
    step: dict[str, int] = {}
    last: defaultdict[str, int] = defaultdict(int)
    size: dict[str, int] = {}
    within: Counter[int] = Counter()
    for node in nodes:
        inputs = _data_inputs(node)
        begins = 1 + max((step.get(name.lstrip("^").split(":")[0], -1) for name in node.input), default=-1)
        needed = _output_bytes(node, unknown_bytes)
        shared = frozenset[str]()
        if node.op in _SHARED:
            shared = frozenset().union(*(buffers.get(name, {name}) for name in inputs))
        elif node.op in _IN_PLACE and needed:
            own = [buffers.get(name, frozenset({name})) for name in inputs if readers[name] == 1]
            shared = next((each for each in own if sum(size.get(name, 0) for name in each) == needed), shared)
        buffers[node.name] = shared or frozenset({node.name})
        step[node.name] = begins
        size[node.name] = 0 if shared else needed
        for name in (*inputs, node.name):
            for buffer in buffers.get(name, ()):
                last[buffer] = max(last[buffer], begins)
        for body in _BODIES.get(node.op, ()):
            within[begins] += _most_alive(bodies.get(node.attr[body].func.name, ()), bodies, unknown_bytes)
    changes: Counter[int] = Counter()
    for name, held in size.items():
        changes[step[name]] += held
        changes[last[name] + 1] -= held
    alive = most = 0
    for moment in sorted({*changes, *within}):
        alive += changes[moment]
        most = max(most, alive + within[moment])
    return most


def _data_inputs(node: Any) -> list[str]:
    return [name.split(":")[0] for name in node.input if not name.startswith("^")]


def _output_bytes(node: Any, unknown_bytes: int) -> int:
    if node.op in _NOT_COMPUTED:
        return 0
    kind = next((node.attr[name].type for name in ("DstT", "dtype", "T") if name in node.attr), 0)
    item_bytes = (tf.dtypes.as_dtype(kind).size or 0) if kind else 0
    total = 0
    for shape in node.attr["_output_shapes"].list.shape if item_bytes else ():
        known = not shape.unknown_rank and all(dimension.size >= 0 for dimension in shape.dim)
        elements = tf.TensorShape(shape).num_elements() if known else None
        total += unknown_bytes if elements is None else elements * item_bytes
    return total
