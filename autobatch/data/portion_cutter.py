"""Effective batches cut from elements in Python, portion by portion, in the order of the data.

tf.data cuts batches whose parts all have the same number of rows (:mod:`autobatch.data.rebatching`). Here the parts may
differ, as two streams of 8 and 24 samples do. An element without the proportions of the others, such as the last one
where one stream has run out, is passed on as it is. What came before it makes an effective batch of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from autobatch.tensors.batch_structure import Structure, cut
from autobatch.types import Batch, Tensor


class PortionCutter:
    """Cutter of elements into effective batches of ``target`` portions, in host memory.

    Args:
        structure: tells the rows of each part that make up a portion.
        target: portions in an effective batch; the last may have fewer.
        padding: the value that each part of the structure, missing ones included, is padded with where samples of
            different lengths come together.
        as_they_come: True if each element is an effective batch already.
    """

    def __init__(
        self, structure: Structure, target: int, padding: Sequence[Any], *, as_they_come: bool = False
    ) -> None:
        self._structure = structure
        self._as_they_come = as_they_come or structure.takes_elements_whole
        self._target = target
        self._padding = padding
        self.met_others = False
        """True once an element was not of the structure's proportions."""

    def batches(self, elements: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
        """Yield effective batches, each with True if samples of different lengths were padded for it."""
        held: list[list[Tensor]] = []
        count = 0
        for element in elements:
            portions = self._structure.portions_in(element)
            if portions is None or self._as_they_come:
                self.met_others |= portions is None
                if held:
                    yield self._joined(held)
                    count = 0
                yield element, False
                continue
            if portions == self._target and not held:
                yield element, False
                continue
            leaves = self._structure.leaves(element)
            start = 0
            while start < portions:
                taken = min(self._target - count, portions - start)
                held.append(self._cut(leaves, start, start + taken, portions))
                start, count = start + taken, count + taken
                if count == self._target:
                    yield self._joined(held)
                    count = 0
        if held:
            yield self._joined(held)

    @staticmethod
    def _cut(leaves: list[Tensor], start: int, stop: int, portions: int) -> list[Tensor]:
        if start == 0 and stop == portions:
            return leaves
        with tf.device("CPU:0"):
            bounds = tf.constant(start, tf.int64), tf.constant(stop, tf.int64)
            return [cut(leaf, *bounds) for leaf in leaves]

    def _joined(self, pieces: list[list[Tensor]]) -> tuple[Batch, bool]:
        """Return the pieces in one, and True if some were padded. The list is emptied, so that nothing holds them."""
        differ = False
        joined = []
        with tf.device("CPU:0"):
            for leaves, value in zip(zip(*pieces, strict=True), self._padding, strict=True):
                together, padded = _together(list(leaves), value)
                joined.append(together)
                differ = differ or padded
        pieces.clear()
        return self._structure.pack(joined), differ


def _together(leaves: list[Tensor], value: Any) -> tuple[Tensor, bool]:
    """Return the leaves in one, and True if they had to be padded for it."""
    if len(leaves) == 1:
        return leaves[0], False
    if isinstance(leaves[0], tf.SparseTensor):
        return tf.sparse.concat(0, leaves, expand_nonconcat_dims=True), False
    if isinstance(leaves[0], tf.RaggedTensor):
        return tf.concat(leaves, 0), False
    sizes = {tuple(leaf.shape[1:]) for leaf in leaves}
    if len(sizes) == 1:
        return tf.concat(leaves, 0), False
    longest = [max(axis) for axis in zip(*sizes, strict=True)]
    padded = [
        tf.pad(
            leaf,
            [[0, 0], *([0, most - size] for most, size in zip(longest, leaf.shape[1:], strict=True))],
            constant_values=value if leaf.dtype == tf.string else tf.cast(value, leaf.dtype),
        )
        for leaf in leaves
    ]
    return tf.concat(padded, 0), True
