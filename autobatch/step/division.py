"""Division of an effective batch into micro-batches of even sizes.

``samples`` at ``micro_batch`` are cut into ``ceil(samples / micro_batch)`` micro-batches, as few as there can be. Their
sizes differ by at most one: 16 at 5 is 4 + 4 + 4 + 4, not 5 + 5 + 5 + 1. That takes as many steps and less memory. A
last micro-batch of one or two samples distorts BatchNormalization, makes NaN of an unbiased variance and breaks code
that squeezes. No micro-batch is larger than ``micro_batch``, the size that was proven to fit.

The larger ones come first. Memory that runs out does so at the first micro-batch, before work is done in vain, and the
later ones find room where the first was.

Under XLA each size is compiled by itself. An even division has one size or two, as has an uneven one. An epoch's tail
may bring two new ones where a division into the size that is compiled already, and a remainder, brings one. That
division is taken if the remainder is at least half of that size (:func:`with_few_shapes`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from autobatch.types import Model


class Division(NamedTuple):
    """The sizes of micro-batches, in turn: ``larger`` for the first ``larger_samples`` samples, ``smaller`` after.

    The first micro-batch has ``larger`` samples. Each of the three is an int, or a scalar int64 tensor.
    """

    larger: Any
    smaller: Any
    larger_samples: Any


def evenly(samples: Any, micro_batch: Any) -> Division:
    """Divide ``samples``, at least 1, into as few micro-batches as ``micro_batch`` allows, as even as can be.

    Both are ints, or both are scalar int64 tensors.
    """
    steps = -(-samples // micro_batch)
    larger, smaller = -(-samples // steps), samples // steps
    return Division(larger, smaller, (samples - smaller * steps) * larger)


def with_few_shapes(samples: int, micro_batch: int, *, whole: int) -> Division:
    """Divide the samples of a tail where each size is compiled by itself.

    ``whole`` counts the samples of most batches; the sizes that they are divided into need no compilation. The
    division is even, unless one of those sizes and a remainder need fewer compilations. The remainder is at least half
    as large. It depends on the arguments alone, so that training does not depend on what was compiled before.
    """
    even = evenly(samples, micro_batch)
    compiled = {*evenly(whole, micro_batch)[:2]}
    steps = -(-samples // micro_batch)
    for size in sorted(compiled, reverse=True):
        others = (steps - 1) * size
        remainder = samples - others
        is_even_enough = 0 < remainder <= size <= 2 * remainder
        if is_even_enough and len({size, remainder} - compiled) < len({*even[:2]} - compiled):
            return Division(size, remainder, others)
    return even


class Divider:
    """Division of one kind of a model's batches, in training or in evaluation.

    ``whole`` counts the samples of most batches; None takes the largest batch so far.
    """

    def __init__(self, model: Model, whole: int | None = None) -> None:
        self._model = model
        self._whole = whole
        self._most_samples = 0
        self._latest: tuple[Division, Any] | None = None

    def division(self, samples: int, micro_batch: int) -> Division:
        """The division of a batch: even, and under XLA into few shapes."""
        self._most_samples = max(self._most_samples, samples)
        if not self._model.jit_compile or self._model.run_eagerly:
            return evenly(samples, micro_batch)
        return with_few_shapes(samples, micro_batch, whole=self._whole or self._most_samples)

    def tensor(self, samples: int, micro_batch: int) -> Any:
        """The same as a vector on the host, to give to a compiled loop; most batches are divided as the one before."""
        division = self.division(samples, micro_batch)
        if self._latest is None or self._latest[0] != division:
            with tf.device("CPU:0"):
                self._latest = division, tf.constant(division, tf.int64)
        return self._latest[1]
