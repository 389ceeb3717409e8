"""Memory for the temporaries of an optimizer's update: kept small, estimated, and secured before the update begins.

Keras changes each variable by operations that do not wait for those of the others, and TensorFlow starts every
operation that is ready. So the temporaries of many variables would be alive at once. Here each operation waits for the
one before (:func:`autobatch.seams.update_order.updates_in_turn`). With six weights of the same size, on two threads,
that leaves 2 temporaries of a weight's size. Without it there were 5 to 8 for Adam, 9 to 14 for Lion, and 18 to 21 for
RMSprop with momentum (``benchmarks/update_room.py``).

:func:`autobatch.graphs.held_bytes.temporaries` reads the needed bytes from the graph. Before the first variable
changes, :class:`UpdateReserve` asks the allocator for them, in blocks of the sizes of the largest temporaries. It then
notes that the update has begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf

from autobatch.graphs.held_bytes import PIECES, even_pieces, temporaries
from autobatch.seams.update_order import updates_in_turn
from autobatch.tensors.variables import bytes_of, distinct
from autobatch.types import Tensor, Variable

NAME = "autobatch_update_room"
"""Name by which the pieces are recognised among what an update allocates."""

_ROW_BYTES = 2**10
"""Bytes in a row. Room is asked for in rows, because a dimension is an int32."""


class UpdateReserve:
    """Guard around each update of one model: secures memory for its temporaries, then notes that it has begun."""

    def __init__(self) -> None:
        self._pieces = [0] * PIECES
        self._copied: set[tuple[int, ...]] = set()
        with tf.device("CPU:0"):
            self._has_begun = tf.Variable(False, trainable=False, name="autobatch_update_begun")
            # A variable, so that the lengths are not constants: else the graph's optimiser would drop the pieces.
            self._shapes = tf.Variable([[0, _ROW_BYTES]] * PIECES, trainable=False, dtype=tf.int32, name=NAME)

    @property
    def bytes(self) -> int:
        """Bytes that the updates traced so far were found to need."""
        return sum(self._pieces)

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Variables of the reserve itself."""
        return self._has_begun, self._shapes

    def note_begun(self, begun: Any = False) -> Any:
        """Note whether an update has begun; return the operation that does so in a graph."""
        with tf.device("CPU:0"):
            return self._has_begun.assign(begun, read_value=False)

    def has_begun(self) -> bool:
        """Return what :meth:`note_begun` noted last: True if an update has begun."""
        return bool(self._has_begun.numpy())

    def note_gradients(self, gradients: Iterable[Tensor], variables: Iterable[Variable]) -> None:
        """Note before the update is traced which gradients consist of rows.

        A variable that rows were once added to, be it a weight, an average or an accumulator, is copied at every later
        read. The values assigned to it are copied too (``copy_on_read_mode`` in TensorFlow's kernels).
        """
        pairs = zip(gradients, variables, strict=True)
        self._copied.update(tuple(each.shape) for gradient, each in pairs if isinstance(gradient, tf.IndexedSlices))

    @contextlib.contextmanager
    def update_of(self, variables: list[Variable]) -> Iterator[None]:
        """Secure memory before the enclosed code, traced or eager, updates ``variables``; run its updates in turn."""
        inner = distinct(variables)
        if not inner:
            yield
            return
        largest = max(bytes_of([variable]) for variable in inner)
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if graph is None:  # one operation after another, and no trace that shows what they need
            self._settle(even_pieces(guessed_bytes(inner), largest))
        begun = self.note_begun(self._ask(inner[0].device))
        first = 0 if graph is None else len(graph.get_operations())
        with tf.control_dependencies([begun]), updates_in_turn():
            yield
        if graph is not None:
            self._settle(temporaries(graph, first, unknown_bytes=largest, copied=self._copied))

    def _settle(self, pieces: list[int]) -> None:
        """Ask for ``pieces`` (bytes each) from now on, or for the bytes found before if those are more."""
        self._pieces = [max(both) for both in zip(self._pieces, pieces, strict=True)]
        with tf.init_scope():
            self._shapes.assign([[-(-size // _ROW_BYTES), _ROW_BYTES] for size in self._pieces])

    def _ask(self, device: str) -> Any:
        """Ask the allocator of ``device`` for all pieces at once; return a boolean scalar, true once it had them."""
        with tf.device("CPU:0"):
            shapes = tf.unstack(self._shapes.read_value())
        with tf.device(device), tf.name_scope(NAME):
            pieces = [tf.raw_ops.Empty(shape=shape, dtype=tf.uint8) for shape in shapes]
        with tf.device("CPU:0"):
            # One operation needs all of them, so that none is given back before the last is there.
            return tf.reduce_all(tf.stack(tf.shape_n(pieces)) >= 0)


def guessed_bytes(variables: Iterable[Variable]) -> int:
    """Return a guess of the bytes that an update of ``variables`` needs, for use until a trace shows them."""
    sizes = [bytes_of([variable]) for variable in variables]
    return sum(sizes) + 2 * max(sizes, default=0)
