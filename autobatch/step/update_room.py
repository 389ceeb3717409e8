"""The room that an optimizer's update needs: kept small, told from the trace, asked for before the update begins.

Keras changes each variable by operations that wait for nothing of the others', and TensorFlow starts whatever can be
started, so that the temporaries of many variables are alive at once. Here each operation waits for the one before
(:func:`autobatch.seams.update_order.updates_in_turn`). Of six weights of the same size, on two threads, that leaves 2
temporaries of a weight's size for Adam instead of 5 to 8, for Lion 2 instead of 9 to 14, for RMSprop with momentum 2
instead of 18 to 21 (``benchmarks/update_room.py``).

How much it is :func:`temporaries` tells from the graph. :class:`UpdateReserve` asks the allocator for as much, in
blocks
of the sizes of the largest temporaries, before the first variable changes, and notes that the update has begun.
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
"""By this the pieces can be told among what an update allocates."""

_ROW_BYTES = 2**10
"""Room is asked for in rows, for a dimension is an int32."""


class UpdateReserve:
    """Around each update of one model: makes sure of the memory of its temporaries, then notes that it has begun."""

    def __init__(self) -> None:
        self._pieces = [0] * PIECES
        self._copied: set[tuple[int, ...]] = set()
        with tf.device("CPU:0"):
            self._has_begun = tf.Variable(False, trainable=False, name="autobatch_update_begun")
            # Lengths that are not known beforehand: else the graph's optimiser would find no use for the pieces.
            self._shapes = tf.Variable([[0, _ROW_BYTES]] * PIECES, trainable=False, dtype=tf.int32, name=NAME)

    @property
    def bytes(self) -> int:
        """What the updates traced by now were found to need."""
        return sum(self._pieces)

    @property
    def variables(self) -> tuple[Variable, ...]:
        """The variables of its own."""
        return self._has_begun, self._shapes

    def note_begun(self, begun: Any = False) -> Any:
        """Note whether an update has begun; in a graph, the operation that does."""
        with tf.device("CPU:0"):
            return self._has_begun.assign(begun, read_value=False)

    def has_begun(self) -> bool:
        """What was noted last."""
        return bool(self._has_begun.numpy())

    def note_gradients(self, gradients: Iterable[Tensor], variables: Iterable[Variable]) -> None:
        """Note what gradients are, before the update is traced: of rows that are added here and there, or whole ones.

        A variable that rows were once added to, be it a weight, an average or an accumulator, is copied whenever it is
        read from then on, and what it is assigned is copied too (``copy_on_read_mode`` in TensorFlow's kernels).
        """
        pairs = zip(gradients, variables, strict=True)
        self._copied.update(tuple(each.shape) for gradient, each in pairs if isinstance(gradient, tf.IndexedSlices))

    @contextlib.contextmanager
    def update_of(self, variables: list[Variable]) -> Iterator[None]:
        """Around what is traced to update ``variables``, or does so eagerly; nothing is written to the room."""
        inner = distinct(variables)
        if not inner:
            yield
            return
        largest = max(bytes_of([variable]) for variable in inner)
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if graph is None:  # one operation after another, and no trace to tell what they need
            self._settle(even_pieces(guessed_bytes(inner), largest))
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


def guessed_bytes(variables: Iterable[Variable]) -> int:
    """What an update of ``variables`` needs, as long as no trace tells."""
    sizes = [bytes_of([variable]) for variable in variables]
    return sum(sizes) + 2 * max(sizes, default=0)
