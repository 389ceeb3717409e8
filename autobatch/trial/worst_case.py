"""Worst case that a trial runs: a micro-batch of any size, of the longest samples seen in the user's own data.

Where all samples are of one size, the first effective batch is repeated. Where they vary (ragged and sparse tensors,
strings), the longest one fills the whole micro-batch. Memory then grows with its size in a straight line, which the
search relies on, and no micro-batch of the samples seen needs more. The data are read by
:meth:`autobatch.data.effective_batches.EffectiveBatches.look` alone, which leaves them as they were.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from autobatch.records import HostUse
from autobatch.tensors.batch_structure import Structure, repeat_to, row_sizes, sample_count
from autobatch.types import Tensor


class Data(Protocol):
    """Data that trials run on.

    They are :class:`autobatch.data.effective_batches.EffectiveBatches`, or one batch of a loop.
    """

    @property
    def element_spec(self) -> Any: ...

    @property
    def structure(self) -> Structure: ...

    @property
    def has_elements(self) -> bool:
        """True if batches are made of elements of the user's, which could be taken whole."""
        ...

    @property
    def sample_limit(self) -> int | None: ...

    @property
    def samples_in_each(self) -> int | None:
        """Number of samples in every effective batch, if Keras would know it beforehand; None otherwise."""
        ...

    def host_uses(self) -> tuple[HostUse, ...]:
        """Return what these data will hold in host memory while they are trained on."""
        ...

    def bytes_to_come(self, samples: int) -> int:
        """Return the bytes that effective batches under way will take in training besides ``samples`` of them."""
        ...

    def look(self) -> Any:
        """Return a batch of the data, which are left as they were."""
        ...


class WorstCaseSample:
    """Samples to fill micro-batches with.

    They are read when they are first needed, or at once if it is not known that there are any.

    Raises:
        ValueError: There are no data.
    """

    def __init__(self, batches: Data) -> None:
        self.structure = batches.structure
        self._batches: Data | None = batches
        self._leaves: list[Any] = []
        if batches.sample_limit is None:
            self.read()

    @property
    def leaves(self) -> list[Any]:
        """Tensors of these samples, in order."""
        self.read()
        return self._leaves

    def read(self) -> None:
        """Read them now, unless they have been read; reading takes memory for a moment."""
        if self._batches is None:
            return
        with tf.device("CPU:0"):
            leaves = self.structure.leaves(self._batches.look())
            self._leaves, self._batches = _longest_only(leaves), None

    @property
    def tensors(self) -> list[Tensor]:
        """Dense tensors that are held of them now."""
        return list(tf.nest.flatten(self._leaves, expand_composites=True))

    @property
    def rows(self) -> int:
        """Number of different samples that there are to repeat."""
        return int(sample_count(self.leaves))

    def describe(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Describe what one sample holds: each leaf's kind, dtype and sizes, those that vary in steps of a fifth.

        With exact sizes a shuffled data set would be another one each time, since it begins with other samples.
        """
        specs = self.structure.specs
        if all(_is_alike(spec) for spec in specs):
            return [(type(spec).__name__, spec.dtype.name, tuple(spec.shape[1:])) for spec in specs]
        return [_describe(leaf, spec) for leaf, spec in zip(self.leaves, specs, strict=True)]

    def micro_batch(self, samples: int) -> Any:
        """Return a batch of ``samples`` of them, in the structure that ``train_step`` takes, on the host."""
        with tf.device("CPU:0"):
            return self.structure.pack([repeat_to(leaf, samples) for leaf in self.leaves])


def _longest_only(leaves: list[Tensor]) -> list[Any]:
    sizes = [size for leaf in leaves if (size := row_sizes(leaf)) is not None]
    if not sizes:
        return leaves
    row = int(np.argmax(np.sum(sizes, axis=0)))
    return [_row(leaf, row) for leaf in leaves]


def _is_alike(spec: Any) -> bool:
    """Return True if all samples that a type spec describes have one size, which the spec shows."""
    known = isinstance(spec, tf.TensorSpec) and spec.dtype != tf.string and spec.shape.rank is not None
    return known and None not in spec.shape.as_list()[1:]


def _describe(leaf: Tensor, spec: Any) -> tuple[str, str, tuple[int, ...]]:
    kind = type(spec).__name__
    varying = row_sizes(leaf)
    if varying is not None:
        return kind, leaf.dtype.name, (_step(int(np.max(varying, initial=0))),)
    known = [None] * (leaf.shape.rank - 1) if spec.shape.rank is None else spec.shape.as_list()[1:]
    sizes = zip(leaf.shape.as_list()[1:], known, strict=True)
    return kind, leaf.dtype.name, tuple(_step(size) if fixed is None else size for size, fixed in sizes)


def _step(size: int) -> int:
    """Return the step of a size, four to each doubling, so that sizes in one step differ by a fifth at the most."""
    return int(4 * math.log2(size)) if size else -1


def _row(leaf: Tensor, row: int) -> Any:
    if isinstance(leaf, tf.SparseTensor):
        rest = leaf.dense_shape[1:]
        return tf.sparse.slice(leaf, tf.concat([[row], tf.zeros_like(rest)], 0), tf.concat([[1], rest], 0))
    return leaf[row : row + 1]
