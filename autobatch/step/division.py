"""Division of an effective batch into micro-batches of even sizes.

``samples`` at ``micro_batch`` are cut into ``ceil(samples / micro_batch)`` micro-batches, the fewest possible. Their
sizes differ by at most one: 16 at 5 is 4 + 4 + 4 + 4, not 5 + 5 + 5 + 1. The even division takes as many steps and less
memory. A last micro-batch of one or two samples would distort BatchNormalization, make NaN of an unbiased variance and
break code that squeezes. No micro-batch is larger than ``micro_batch``, the size that was proven to fit.

The larger micro-batches come first. If memory runs out, it does so at the first one, before work is done in vain. The
later ones find room where the first was.

Under XLA each size is compiled by itself. An even division has one or two sizes, and so has an uneven one. For the tail
of an epoch an even division may need two new sizes. Dividing it into a size that is compiled already and a remainder
needs only one. That division is used if the remainder is at least half of that size (:func:`with_few_shapes`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from autobatch.types import Model


class Division(NamedTuple):
    """Sizes of micro-batches: ``larger`` for the first ``larger_samples`` samples, ``smaller`` for the others.

    The first micro-batch always has ``larger`` samples. Each of the three is an int, or a scalar int64 tensor.
    """

    larger: Any
    smaller: Any
    larger_samples: Any


def evenly(samples: Any, micro_batch: Any) -> Division:
    """Divide ``samples`` into the fewest micro-batches that ``micro_batch`` allows, as evenly as possible.

    Both are at least 1. Both are ints, or both are scalar int64 tensors.
    """
    steps = -(-samples // micro_batch)
    larger, smaller = -(-samples // steps), samples // steps
    return Division(larger, smaller, (samples - smaller * steps) * larger)


def with_few_shapes(samples: int, micro_batch: int, *, whole: int) -> Division:
    """Divide the samples of an epoch's last batch so that few new sizes must be compiled.

    ``whole`` counts the samples of most batches. The sizes that those are divided into are compiled already. The
    division is even, unless one of those sizes and a remainder need fewer compilations. The remainder is then at least
    half as large as that size. The result depends on the arguments alone, not on what was compiled before.
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
    """Division of a model's batches, either those of training or those of evaluation.

    ``whole`` counts the samples of most batches; None takes the largest batch so far.
    """

    def __init__(self, model: Model, whole: int | None = None) -> None:
        self._model = model
        self._whole = whole
        self._most_samples = 0
        self._latest: tuple[Division, Any] | None = None

    def division(self, samples: int, micro_batch: int) -> Division:
        """Return the division of a batch: even, or under XLA with few sizes to compile."""
        self._most_samples = max(self._most_samples, samples)
        if not self._model.jit_compile or self._model.run_eagerly:
            return evenly(samples, micro_batch)
        return with_few_shapes(samples, micro_batch, whole=self._whole or self._most_samples)

    def sizes(self, samples: int, micro_batch: int) -> tuple[int, ...]:
        """Return the distinct sizes of a batch's micro-batches, in turn."""
        larger, smaller, of_larger = self.division(samples, micro_batch)
        return (larger,) if of_larger >= samples or larger == smaller else (larger, smaller)

    def tensor(self, samples: int, micro_batch: int) -> Any:
        """Return the division of a batch as a vector on the host, for a compiled loop.

        The latest vector is kept, since most batches are divided as the one before.
        """
        division = self.division(samples, micro_batch)
        if self._latest is None or self._latest[0] != division:
            with tf.device("CPU:0"):
                self._latest = division, tf.constant(division, tf.int64)
        return self._latest[1]
